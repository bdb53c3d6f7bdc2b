"""Options that a refusal or a warning of a `data` command names: taken from its text, they work."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from fastmoco_pipelines.formats.index import index_path
from fastmoco_pipelines.inspecting import check as check_module
from fastmoco_pipelines.sets.shard_set import ShardSet
from tests.command_line import main
from tests.fastmoco.cli.test_data_check import image, put
from tests.pipelines.quick_pool import QuickPool


@pytest.fixture
def say(monkeypatch, capsys):
    """Runs a command, and returns its exit code and all that it prints."""
    monkeypatch.setattr(check_module, "DecodePool", QuickPool)

    def run(*words: str) -> tuple[int, str]:
        code = main(list(words))
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    return run


def words_of(text: str, pattern: str) -> list[str]:
    found = re.search(pattern, text)
    assert found is not None, text
    return shlex.split(found[1])


def shards(folder: Path, name: str = "set-00.tar", count: int = 6) -> Path:
    members = [(f"{i}.jpg", image(i)) for i in range(count)]
    labels = [(f"{i}.cls", b"%d" % (i % 2)) for i in range(count)]
    return put(folder / name, [m for pair in zip(members, labels, strict=True) for m in pair])


def test_a_set_without_an_index(tmp_path, say):
    tar = shards(tmp_path)
    _, text = say("data", "check", str(tar))
    command = words_of(text, r"run `fastmoco (data index [^`]+)` before training")
    assert say(*command)[0] == 0
    with ShardSet.open(str(tar)) as opened:
        assert len(opened) == 6


def test_two_tars_damaged_at_once(tmp_path, say):
    """One is cut and has no index; of the other one a header is lost, and its index fits. Each
    message leads on, and in the end both are read."""
    cut, hidden = shards(tmp_path), shards(tmp_path, "set-01.tar")
    assert say("data", "index", str(tmp_path))[0] == 0
    index_path(cut).unlink()
    raw = cut.read_bytes()
    cut.write_bytes(raw[: len(raw) // 2])
    with open(hidden, "r+b") as file:  # the header of the fourth image, far from both ends
        at = raw.index(b"3.jpg")
        file.seek(at)
        file.write(b"\xff" * 512)

    code, text = say("data", "index", str(tmp_path))
    assert code != 0
    again = words_of(text, r"Or index what is left of it, for new runs: `fastmoco ([^`]+)`")
    code, text = say(*again, str(tmp_path))
    assert code != 0
    assert "set-01.tar: its index knows 1 sample more than can be found now: keep it" in text
    check = words_of(text, r"let `fastmoco (data check)` find which of them are damaged")
    assert say(*check, str(tmp_path))[0] == 1
    with ShardSet.open(str(tmp_path)) as opened:
        assert 6 < len(opened) < 12  # the cut one has what is left of it, the other one its index
    name = words_of(text, r"delete (\S+) first")[0]
    (tmp_path / name).unlink()
    code, text = say(*again, str(tmp_path))
    assert code == 0
    with ShardSet.open(str(tmp_path)) as opened:
        assert len(opened) < 12


def test_labels_and_keys(tmp_path, say):
    tar = put(tmp_path / "set-00.tar", [(f"2024.01.0{i}.jpg", image(i)) for i in range(4)])
    _, text = say("data", "index", str(tar))
    keys = words_of(text, r"(--keys last-dot) ends it at the last dot")
    code, text = say("data", "index", str(tar), *keys)
    assert code == 0
    assert "4 images in 1 shard indexed" in text
    code, text = say("data", "index", str(tar), *keys, "--labels", "txt")
    assert code != 0
    for cure in (r"(--labels auto) looks at", r"(--labels none) indexes without labels"):
        assert say("data", "index", str(tar), *keys, *words_of(text, cure))[0] == 0


def test_a_folder_that_holds_shards_already(tmp_path, say):
    pytest.importorskip("webdataset")
    images = tmp_path / "images" / "cat"
    images.mkdir(parents=True)
    (images / "1.jpg").write_bytes(image(1))
    command = ("data", "pack", str(images.parent), str(tmp_path / "out"))
    assert say(*command)[0] == 0
    code, text = say(*command)
    assert code != 0
    assert say(*command, *words_of(text, r"ask to overwrite them \((--overwrite)\)"))[0] == 0
