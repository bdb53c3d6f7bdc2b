"""The index: what it lists, what it leaves out and counts, and when it is refused."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import tarfile
import zlib
from pathlib import Path

import pytest
from PIL import Image

from fastmoco_pipelines.errors import ShardError
from fastmoco_pipelines.formats.index import (
    build_index,
    index_path,
    json_path,
    read_index,
    write_index,
)
from fastmoco_pipelines.making.indexing import index_shards
from fastmoco_pipelines.sets.shard_set import ShardSet
from tests.pipelines.index_forms import json_of, put_json


def copy_set(packed: Path, to: Path) -> Path:
    return Path(shutil.copytree(packed, to))


def test_index_agrees_with_the_standard_library_and_pillow(packed):
    for tar_path in sorted(packed.glob("*.tar")):
        index = read_index(tar_path)
        with tarfile.open(tar_path) as tar:
            members = {m.name: m for m in tar.getmembers()}
            for i in range(len(index)):
                member = members[index.member(i)]
                data = tar.extractfile(member).read()
                image = Image.open(io.BytesIO(data))
                wanted = {
                    "offset": member.offset_data,
                    "size": member.size,
                    "crc32": zlib.crc32(data),
                    "label": int(tar.extractfile(f"{index.keys[i]}.cls").read()),
                    "height": image.height,
                    "width": image.width,
                }
                assert {name: column[i] for name, column in index.columns.items()} == wanted
        assert len(members) == 2 * len(index) + 1  # and the list of the original files
        assert index.skipped == []


def test_everything_left_out_is_counted_with_its_reason(tmp_path, noise_image, write_tar):
    good = noise_image(0)
    path = write_tar(
        tmp_path / "x.tar",
        [
            ("../../evil.jpg", good),
            ("/abs/evil.jpg", good),
            ("a/../evil.jpg", good),
            ("link.jpg", {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}),
            ("hard.jpg", {"type": tarfile.LNKTYPE, "linkname": "good.jpg"}),
            ("null.jpg", {"type": tarfile.CHRTYPE}),
            ("text.txt", b"hello"),
            ("gif.jpg", b"GIF89a" + bytes(99)),
            ("empty.png", b""),
            ("alone.cls", b"3"),
            ("folder", {"type": tarfile.DIRTYPE}),
            ("folder/good.v1.JPG", good),
            ("folder/good.cls", b" 7\n"),
            ("folder/good.png", noise_image(1, format="PNG")),
            ("folder/good.cls", b"8"),
            ("nolabel.jpeg", good),
        ],
    )
    index = build_index(path)
    # The first dot ends the key: "good.v1.JPG" has extension "v1.JPG" and is no image; the PNG is
    # good's image.
    assert [index.member(i) for i in range(len(index))] == ["folder/good.png", "nolabel.jpeg"]
    assert index.columns["label"] == [7, -1]
    reasons = dict(index.skipped)
    assert len(index.skipped) == 12
    assert "outside the archive" in reasons["../../evil.jpg"]
    assert "outside the archive" in reasons["/abs/evil.jpg"]
    assert "outside the archive" in reasons["a/../evil.jpg"]
    assert "symbolic link" in reasons["link.jpg"]
    assert "hard link" in reasons["hard.jpg"]
    assert "character device" in reasons["null.jpg"]
    assert "no JPEG" in reasons["gif.jpg"]
    assert "empty" in reasons["empty.png"]
    assert reasons["alone.cls"] == "a label without an image"
    assert reasons["folder/good.cls"] == "a second label of the same key"


def test_upper_case_and_split_samples_are_found(tmp_path, noise_image, write_tar):
    members = [
        ("a.JPG", noise_image(0)),
        ("b.jpg", noise_image(1)),
        ("a.cls", b"1"),
        ("b.cls", b"2"),
    ]
    index = build_index(write_tar(tmp_path / "x.tar", members))
    assert [index.member(i) for i in range(2)] == ["a.JPG", "b.jpg"]
    assert index.columns["label"] == [1, 2]


def test_a_second_image_of_a_key_is_counted(tmp_path, noise_image, write_tar):
    path = write_tar(
        tmp_path / "x.tar", [("a.jpg", noise_image(0)), ("a.jpg", noise_image(1)), ("a.png", b"")]
    )
    index = build_index(path)
    assert len(index) == 1
    assert index.skipped == [
        ("a.jpg", "a second image of the same key: its name comes twice in the tar"),
        ("a.png", "a second image of the same key"),
    ]


def test_pickles_in_a_shard_are_never_opened(tmp_path, noise_image, write_tar):
    marker = tmp_path / "marker"

    class Hostile:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return open, (str(marker), "w")  # type: ignore[return-value]

    payload = pickle.dumps(Hostile())
    kinds = ("pyd", "pickle", "pkl", "pth", "pyd.gz", "jpg", "cls")
    members = [(f"k{i}.{kind}", payload) for i, kind in enumerate(kinds)]
    path = write_tar(
        tmp_path / "x.tar", [*members, ("good.jpg", noise_image(0)), ("good.pkl", payload)]
    )
    report = index_shards(str(path))
    with ShardSet.open(str(path)) as shards:
        shards.read([0])
    assert (report.samples, len(report.skipped)) == (1, 8)
    assert not marker.exists()


@pytest.mark.parametrize("text", [b"-7", b"1.5", b"9" * 40, b"\xff"])
def test_labels_that_are_no_numbers_are_named(tmp_path, noise_image, write_tar, text):
    path = write_tar(tmp_path / "x.tar", [("a.jpg", noise_image(0)), ("a.cls", text)])
    with pytest.raises(ShardError, match=r"x\.tar: a\.cls: (a|the largest) label is "):
        build_index(path)


@pytest.mark.parametrize(
    ("keys", "names", "words"),
    [
        ("first-dot", ["cam.2024.01.31.001", "cam.2024.01.31.002", "cam.2024.02.01.001"], "2 of 3"),
        ("first-dot", ["x0.1", "x0.2", "x1.0", "x1.5", "plain"], "2 of 5"),
        ("last-dot", ["cam.2024.01.31.001", "cam.2024.01.31.002", "a/cam.2024.02.01.001"], ""),
        ("last-dot", ["v1.0.final", "v1.1", "v1"], ""),
    ],
)
def test_dots_in_names_are_explained_and_can_be_part_of_the_key(
    tmp_path, noise_image, write_tar, keys, names, words
):
    members = [
        member
        for i, name in enumerate(names)
        for member in ((f"{name}.jpg", noise_image(i)), (f"{name}.cls", b"%d" % i))
    ]
    path = write_tar(tmp_path / "x.tar", [*members, ("._x.1.jpg", b"of a Mac")])
    report = index_shards(str(path), keys=keys)
    if words:
        assert report.samples < len(names)
        assert f"{words} images are left out because they share a key" in report.warnings[0]
        assert "ends at the first dot" in report.warnings[0]
        assert ("most of the images" in " ".join(report.warnings)) == (words == "2 of 3")
        return
    assert (report.samples, report.warnings) == (len(names), ())
    with ShardSet.open(str(path)) as shards:
        assert shards.labels.tolist() == list(range(len(names)))
        assert list(map(bytes, shards.read(list(range(len(names)))))) == [
            noise_image(i) for i in range(len(names))
        ]
        assert shards.describe(1) == f"x.tar: {names[1]}.jpg"


def test_a_shard_without_images_is_an_error(tmp_path, write_tar):
    with pytest.raises(ShardError, match=r"x\.tar: holds no usable image \(it has no members"):
        build_index(write_tar(tmp_path / "x.tar", []))
    with pytest.raises(ShardError, match=r"y\.tar: holds no usable image \(a\.txt: no image"):
        build_index(write_tar(tmp_path / "y.tar", [("a.txt", b"x")]))


def test_a_cut_tar_gets_no_index(packed, tmp_path):
    tar = next(copy_set(packed, tmp_path / "set").glob("*.tar"))
    raw = tar.read_bytes()
    tar.write_bytes(raw[: len(raw) // 2 // 512 * 512])
    with pytest.raises(ShardError, match=r"cut off or damaged"):
        index_shards(str(tar))


def test_index_is_refused_when_missing_or_stale(packed, tmp_path):
    folder = copy_set(packed, tmp_path / "set")
    first, second, _ = sorted(folder.glob("*.tar"))
    index_path(first).unlink()
    with pytest.raises(ShardError, match=r"train-000000\.tar: has no index .*fastmoco data index"):
        read_index(first)
    shutil.copy(index_path(second), index_path(first))
    with pytest.raises(ShardError, match=r"another state of train-000000\.tar"):
        read_index(first)
    write_index(first, build_index(first))
    assert len(read_index(first)) == 16
    raw = bytearray(first.read_bytes())
    raw[600] ^= 1
    first.write_bytes(raw)
    with pytest.raises(ShardError, match="another state"):
        read_index(first)


def broken_indexes() -> dict[str, object]:
    """Edits of a good index, each of which must be refused."""
    huge = 2**70
    return {
        "list instead of object": lambda c: [],
        "foreign format": lambda c: c | {"format": "x"},
        "newer version": lambda c: c | {"version": 2},
        "no hash": lambda c: {k: v for k, v in c.items() if k != "tar_hash"},
        "column missing": lambda c: {k: v for k, v in c.items() if k != "size"},
        "column short": lambda c: c | {"crc32": c["crc32"][1:]},
        "column of text": lambda c: c | {"offset": ["0"] * len(c["key"])},
        "column of floats": lambda c: c | {"size": [1.0] * len(c["key"])},
        "column of truth values": lambda c: c | {"label": [True] * len(c["key"])},
        "negative offset": lambda c: c | {"offset": [-1] * len(c["key"])},
        "offset behind the end": lambda c: c | {"offset": [c["tar_bytes"]] * len(c["key"])},
        "huge offset": lambda c: c | {"offset": [huge] * len(c["key"])},
        "huge size": lambda c: c | {"size": [2**30] * len(c["key"])},
        "huge crc": lambda c: c | {"crc32": [2**32] * len(c["key"])},
        "keys are no text": lambda c: c | {"key": [1] * len(c["key"])},
        "keys with escapes": lambda c: c | {"key": ["\x1b[2J"] * len(c["key"])},
        "no samples": lambda c: (
            c | {k: [] for k in ("key", "extension", "offset", "size", "crc32", "label")}
        ),
        "empty": lambda c: (
            c
            | {
                k: []
                for k in ("key", "extension", "offset", "size", "crc32", "label", "height", "width")
            }
        ),
        "skipped broken": lambda c: c | {"skipped": [["a"]]},
    }


@pytest.mark.parametrize("edit", broken_indexes())
def test_broken_indexes_are_refused(packed, tmp_path, edit):
    tar = next(copy_set(packed, tmp_path / "set").glob("*.tar"))
    content = json_of(tar) | {"content_hash": "0" * 64}
    put_json(tar, json.dumps(broken_indexes()[edit](content)).encode())
    with pytest.raises(ShardError, match=rf"{json_path(tar).name}: .*fastmoco data index"):
        read_index(tar)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000])
def test_garbage_is_refused(packed, tmp_path, content):
    tar = next(copy_set(packed, tmp_path / "set").glob("*.tar"))
    put_json(tar, content)
    with pytest.raises(ShardError, match=r"not valid JSON|not an index of fastmoco"):
        read_index(tar)


def test_index_shards_reports_progress_and_repeats_pack(packed, tmp_path):
    folder = copy_set(packed, tmp_path / "set")
    before = {path.name: path.read_bytes() for path in folder.glob("*.index")}
    calls: list[tuple[int, int]] = []
    report = index_shards(str(folder), progress=lambda done, total: calls.append((done, total)))
    assert calls == [(1, 3), (2, 3), (3, 3)]
    assert (report.shards, report.samples, report.skipped) == (3, 45, ())
    assert before == {path.name: path.read_bytes() for path in folder.glob("*.index")}


def test_the_json_form_is_written_for_other_programs(packed, tmp_path):
    folder = copy_set(packed, tmp_path / "set")
    assert index_shards(str(folder), json=True).samples == 45
    for tar in sorted(folder.glob("*.tar")):
        content = json.loads(json_path(tar).read_text())
        index = read_index(tar)
        assert (content["format"], content["version"]) == ("fastmoco-index", 1)
        assert content["key"] == index.keys
        assert {name: content[name] for name in index.columns} == index.columns
    index_shards(str(folder))  # the next index would make it stale
    assert not list(folder.glob("*.index.json"))
