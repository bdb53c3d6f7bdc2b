"""The manifest and the list of what is being moved: what of a file from anybody is taken."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fastmoco_pipelines.errors import ShardError
from fastmoco_pipelines.formats import manifest
from fastmoco_pipelines.formats.manifest import (
    MOVING,
    NAME,
    FolderOfShards,
    check_folders,
    own_sets,
    parse_sets,
    read_moving,
    read_sets,
    write_sets,
)


def shard(number: int = 0, **changes: Any) -> dict[str, Any]:
    fields = {"name": f"a-{number}.tar", "samples": 3, "bytes": 10240, "sha256": "0" * 64}
    return fields | changes


def entry(**changes: Any) -> dict[str, Any]:
    fields = {
        "samples": 6,
        "classes": ["cat", "dog"],
        "class_counts": [4, 2],
        "shards": [shard(0), shard(1)],
        "skipped": [["x.gif", "gif"]],
        "options": {},
    }
    return fields | changes


def text_of(sets: Any, **changes: Any) -> bytes:
    return json.dumps(
        {"format": "fastmoco-manifest", "version": 1, "sets": sets} | changes
    ).encode()


def test_what_is_written_is_taken(tmp_path):
    write_sets(tmp_path, {"a": entry()})
    assert read_sets(tmp_path) == own_sets(tmp_path) == {"a": entry()}
    bare = {"classes": [], "shards": [{"name": "a.tar"}]}  # by another program
    assert parse_sets("m", text_of({"a": bare})) == {"a": bare}


NAMES = [
    "../../etc/passwd",
    "/etc/passwd",
    "a\0.tar",
    "..\\a.tar",
    "https://host/a.tar",
    "",
    "..",
    "\ud800.tar",
]
NUMBERS = ["3", 1e300, -1, True, None, float("nan"), float("inf"), 2**70, [3]]
FORGED: list[tuple[Any, str]] = [
    *(({"shards": [shard(name=name)]}, "shard 0: name=") for name in [*NAMES, 7, None, "x" * 256]),
    *(({"shards": [shard(samples=number)]}, "shard 0: samples=") for number in NUMBERS),
    *(({"shards": [shard(), shard(1, bytes=n)]}, "shard 1: bytes=") for n in NUMBERS),
    *(({"samples": number}, "samples=") for number in NUMBERS),
    *(({"class_counts": [number, 0]}, "'class_counts'") for number in NUMBERS),
    ({"class_counts": [1]}, "1 numbers for 2 classes"),
    ({"class_counts": {}}, "'class_counts'"),
    *(({"classes": value}, "'classes'") for value in (None, "cat", {"cat": 0}, [1, 2], [["cat"]])),
    ({"classes": ["cat", "cat"]}, "'classes' names a class twice"),
    ({"shards": [shard(), shard()]}, "'shards' names a shard twice"),
    *(({"shards": value}, "'shards'") for value in (None, {}, "a.tar")),
    ({"shards": ["a.tar"]}, "shard 0: is not an object"),
    *(({"shards": [shard(sha256=text)]}, "'sha256'") for text in ("", "z" * 64, 0, "0" * 63)),
    *(({"skipped": value}, "'skipped'") for value in ("x", [["x"]], [["x", 1]], {"x": "y"})),
    ({"options": []}, "'options'"),
]


@pytest.mark.parametrize(("changes", "words"), FORGED, ids=lambda value: ascii(value)[:60])
def test_a_forged_field_is_named_and_never_written(tmp_path, changes, words):
    sets = {"a": entry(**changes)}
    with pytest.raises(ShardError, match=rf"m: set 'a': .*{words}.*move it away"):
        parse_sets("m", text_of(sets))
    with pytest.raises(ShardError, match=rf"{NAME}: is not written: set 'a': .*{words}"):
        write_sets(tmp_path, sets)
    assert not (tmp_path / NAME).exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (text_of([]), "'sets' is not an object"),
        (text_of({"a": []}), "set 'a' is not an object"),
        (text_of({"../a": entry()}), "the name is no name of a file"),
        (text_of({}, version=1e300), "has version 1e.300"),
        (b'{"a": ' + b"[" * 200_000, "not valid JSON .lists and objects are nested"),
        (b"[" * 40 + b"]" * 40, "nested deeper than 32"),
        (b'{"format": "\xff"}', "byte 12: 0xff is not UTF-8"),
        (b'{"format": ' + b"9" * 5000 + b"}", "a number is too long"),
    ],
    ids=["sets", "a set", "a path", "version", "deep", "closed", "no text", "digits"],
)
def test_a_broken_manifest_is_named(text, words):
    with pytest.raises(ShardError, match=rf"m: .*{words}.*move it away"):
        parse_sets("m", text)


@pytest.mark.parametrize("changes", [{"samples": 7}, {"class_counts": [6, 1]}])
def test_counts_that_do_not_add_up_are_refused(changes):
    def folder(**fields: Any) -> FolderOfShards:
        return FolderOfShards(
            where="f",
            sets={"a": entry(**fields)},
            samples={"a-0.tar": 3, "a-1.tar": 3},
            present=lambda name: False,
        )

    assert check_folders([folder()]) == ("cat", "dog")
    with pytest.raises(ShardError, match=rf"f/{NAME}: set 'a' has .* and its shards 6: move"):
        check_folders([folder(**changes)])


@pytest.mark.parametrize("counts", [{}, {"samples": 3}])
def test_shards_without_counts_are_not_added_up(counts):
    """As other programs write them."""
    shards = [{"name": "a-0.tar", **counts}, {"name": "a-1.tar"}]
    sets = parse_sets("m", text_of({"a": entry(shards=shards)}))
    samples = {"a-0.tar": 3, "a-1.tar": 3}
    folder = FolderOfShards(where="f", sets=sets, samples=samples, present=lambda name: False)
    assert check_folders([folder]) == ("cat", "dog")


def test_a_backslash_is_a_character_of_a_name(tmp_path):
    sets = {"a": entry(shards=[shard(0, name="a\\b.tar", samples=6)])}
    write_sets(tmp_path, sets)
    assert read_sets(tmp_path) == sets


def test_more_skipped_files_than_a_manifest_holds_are_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest, "MAX_BYTES", 2000)
    monkeypatch.setattr(manifest, "_MANY_SKIPPED", 2)
    write_sets(tmp_path, {"a": entry(skipped=[[f"{i}.gif", "gif"] for i in range(500)])})
    skipped = read_sets(tmp_path)["a"]["skipped"]
    assert skipped == [["0.gif", "gif"], ["1.gif", "gif"], ["...", "498 more files are not listed"]]


def moving(**changes: Any) -> dict[str, Any]:
    return {"set": "a", "entry": entry(), "folder": ".packing-a-0", "old": ["b.tar"]} | changes


@pytest.mark.parametrize(
    "changes",
    [
        {"set": "../a"},
        {"set": 7},
        {"folder": "photos"},  # a folder of the user's, which would be removed
        {"folder": ".packing-link"},
        {"folder": "../.packing-a"},
        {"old": ["notes.txt"]},
        {"old": ["../b.tar"]},
        {"old": "b.tar"},
        {"old": [7]},
        {"entry": entry(shards=[shard(name="notes.txt")])},
        {"entry": entry(shards=[shard(samples="3")])},
        {"entry": []},
    ],
    ids=lambda changes: ascii(changes)[:40],
)
def test_a_forged_list_of_moves_moves_and_removes_nothing(tmp_path: Path, changes):
    (tmp_path / ".packing-link").symlink_to(tmp_path)
    (tmp_path / MOVING).write_text(json.dumps(moving()))
    assert read_moving(tmp_path) == moving()
    (tmp_path / MOVING).write_text(json.dumps(moving(**changes)))
    assert read_moving(tmp_path) is None
