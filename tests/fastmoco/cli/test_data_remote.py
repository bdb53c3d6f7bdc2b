"""`fastmoco data index`, `check` and `stats` on URLs, and on what is left of damaged tars: text,
files, exit codes."""

from __future__ import annotations

import io
import json
import shutil
import sys
import tarfile

import pytest

from fastmoco_pipelines.formats.index import read_any_index
from fastmoco_pipelines.stores import object_store
from tests.command_line import main
from tests.fastmoco.cli.test_data_check import image
from tests.pipelines.http_fault_server import FaultServer


@pytest.fixture
def folder(tmp_path):
    """Six labelled images in a tar that somebody else packed."""
    folder = tmp_path / "set"
    folder.mkdir()
    with tarfile.open(folder / "set-00.tar", "w") as tar:
        for i in range(6):
            for name, data in ((f"{i}.jpg", image(i)), (f"{i}.txt", [b"cat", b"owl"][i % 2])):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return folder


def test_index_check_and_stats_of_a_set_on_a_server(folder, tmp_path, capsys):
    cache = ["--cache-dir", str(tmp_path / "cache"), "--cache-size-gb", "0.1"]
    out, lists, report = tmp_path / "indexes", tmp_path / "lists", tmp_path / "report.json"
    with FaultServer(folder) as server:
        url = f"{server.url}/set-00.tar"
        assert main(["data", "index", url, *cache]) == 2
        assert (
            "nothing is written to a server: give a folder for the indexes (--out FOLDER)"
            in capsys.readouterr().err
        )
        assert main(["data", "stats", url, *cache]) == 2
        assert "every shard on a server needs its index beside it" in capsys.readouterr().err
        assert main(["data", "index", url, "--out", str(out), *cache]) == 0
        text = capsys.readouterr().out
        assert "6 images in 1 shard indexed" in text
        assert f"copy the files in {out} to {server.url}/" in text
        for path in out.iterdir():
            shutil.copy(path, folder)
        tar = folder / "set-00.tar"
        raw = bytearray(tar.read_bytes())
        at = read_any_index(out / "set-00.tar").columns["offset"][4]
        raw[at + 600 : at + 700] = bytes(100)
        tar.write_bytes(raw)
        options = ["--quarantine-out", str(lists), "--json", str(report), "--workers", "1"]
        assert main(["data", "check", url, *options, *cache]) == 1
        text = capsys.readouterr().out
        assert "6 samples = 5 delivered + 1 quarantined" in text
        (path,) = lists.iterdir()
        assert f"copy {path} to {server.url}/quarantine.jsonl: loaders look there" in text
        content = json.loads(report.read_text())
        assert (content["counts"], content["uploads"]) == (
            {"changed bytes": 1},
            [f"{server.url}/quarantine.jsonl"],
        )
        assert content["pattern"] == url
        assert main(["data", "stats", url, *cache]) == 0
        assert "2 classes: cat 3, owl 3" in capsys.readouterr().out
    assert sorted(path.name for path in folder.iterdir()) == [
        "manifest.json",
        "set-00.tar",
        "set-00.tar.index",
    ]


@pytest.mark.parametrize("verb", ["check", "stats", "index"])
def test_a_missing_package_of_a_store_names_the_extra(verb, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    object_store.file_system.cache_clear()
    arguments = [
        "data",
        verb,
        "s3://bucket/set-{00..01}.tar",
        "--cache-dir",
        str(tmp_path / "cache"),
    ]
    assert main([*arguments, *(["--out", str(tmp_path / "out")] if verb == "index" else [])]) == 2
    error = capsys.readouterr().err
    assert "needs the package s3fs" in error
    assert "pip install '.[s3]'" in error
    assert len(error.strip().splitlines()) == 1


def test_salvage_lists_what_is_lost(folder, capsys):
    tar = folder / "set-00.tar"
    with tarfile.open(tar) as whole:
        header, following = whole.getmember("2.jpg").offset, whole.getmember("2.txt").offset
    raw = bytearray(tar.read_bytes())
    raw[header : header + 100] = bytes([200]) * 100
    tar.write_bytes(raw)
    assert main(["data", "index", str(tar)]) == 2
    error = capsys.readouterr().err
    assert f"set-00.tar: byte {header}: no valid member header (checksum)" in error
    assert "`fastmoco data index --salvage`" in error
    assert main(["data", "index", str(tar), "--salvage"]) == 0
    text = capsys.readouterr().out
    assert "5 images in 1 shard indexed, 1 member skipped" in text
    assert (
        f"lost set-00.tar: {following - header} bytes from byte {header} on: no valid member header (checksum)"
        in text
    )
    assert text.count("no valid member header") == 1
    assert "the indexes record the lost bytes" in text
    assert main(["data", "check", str(tar), "--workers", "1"]) == 1
    text = capsys.readouterr().out
    assert "[allowed for by its index]" in text
    assert "[noted]" not in text
