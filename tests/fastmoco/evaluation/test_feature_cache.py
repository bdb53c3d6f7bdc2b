"""The parts of a set's features: what a kill leaves is used again, and nothing else is."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save
from torch import Tensor, nn

from fastmoco.errors import RunError
from fastmoco.evaluation import feature_cache
from fastmoco.evaluation.feature_cache import (
    FeatureCache,
    FeaturePart,
    embed_missing,
    encoder_digest,
    make_room,
    share_of,
)
from fastmoco_pipelines.files.small import UnfitFileError
from fastmoco_pipelines.loading.batch import EvalBatch

IMAGES = 37
BAD = {3, 8, 9, 10, 11, 30}
"""All of one batch of four among them."""


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of two batches of four images."""
    monkeypatch.setattr(feature_cache, "BATCH", 4)
    monkeypatch.setattr(feature_cache, "FEW_PARTS", 5)


def cache_in(folder: Path, **key: object) -> FeatureCache:
    ids = np.arange(IMAGES, dtype=np.int64) * 2
    return FeatureCache(folder, {"encoder": "a", **key}, sample_ids=ids, row_bytes=8)


class Loader:
    """Images that contain their number; it can be killed after some batches."""

    def __init__(self, batches: int | None = None) -> None:
        self.batches = batches
        self.read: list[int] = []

    def __call__(self, sample_ids: NDArray[np.int64]) -> Iterator[EvalBatch]:
        for number, start in enumerate(range(0, len(sample_ids), 4)):
            if number == self.batches:
                raise KeyboardInterrupt
            ids = sample_ids[start : start + 4]
            self.read += ids.tolist()
            ids = ids[[one not in {2 * bad for bad in BAD} for one in ids.tolist()]]
            if len(ids):
                images = torch.from_numpy(ids).float()[:, None]
                yield EvalBatch(images=images, labels=ids % 5, sample_ids=ids)


def encode(images: Tensor) -> Tensor:
    return torch.cat([images, images.square()], dim=1)


def test_all_images_that_decode_in_order(tmp_path: Path) -> None:
    cache = cache_in(tmp_path)
    cache.acquire()
    seen: list[tuple[int, int]] = []
    embed_missing(cache, encode, Loader(), progress=lambda *now: seen.append(now))
    found = cache.rows()
    ids = torch.tensor([2 * one for one in range(IMAGES) if one not in BAD])
    assert cache.parts == 5
    assert torch.equal(found.rows.block(0, len(found.rows)), encode(ids.float()[:, None]))
    assert found.sample_ids is not None
    assert torch.equal(found.sample_ids, ids)
    assert torch.equal(found.labels, ids % 5)
    assert seen[0] == (0, IMAGES)
    assert seen[-1] == (IMAGES, IMAGES)
    cache.remove()
    assert not list(tmp_path.parent.glob(f"{tmp_path.name}/*"))


def test_a_kill_loses_the_part_that_was_computed_and_no_other(tmp_path: Path) -> None:
    whole, cut = cache_in(tmp_path / "whole"), cache_in(tmp_path / "cut")
    whole.acquire()
    embed_missing(whole, encode, Loader())
    cut.acquire()
    with pytest.raises(KeyboardInterrupt):
        embed_missing(cut, encode, Loader(batches=7))
    cut.release()
    assert cut.finished() == [0, 1, 2]

    # What is left of a write is no part; a damaged part is computed again.
    (cut.path / ".part-000003.features.00000000.tmp").write_bytes(b"x")
    file = cut.path / "part-000001.features"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    again, loader = cache_in(tmp_path / "cut"), Loader()
    again.acquire()
    embed_missing(again, encode, loader)
    assert loader.read == [2 * one for one in (*range(8, 16), *range(24, IMAGES))]
    names = sorted(path.name for path in whole.path.iterdir())
    assert sorted(path.name for path in again.path.iterdir()) == names
    for name in names:
        assert (again.path / name).read_bytes() == (whole.path / name).read_bytes()


def test_another_key_has_other_parts_and_one_command_holds_a_cache(tmp_path: Path) -> None:
    cache, other = cache_in(tmp_path), cache_in(tmp_path, encoder="b")
    assert cache.path != other.path
    cache.acquire()
    other.acquire()
    with pytest.raises(RunError, match="another command computes these features"):
        cache_in(tmp_path).acquire()
    cache.remove()
    assert other.path.exists()
    part = FeaturePart(torch.ones(1, 2), torch.zeros(1).long(), torch.zeros(1).long())
    other.write(0, part)
    assert torch.equal(other.read(0).features, part.features)
    with pytest.raises(RunError, match="a folder that all of them see"):
        other.read(1)


def test_parts_are_those_of_the_set_and_not_of_the_processes() -> None:
    for ranks in (1, 2, 3, 7):
        shares = [share_of(5, rank, ranks) for rank in range(ranks)]
        assert [number for share in shares for number in share] == list(range(5))


def test_the_digest_of_an_encoder_sees_every_number() -> None:
    one, same = nn.Linear(2, 2), nn.Linear(2, 2)
    same.load_state_dict(one.state_dict())
    assert encoder_digest(one) == encoder_digest(same)
    with torch.no_grad():
        same.bias[0] += 1
    assert encoder_digest(one) != encoder_digest(same)


@pytest.mark.parametrize("what", ["link", "hard link", "pipe", "folder"])
def test_a_lock_that_is_no_file_is_refused_and_nothing_else_is_changed(
    tmp_path: Path, what: str
) -> None:
    precious = tmp_path / "precious"
    precious.write_text("all of it")
    cache = cache_in(tmp_path / "features")
    cache.path.mkdir(parents=True)
    lock = cache.path / "lock"
    if what == "pipe":
        os.mkfifo(lock)
    elif what == "folder":
        lock.mkdir()
    else:
        (lock.symlink_to if what == "link" else lock.hardlink_to)(precious)
    with pytest.raises(UnfitFileError, match=r"lock: (is a|has a second name)"):
        cache.acquire()
    assert precious.read_text() == "all of it"


@pytest.mark.parametrize("what", ["link", "pipe", "huge", "other tensors", "other shapes"])
def test_a_part_that_is_none_is_computed_again(tmp_path: Path, what: str) -> None:
    cache = cache_in(tmp_path)
    cache.acquire()
    embed_missing(cache, encode, Loader())
    part = sorted(cache.path.glob("part-*"))[1]
    before = part.read_bytes()
    part.unlink()
    if what == "link":
        part.symlink_to("/dev/zero")
    elif what == "pipe":
        os.mkfifo(part)
    elif what == "huge":
        part.touch()
        os.truncate(part, 1 << 40)
    else:
        rows = torch.zeros(3 if what == "other shapes" else 2, dtype=torch.int64)
        names = ("labels", "samples", "features")[: 3 if what == "other shapes" else 2]
        content = save({name: rows[: 2 + (name == "labels")].clone() for name in names})
        part.write_bytes(hashlib.sha256(content).digest() + content)
    embed_missing(cache, encode, Loader())
    assert part.read_bytes() == before
    cache.release()


def test_features_used_longest_ago_make_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not those that a process computes or reads, none of another name, and no link."""
    names = ("oldest", "worked", "shared", "second", "newest", "linked")
    caches = {name: cache_in(tmp_path, encoder=name) for name in names}
    for age, cache in enumerate(caches.values()):
        cache.acquire()
        embed_missing(cache, encode, Loader())
        cache.close()
        for path in (*cache.path.iterdir(), cache.path):
            os.utime(path, (1e9 + age, 1e9 + age))
    caches["linked"].path.rename(tmp_path / "elsewhere")
    caches["linked"].path.symlink_to(tmp_path / "elsewhere")
    classifiers, other = (
        tmp_path / "classifiers-0123456789abcdef",
        tmp_path / "0123456789abcdef.txt",
    )
    for file in (classifiers, other):
        file.write_bytes(b"0" * 100)
        os.utime(file, (1.0, 1.0))
    caches["worked"].acquire()
    caches["shared"].acquire()
    caches["shared"].release()
    for name in ("worked", "shared"):
        for path in (*caches[name].path.iterdir(), caches[name].path):
            os.utime(path, (1e9, 1e9))

    # 100 bytes and five caches; room for all, then for all but 300 bytes of them.
    size = sum(file.stat().st_size for file in caches["oldest"].path.iterdir())
    total = 100 + 5 * size
    whole = shutil.disk_usage(tmp_path)

    def usage(_: Path) -> object:
        left = sum(f.stat().st_size for p in caches.values() for f in p.path.glob("*"))
        left -= sum(f.stat().st_size for f in (tmp_path / "elsewhere").iterdir())
        left += 100 * classifiers.exists()
        return whole._replace(free=disk - left)

    monkeypatch.setattr("shutil.disk_usage", usage)
    disk = 2 * total
    assert make_room(tmp_path) == (0, 0)
    disk = 2 * (total - 300)
    assert make_room(tmp_path) == (2, 100 + size)
    gone = {classifiers, caches["oldest"].path}
    assert not any(path.exists() for path in gone)

    # None that is used, however short space is.
    disk = 0
    assert make_room(tmp_path) == (2, 2 * size)
    left = {caches[name].path for name in ("worked", "shared", "linked")}
    assert set(tmp_path.iterdir()) == {*left, tmp_path / "elsewhere", other}
    assert caches["worked"].finished() == caches["shared"].finished() == list(range(5))
    caches["worked"].close()
    caches["shared"].close()
    assert make_room(tmp_path)[0] == 2
    assert make_room(tmp_path / "none") == (0, 0)


def test_no_more_is_removed_where_the_system_counts_free_bytes_late(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is a file that was written since, or a folder of another kind."""
    states = [tmp_path / f"classifiers-{number:016x}" for number in range(5)]
    for age, file in enumerate(states):
        file.write_bytes(b"0" * 100)
        os.utime(file, (1e9 + age, 1e9 + age))
    (other := tmp_path / "0123456789abcdef" / "folder").mkdir(parents=True)
    os.utime(other.parent, (1.0, 1.0))
    asked = []

    def usage(folder: Path) -> object:
        asked.append(folder)
        if len(asked) == 2:
            os.utime(states[0], (2e9, 2e9))
        return whole._replace(free=300)

    whole = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", usage)
    assert make_room(tmp_path) == (1, 100)
    assert not states[1].exists()
    assert set(tmp_path.iterdir()) == {other.parent, states[0], *states[2:]}


def test_a_cache_is_begun_anew_while_it_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To remove a large one takes minutes. What a kill left of it goes the next time."""
    cache, again = cache_in(tmp_path), cache_in(tmp_path)
    cache.acquire()
    embed_missing(cache, encode, Loader())
    cache.close()
    remove = shutil.rmtree

    def killed(path: Path) -> None:
        again.acquire()
        embed_missing(again, encode, Loader())
        (path / "lock").unlink()
        raise OSError

    free = shutil.disk_usage(tmp_path)._replace(free=0)
    monkeypatch.setattr("shutil.disk_usage", lambda _: free)
    monkeypatch.setattr("shutil.rmtree", killed)
    assert make_room(tmp_path) == (0, 0)
    monkeypatch.setattr("shutil.rmtree", remove)
    assert len(list(tmp_path.iterdir())) == 2
    assert make_room(tmp_path)[0] == 1
    assert list(tmp_path.iterdir()) == [again.path]
    assert again.finished() == list(range(5))
    again.close()
