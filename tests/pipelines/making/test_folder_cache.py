"""The cache of packed folders: made once, made again when the folder has changed, never seen half
made."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fastmoco_pipelines import ShardSet
from fastmoco_pipelines.making import folder_cache
from fastmoco_pipelines.making.folder_cache import (
    PackOptions,
    changes,
    folder_state,
    max_side_of,
    pack_once,
    packed_name,
    read_packed,
)

pytest.importorskip("webdataset")


@pytest.fixture
def images(image_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(image_folder, tmp_path / "my images [v1]"))


def test_a_folder_is_packed_once(images, tmp_path) -> None:
    root = tmp_path / "packed"
    told = []
    options = PackOptions(max_side=16)
    first = pack_once(images, root, options, begin=lambda state, out: told.append((state, out)))
    again = pack_once(images, root, options, begin=lambda *_: told.append("again"))
    assert told == [(folder_state(images), first.folder)]
    assert (again.folder, again.samples, again.seconds) == (first.folder, 45, 0)
    opened = ShardSet.open(again.pattern)
    assert len(opened) == 45
    assert opened.sizes_of(np.arange(45)).max() <= 16
    assert opened.classes == ("cat", "dog", "owl")
    assert sorted(path.name for path in root.iterdir()) == [first.folder.name]


def rename(images: Path) -> None:
    (images / "cat" / "000.jpg").rename(images / "cat" / "other.jpg")


def remove(images: Path) -> None:
    (images / "cat" / "000.jpg").unlink()


def write(images: Path) -> None:
    path = images / "cat" / "000.jpg"
    info = path.stat()
    path.write_bytes(path.read_bytes()[::-1])
    os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns + 1))


@pytest.mark.parametrize("change", [rename, remove, write])
def test_a_change_of_the_folder_is_noticed(images, tmp_path, change) -> None:
    before = folder_state(images)
    name = packed_name(before, PackOptions())
    assert changes(before, folder_state(images)) == []
    change(images)
    now = folder_state(images)
    assert packed_name(now, PackOptions()) != name
    assert len(changes(before, now)) == 1


@pytest.mark.parametrize("options", [{"max_side": 9}, {"holdout": 0.2}, {"seed": 1}])
def test_other_options_are_another_set(images, options) -> None:
    state = folder_state(images)
    assert packed_name(state, PackOptions(**options)) != packed_name(state, PackOptions())


def test_what_is_no_image_changes_nothing(images) -> None:
    before = folder_state(images)
    (images / "cat" / "notes.txt").write_text("x")
    assert folder_state(images) == before


KILLED = """
import os, signal, sys
from pathlib import Path
from fastmoco_pipelines.making import folder_cache
from fastmoco_pipelines.making.folder_cache import PackOptions, pack_once
def progress(done, total):
    if done == 20:
        os.kill(os.getpid(), signal.SIGKILL)
pack_once(Path(sys.argv[1]), Path(sys.argv[2]), PackOptions(), progress=progress)
"""


def test_a_killed_process_leaves_nothing_that_is_used(images, tmp_path) -> None:
    root = tmp_path / "packed"
    command = [sys.executable, "-c", KILLED, str(images), str(root)]
    done = subprocess.run(command, check=False)
    assert done.returncode == -signal.SIGKILL
    left = [path.name for path in root.iterdir()]
    assert any(name.endswith(".making") for name in left)
    assert all(read_packed(root / name) is None for name in left)
    packed = pack_once(images, root, PackOptions())
    assert packed.seconds > 0
    assert [path.name for path in root.iterdir()] == [packed.folder.name]


def pack(images: Path, root: Path, made: multiprocessing.Queue) -> None:
    made.put(pack_once(images, root, PackOptions()).seconds > 0)


def test_two_processes_make_it_once(images, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(folder_cache, "_POLL_SECONDS", 0.02)
    context = multiprocessing.get_context("fork")
    made = context.Queue()
    both = [context.Process(target=pack, args=(images, tmp_path / "p", made)) for _ in range(2)]
    for process in both:
        process.start()
    assert sorted(made.get(timeout=60) for _ in both) == [False, True]
    for process in both:
        process.join()


def test_a_waiting_process_says_so(images, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(folder_cache, "_POLL_SECONDS", 0.02)
    root = tmp_path / "packed"
    root.mkdir()
    out = root / packed_name(folder_state(images), PackOptions())
    waited = []
    context = multiprocessing.get_context("fork")
    ready, said = context.Event(), context.Event()

    def hold() -> None:
        with folder_cache._locked(out.with_name(f".{out.name}.lock"), lambda: None):
            ready.set()
            said.wait(60)

    def wait(out: Path) -> None:
        waited.append(out)
        said.set()

    holder = context.Process(target=hold)
    holder.start()
    assert ready.wait(60)
    pack_once(images, root, PackOptions(), wait=wait)
    holder.join()
    assert waited == [out]


def test_held_out_images_are_a_set_with_the_same_classes(images, tmp_path) -> None:
    seen = []
    packed = pack_once(
        images,
        tmp_path / "packed",
        PackOptions(holdout=0.2),
        progress=lambda done, total: seen.append((done, total)),
    )
    assert (packed.samples, packed.held_out) == (36, 9)
    train, test = ShardSet.open(packed.pattern), ShardSet.open(packed.test_pattern)
    assert (len(train), len(test)) == (36, 9)
    assert train.classes == test.classes == ("cat", "dog", "owl")
    assert np.bincount(test.labels_of(np.arange(9))).tolist() == [3, 3, 3]
    assert seen == [(done + 1, 45) for done in range(45)]


def test_a_second_folder_has_the_numbering_of_the_first(images, tmp_path) -> None:
    other = tmp_path / "held out"
    shutil.copytree(images / "owl", other / "owl")
    for path in sorted((other / "owl").iterdir())[:10]:
        path.write_bytes(path.read_bytes() + b"\0")  # no image of the first has these bytes
    options = PackOptions(prefix="test", classes=("cat", "dog", "owl"), apart_from=str(images))
    packed = pack_once(other, tmp_path / "packed", options)
    assert (packed.samples, len(packed.skipped)) == (10, 5)
    opened = ShardSet.open(packed.pattern)
    assert set(opened.labels_of(np.arange(10)).tolist()) == {2}


def test_what_is_unusual_about_a_folder_is_reported_once(images, tmp_path) -> None:
    (images / "dog" / "link.jpg").symlink_to("000.jpg")
    for name, part in (("cat", "train"), ("dog", "val")):
        (images / name).rename(images / part)
    told: list[str] = []
    for _ in range(2):
        pack_once(images, tmp_path / "packed", PackOptions(), tell=told.append)
    parts, links = told
    assert parts.startswith("note: the folders 'train' and 'val' look like parts of a set")
    assert "--data.images" in parts
    assert "`fastmoco data pack --follow-links`" in links


def test_a_folder_without_images_leaves_nothing(tmp_path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.jpg").write_bytes(b"no image")
    for name in ("empty", "bad", "absent"):
        with pytest.raises(ValueError, match=name):
            pack_once(tmp_path / name, tmp_path / "packed", PackOptions())
    assert not (tmp_path / "packed").exists()


@pytest.mark.parametrize(("size", "side"), [(224, 512), (32, 96), (8, 64), (96, 224)])
def test_sides_are_shrunk_by_the_size_of_the_views(size, side) -> None:
    assert max_side_of(size) == side


def source_of(**changes: object) -> dict[str, object]:
    state = {"path": "/a", "images": 2, "total_bytes": 9, "classes": ["cat"], "digest": "0"}
    options = {"max_side": None, "holdout": 0.1, "seed": 0, "prefix": "train", "classes": []}
    fields = {"format": "fastmoco-images", "version": 1, "state": state, "options": options}
    return fields | {"samples": 2, "held_out": 0, "total_bytes": 10240} | changes


@pytest.mark.parametrize(
    "changes",
    [
        *({"samples": value} for value in ("2", 1e300, -1, True, None, float("nan"), [2])),
        {"held_out": "1"},
        {"state": []},
        {"state": {"path": 1, "images": 2, "total_bytes": 9, "classes": [], "digest": ""}},
        {"state": {"path": "", "images": 2, "total_bytes": 9, "classes": [1], "digest": ""}},
        {"state": {"path": "", "images": 2, "total_bytes": 9, "classes": "cat", "digest": ""}},
        {"options": {"prefix": "../../etc/"}},
        {"options": {"prefix": "*"}},
        {"options": {"holdout": "0.1"}},
        {"options": {"max_side": 1.5}},
        {"options": {"more": 1}},
        {"version": 2},
    ],
    ids=lambda changes: ascii(changes)[:50],
)
def test_a_forged_source_is_none(tmp_path, changes) -> None:
    (tmp_path / "source.json").write_text(json.dumps(source_of()))
    assert read_packed(tmp_path).samples == 2
    (tmp_path / "source.json").write_text(json.dumps(source_of(**changes)))
    assert read_packed(tmp_path) is None


def test_a_source_that_is_no_file_is_none(tmp_path) -> None:
    os.mkfifo(tmp_path / "source.json")
    assert read_packed(tmp_path) is None
    (tmp_path / "source.json").unlink()
    (tmp_path / "source.json").write_bytes(b"[" * 200_000)
    assert read_packed(tmp_path) is None
