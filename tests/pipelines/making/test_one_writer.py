"""One process at a time writes into a folder of shards; what a killed one leaves is finished or
removed."""

from __future__ import annotations

import fcntl
import gc
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fastmoco_pipelines.errors import ShardError
from fastmoco_pipelines.formats.manifest import MOVING, NAME, read_sets, write_sets
from fastmoco_pipelines.making.indexing import index_shards
from fastmoco_pipelines.making.one_writer import LOCK, one_writer
from fastmoco_pipelines.making.pack import pack_folder
from fastmoco_pipelines.sets import patterns
from fastmoco_pipelines.sets.shard_set import ShardSet

CALLS = ("open", "replace", "unlink", "mkdir", "rmdir", "link")
"""Functions of `os` at which a process is killed: all that change a folder."""


def content(pattern: str) -> list[tuple[int, bytes]]:
    with ShardSet.open(pattern) as shards:
        images = map(bytes, shards.read(np.arange(len(shards))))
        return sorted(zip(shards.labels.tolist(), images, strict=True))


def killed_at(number: int, work: Callable[[], object]) -> bool:
    """Do some work in a process that SIGKILL ends before its call `number` into the file system;
    whether it was ended."""
    child = os.fork()
    if child == 0:
        left = [number]

        def deadly(real: Callable[..., object]) -> Callable[..., object]:
            def call(*words: object, **named: object) -> object:
                left[0] -= 1
                if left[0] < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*words, **named)

            return call

        for name in CALLS:
            setattr(os, name, deadly(getattr(os, name)))
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_pack_killed_anywhere_is_finished_or_done_again(
    image_folder, tmp_path, monkeypatch, overwrite
):
    monkeypatch.setattr(patterns, "_MOVE_SECONDS", 0.0)
    src = tmp_path / "src"
    for name in ("cat", "dog"):
        (src / name).mkdir(parents=True)
        for path in sorted((image_folder / name).iterdir())[:2]:
            shutil.copy(path, src / name)
    options = {"shard_samples": 2, "seed": 1, "overwrite": overwrite}
    expected = content(pack_folder(src, tmp_path / "undisturbed", **options).pattern)
    before = tmp_path / "before"
    if overwrite:
        pack_folder(src, before, shard_samples=1)
        assert len(list(before.glob("*.tar"))) == 4
    else:
        before.mkdir()
    old = content(f"{before}/train-*.tar") if overwrite else None
    states = set()
    number = 0
    while True:
        out = tmp_path / f"out{number}"
        shutil.copytree(before, out)
        killed = killed_at(number, lambda out=out: pack_folder(src, out, **options))

        # A loader finds the old set, the new one, or is refused: never a part of one.
        try:
            found = content(f"{out}/train-*.tar")
        except (ValueError, ShardError) as error:
            found = None
            states.add(type(error).__name__)
        assert found in (old, expected, None)

        # The same command again ends with the new set, and with nothing else.
        said: list[str] = []
        if found == expected and not overwrite and not (out / MOVING).exists():
            with pytest.raises(FileExistsError, match="already holds 2"):
                pack_folder(src, out, **options)
            (out / LOCK).unlink(missing_ok=True)
        else:
            report = pack_folder(src, out, tell=said.append, **options)
            assert content(report.pattern) == expected
        assert sorted(path.name for path in out.iterdir()) == [
            NAME,
            *(f"train-00000{i}.tar{end}" for i in range(2) for end in ("", ".index")),
        ]
        states.update(text.partition(": ")[2].partition(" ")[0] for text in said)
        shutil.rmtree(out)
        if not killed:
            break
        number += 1
    assert number > 15
    assert {"removed", "the", "ShardError"} <= states


def test_sets_packed_at_one_time_have_one_numbering_in_one_manifest(image_folder, tmp_path):
    """Also where the set that lacks classes comes first: then the other one is refused."""
    (tmp_path / "few").mkdir()
    shutil.copytree(image_folder / "dog", tmp_path / "few" / "dog")
    out = tmp_path / "out"
    out.mkdir()
    program = (
        "import sys, pathlib, fastmoco_pipelines as p; "
        "p.pack_folder(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), prefix=sys.argv[3],"
        " tell=lambda text: print(text, file=sys.stderr, flush=True))"
    )
    with one_writer(out, "test"):  # both wait for this, so that they begin at one time
        packs = {
            name: subprocess.Popen(
                [sys.executable, "-c", program, src, out, name], stderr=subprocess.PIPE, text=True
            )
            for name, src in (("train", image_folder), ("test", tmp_path / "few"))
        }
        for pack in packs.values():
            while "waiting for process" not in pack.stderr.readline():
                assert pack.poll() is None
    errors = {name: pack.communicate()[1] for name, pack in packs.items()}
    done = {name for name, pack in packs.items() if pack.returncode == 0}
    assert done in ({"train", "test"}, {"test"})
    assert done == set(packs) or "not among the 1 classes" in errors["train"]
    sets = read_sets(out)
    assert set(sets) == done
    assert len({tuple(entry["classes"]) for entry in sets.values()}) == 1
    assert not (out / LOCK).exists()


def test_the_same_set_twice_at_one_time_is_refused_at_once(image_folder, packed, tmp_path):
    out = Path(shutil.copytree(packed, tmp_path / "out"))
    with (
        one_writer(out, "data pack --prefix more"),
        pytest.raises(ValueError, match=rf"process {os.getpid()} does this already"),
    ):
        pack_folder(image_folder, out, prefix="more")
    with (
        one_writer(out, f"data index {out}"),
        pytest.raises(ValueError, match=r"does this already \(data index"),
    ):
        index_shards(str(out))
    pack_folder(image_folder, out, prefix="more")
    index_shards(str(out))


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("limit", [2000, 41000])  # within the first tar; in its index
def test_a_full_disk_is_named_and_leaves_nothing(image_folder, tmp_path, limit):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(OSError, match="too large") as raised:
            pack_folder(image_folder, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(raised.value.filename).startswith(str(tmp_path / "out"))
    del raised
    gc.collect()  # nothing of the writer is written later
    assert not (tmp_path / "out").exists()


def test_an_index_waits_for_a_pack(packed, tmp_path):
    out = Path(shutil.copytree(packed, tmp_path / "out \udce9\n"))
    program = "import sys, fastmoco_pipelines as p; p.index_shards(sys.argv[1], tell=lambda t: print(ascii(t)))"
    with one_writer(out, "data pack --prefix more"):
        index = subprocess.Popen(
            [sys.executable, "-u", "-c", program, out], stdout=subprocess.PIPE, text=True
        )
        assert "(data pack --prefix more), which writes into" in index.stdout.readline()
        assert index.poll() is None
    assert index.wait() == 0


def test_without_locks_it_works_alone(image_folder, tmp_path, monkeypatch):
    def no_locks(descriptor: int, how: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    assert pack_folder(image_folder, tmp_path).samples == 45
    assert not (tmp_path / LOCK).exists()


@pytest.mark.parametrize("text", ['{"format": "other"}', "[]", "3"])
def test_a_manifest_of_another_program_is_not_overwritten(image_folder, tmp_path, text):
    (tmp_path / NAME).write_text(text)
    with pytest.raises(ShardError, match="written by another program"):
        pack_folder(image_folder, tmp_path)
    assert (tmp_path / NAME).read_text() == text


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda text: text[: len(text) // 2], "is not valid JSON .* copy it again"),
        (lambda text: "", "is not valid JSON"),
        (lambda text: text.replace('"version":1', '"version":2'), "reads 1: update fastmoco"),
        (lambda text: text.replace('"classes":[', '"classes":[1,'), "is broken: move it away"),
    ],
)
def test_a_damaged_manifest_is_named_with_its_cure(image_folder, packed, tmp_path, damage, words):
    out = Path(shutil.copytree(packed, tmp_path / "out"))
    (out / NAME).write_text(damage((out / NAME).read_text()))
    for work in (
        lambda: pack_folder(image_folder, out, prefix="more"),
        lambda: ShardSet.open(str(out)),
        lambda: ShardSet.open(f"{out}/train-*.tar"),
    ):
        with pytest.raises(ShardError, match=words) as raised:
            work()
        assert f"{out}/{NAME}" in str(raised.value)


def test_a_list_of_moves_without_its_shards_is_dropped(image_folder, packed, tmp_path):
    out = Path(shutil.copytree(packed, tmp_path / "out"))
    entry = read_sets(out)["train"]
    entry["shards"] = [
        {**shard, "name": f"more-{i}.tar"} for i, shard in enumerate(entry["shards"])
    ]
    moving = {"folder": ".packing-more-0", "set": "more", "entry": entry, "old": []}
    (out / MOVING).write_text(json.dumps(moving))
    said: list[str] = []
    pack_folder(image_folder, out, prefix="other", tell=said.append)
    assert "left the set 'more' incomplete" in said[0]
    assert set(read_sets(out)) == {"train", "other"}
    for broken in ("{", "[]", json.dumps({**moving, "old": ["../x"]})):
        (out / MOVING).write_text(broken)
        with one_writer(out, "test") as finished:
            assert finished == {}
        assert not (out / MOVING).exists()


def test_one_set_of_names_in_two_unicode_forms_has_one_numbering(noise_image, tmp_path):
    composed, apart = "na\u00efve", "nai\u0308ve"
    for folder, names in (("a", (composed, "zoo")), ("b", (apart,)), ("c", (composed, apart))):
        for i, name in enumerate(names):
            (tmp_path / folder / name).mkdir(parents=True)
            (tmp_path / folder / name / "0.jpg").write_bytes(noise_image(i))
    out = tmp_path / "out"
    assert pack_folder(tmp_path / "a", out).classes == (composed, "zoo")
    held_out = pack_folder(tmp_path / "b", out, prefix="test")
    assert held_out.classes == (composed, "zoo")
    assert [label for label, _ in content(held_out.pattern)] == [0]
    both = pack_folder(tmp_path / "c", out, prefix="both")
    assert [label for label, _ in content(both.pattern)] == [0, 0]
    assert "different Unicode forms: they are one class" in both.notes[0]

    # Manifests that were written with other forms are the same classes.
    sets = read_sets(out)
    sets["train"]["classes"] = [apart, "zoo"]
    write_sets(out, sets)
    with ShardSet.open(f"{out}/*.tar") as shards:
        assert shards.classes == (composed, "zoo")


@pytest.mark.parametrize(("name", "other"), [("Cat", "cat"), ("cat ", "cat")])
def test_names_that_differ_in_case_or_spaces_are_named(noise_image, tmp_path, name, other):
    for folder, classes in (("a", (other, "zoo")), ("b", (name,)), ("c", (name, other))):
        for one in classes:
            (tmp_path / folder / one).mkdir(parents=True)
            (tmp_path / folder / one / "0.jpg").write_bytes(noise_image(0))
    pack_folder(tmp_path / "a", tmp_path / "out")
    with pytest.raises(ValueError, match=f"'{name}' and '{other}' differ in case or spaces"):
        pack_folder(tmp_path / "b", tmp_path / "out", prefix="test")
    report = pack_folder(tmp_path / "c", tmp_path / "new")
    assert report.classes == tuple(sorted((name, other)))
    assert "differ in case or spaces alone: they are 2 classes" in report.notes[0]


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.long
def test_real_processes_killed_at_random_moments(image_folder, tmp_path):
    src = tmp_path / "src"
    for i in range(8):  # enough work for a kill to fall anywhere in it
        shutil.copytree(image_folder, src, dirs_exist_ok=True, copy_function=_renaming(i))
    expected = content(pack_folder(src, tmp_path / "undisturbed", shard_samples=5).pattern)
    program = (
        "import sys, pathlib, fastmoco_pipelines as p; print(flush=True); "
        "p.pack_folder(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), shard_samples=5)"
    )
    draw = random.Random(0)
    out = tmp_path / "out"
    for _ in range(15):
        child = subprocess.Popen([sys.executable, "-c", program, src, out], stdout=subprocess.PIPE)
        child.stdout.readline()
        time.sleep(draw.uniform(0, 0.8))
        child.kill()
        child.wait()
        if (out / NAME).exists() and not (out / MOVING).exists():
            assert content(f"{out}/train-*.tar") == expected
            shutil.rmtree(out)
    shutil.rmtree(out, ignore_errors=True)
    assert content(pack_folder(src, out, shard_samples=5).pattern) == expected


def _renaming(number: int) -> Callable[[str, str], str]:
    def copy(source: str, target: str) -> str:
        path = Path(target)
        return shutil.copy(source, path.with_name(f"{number}-{path.name}"))

    return copy
