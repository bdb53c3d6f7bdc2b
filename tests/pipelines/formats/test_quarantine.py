"""The quarantine list: applies to bytes, not to names; survives crashes in mid-write and many
writers at once."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from fastmoco_pipelines.files.small import UnfitFileError
from fastmoco_pipelines.formats.quarantine import (
    Quarantine,
    append_entry,
    quarantine_path,
    read_list,
)
from fastmoco_pipelines.text import escaped


def entry(i: int, **changes: object) -> dict[str, object]:
    fields = {
        "shard": "a.tar",
        "key": f"{i:03d}",
        "extension": "jpg",
        "offset": 512 * i,
        "size": 100 + i,
        "crc32": 7,
    }
    return {**fields, "reason": "truncated", **changes}


def checked_tar(**changes: object) -> dict[str, object]:
    fields = {"shard": "a.tar", "tar_bytes": 1, "tar_hash": "0" * 64, "records": "1" * 64}
    return {**fields, "when": "", **changes}


def test_a_line_applies_only_to_the_very_bytes(tmp_path):
    quarantine = Quarantine()
    quarantine.add(**entry(3))
    again = Quarantine.read(quarantine.write(quarantine_path(tmp_path)))
    assert len(again) == 1
    assert again.rows("a.tar", [1536], [103], [7]) == {0: "truncated"}
    for other in (
        ("b.tar", 1536, 103, 7),
        ("a.tar", 0, 103, 7),
        ("a.tar", 1536, 104, 7),
        ("a.tar", 1536, 103, 8),
    ):
        shard, *numbers = other
        assert again.rows(shard, *([number] for number in numbers)) == {}


def test_rows_of_an_index_are_found_at_once():
    quarantine = Quarantine()
    for i in (1, 4, 9):
        quarantine.add(**entry(i))
    quarantine.add(**entry(2, shard="b.tar"))
    quarantine.add(**entry(5, size=1))  # stale: the index has another size
    offsets, sizes = [512 * i for i in range(8)], [100 + i for i in range(8)]
    assert quarantine.rows("a.tar", offsets, sizes, [7] * 8) == {1: "truncated", 4: "truncated"}
    assert quarantine.rows("c.tar", offsets, sizes, [7] * 8) == {}


def test_a_sample_is_listed_once_and_the_first_reason_stays(tmp_path):
    quarantine = Quarantine()
    assert quarantine.add(**entry(0)) is not None
    assert quarantine.add(**entry(0, reason="another")) is None
    other = Quarantine()
    other.add(**entry(0, reason="another"))
    other.add(**entry(1))
    quarantine.update(other)
    assert [e.reason for e in quarantine] == ["truncated", "truncated"]


def test_a_missing_file_is_an_empty_list(tmp_path):
    assert len(Quarantine.read(tmp_path / "none.jsonl")) == 0


@pytest.mark.parametrize(
    "line",
    [
        b'{"shard": "a.tar", "key": "00',
        b"\xff\xfe",
        b"[]",
        b"[" * 60000,
        json.dumps(entry(0) | {"offset": -1, "when": ""}).encode(),
        json.dumps(entry(0) | {"size": True, "when": ""}).encode(),
        json.dumps(entry(0) | {"crc32": 2**70, "when": ""}).encode(),
        json.dumps(entry(0) | {"reason": None, "when": ""}).encode(),
        json.dumps(entry(0) | {"offset": 1e300, "when": ""}).encode(),
        json.dumps(entry(0) | {"offset": float("nan"), "when": ""}).encode(),
        json.dumps(entry(0) | {"size": 2**32, "when": ""}).encode(),
        json.dumps(entry(0) | {"offset": 2**63, "when": ""}).encode(),
        json.dumps(entry(0) | {"shard": "../../etc/passwd", "when": ""}).encode(),
        json.dumps(entry(0) | {"shard": "/a.tar", "when": ""}).encode(),
        json.dumps(entry(0) | {"shard": "a\0.tar", "when": ""}).encode(),
        json.dumps(entry(0) | {"file": [[[[[0]]]]], "when": ""}).encode(),
        b'{"shard": ' + b"9" * 5000 + b"}",
        json.dumps(checked_tar(tar_bytes=1e300)).encode(),
        json.dumps(checked_tar(tar_hash="x")).encode(),
        json.dumps(checked_tar(records=None)).encode(),
        json.dumps(checked_tar(shard="../a.tar")).encode(),
    ],
    ids=["torn", "no text", "a list", "deep", "negative", "truth value", "huge", "no reason"]
    + ["1e300", "NaN", "size", "offset", "a path", "absolute", "a zero", "a deep file", "digits"]
    + ["bytes of a tar", "hash of a tar", "its records", "its path"],
)
def test_broken_lines_are_counted_and_the_rest_is_read(tmp_path, line):
    path = quarantine_path(tmp_path)
    good = Quarantine()
    good.add(**entry(1))
    good.write(path)
    path.write_bytes(line + b"\n" + path.read_bytes())
    read = Quarantine.read(path)
    assert (len(read), read.broken) == (1, 1)


def test_a_list_has_a_largest_size_and_is_no_link_when_it_is_written(tmp_path, monkeypatch):
    path = quarantine_path(tmp_path)
    (tmp_path / "precious").write_text("all of it")
    path.symlink_to("precious")
    with pytest.raises(UnfitFileError, match="is a symbolic link"):
        append_entry(path, Quarantine().add(**entry(1)))
    assert (tmp_path / "precious").read_text() == "all of it"
    monkeypatch.setattr("fastmoco_pipelines.formats.quarantine.MAX_LIST_BYTES", 5)
    read, problem = read_list(path)
    assert len(read) == 0
    assert "has 9 bytes, a file of this kind at most 5" in problem


def test_a_line_torn_by_a_crash_does_not_swallow_the_next(tmp_path):
    path = quarantine_path(tmp_path)
    path.write_bytes(b'{"shard": "a.tar", "ke')
    append_entry(path, Quarantine().add(**entry(1)))
    read = Quarantine.read(path)
    assert (len(read), read.broken) == (1, 1)


def test_many_writers_lose_no_line(tmp_path):
    code = (
        "import sys; from pathlib import Path; from fastmoco_pipelines.formats.quarantine import *\n"
        "for i in range(200):\n"
        "    append_entry(Path(sys.argv[1]), Quarantine().add(shard=sys.argv[2], key=str(i), extension='jpg',"
        " offset=i, size=1, crc32=1, reason='r' * 300))"
    )
    path = quarantine_path(tmp_path)
    writers = [
        subprocess.Popen([sys.executable, "-c", code, str(path), f"{w}.tar"]) for w in range(4)
    ]
    assert [writer.wait(60) for writer in writers] == [0] * 4
    read = Quarantine.read(path)
    assert (len(read), read.broken) == (800, 0)


def test_the_list_is_replaced_in_one_go(tmp_path):
    path = quarantine_path(tmp_path)
    Quarantine().write(path)
    assert path.read_bytes() == b""
    assert os.listdir(tmp_path) == [path.name]


def test_terminal_escapes_never_come_out_again(tmp_path):
    quarantine = Quarantine()
    quarantine.add(**entry(0, key="\x1b[2Jx", reason="\x1b]0;evil\x07\n"))
    (read,) = Quarantine.read(quarantine.write(quarantine_path(tmp_path)))
    assert read.key.isprintable()
    assert read.reason == r"\x1b]0;evil\x07\n"
    assert escaped("plain äß 图") == "plain äß 图"
    assert escaped("\u202egpj\udcff") == r"\u202egpj\udcff"


def test_lines_beyond_any_list_are_not_looked_at(tmp_path, monkeypatch):
    monkeypatch.setattr("fastmoco_pipelines.formats.quarantine._MAX_LINES", 3)
    path = tmp_path / "quarantine.jsonl"
    whole = Quarantine()
    for number in range(3):
        whole.add(**entry(number))
    whole.write(path)
    assert (len(Quarantine.read(path)), Quarantine.read(path).broken) == (3, 0)
    path.write_bytes(path.read_bytes() + b"\n{}" * 50)
    assert (len(Quarantine.read(path)), Quarantine.read(path).broken) == (3, 1)
