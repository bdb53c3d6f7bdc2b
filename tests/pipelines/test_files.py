"""Files written whole or not at all, their hashes, and locks where a file system gives them only on
conditions."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import stat

import pytest

from fastmoco_pipelines.files.whole import (
    hash_file,
    is_free,
    lock_path,
    whole_file,
    write_file,
    write_new_file,
)
from fastmoco_pipelines.spec import CacheSpec
from fastmoco_pipelines.stores.cache import ShardCache
from tests.pipelines.stores.test_cache import A, B, C, put


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_room_is_made_on_a_network_file_system(tmp_path, monkeypatch):
    """NFS refuses an exclusive lock (EBADF) to a descriptor that may not write."""
    flock, before = fcntl.flock, open_files()

    def of_nfs(descriptor: int, how: int) -> None:
        if (
            how & fcntl.LOCK_EX
            and fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
        ):
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        flock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", of_nfs)
    cache = ShardCache.open(CacheSpec(cache_dir=str(tmp_path / "cache"), cache_size_gb=3000e-9))
    for key in (A, B, C):
        put(cache, key, 1400)
    assert sum(cache.holds(key) for key in (A, B, C)) == 2
    part = cache.claim("d" * 64, 100)
    assert part is not None
    part.close()
    assert cache.size() == 2800  # a part that nobody writes counts as it is
    assert open_files() == before


def test_a_file_system_without_locks_leaks_no_descriptor(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.touch()
    before = open_files()

    def none(descriptor: int, how: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", none)
    for ask in (lock_path, is_free):
        with pytest.raises(OSError, match="locks"):
            ask(str(path))
    assert open_files() == before


def test_a_file_is_replaced_in_one_go_or_stays_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "file"
    assert write_file(path, b"old", mode=0o600) == path
    assert stat.S_IMODE(path.stat().st_mode) == 0o600

    def break_off():
        with whole_file(path) as fresh:
            fresh.write_bytes(b"a part of the n")
            raise RuntimeError("no room")

    with pytest.raises(RuntimeError, match="no room"):
        break_off()
    assert path.read_bytes() == b"old"

    seen = []
    plain = os.replace
    monkeypatch.setattr(
        os, "replace", lambda old, new: (seen.append(path.read_bytes()), plain(old, new))
    )
    write_file(path, b"new")
    assert seen == [b"old"]
    assert path.read_bytes() == b"new"
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("durable", [True, False])
def test_the_bytes_are_on_the_disk_before_a_durable_file_has_its_name(
    tmp_path, monkeypatch, durable
):
    path, order = tmp_path / "file", []
    flush, replace = os.fsync, os.replace
    monkeypatch.setattr(
        os, "fsync", lambda file: (order.append(f"flush {os.fstat(file).st_size}"), flush(file))
    )
    monkeypatch.setattr(os, "replace", lambda old, new: (order.append("name"), replace(old, new)))
    write_file(path, b"12345", durable=durable)
    assert order == (["flush 5", "name"] if durable else ["name"])


def test_a_whole_file_is_hashed_wherever_its_descriptor_stands(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * 5000)
    expected = hashlib.sha256(path.read_bytes()).hexdigest()
    with open(path, "rb") as file:
        file.seek(1000)
        assert hash_file(path) == hash_file(file.fileno()) == expected
        os.fstat(file.fileno())  # still open


def test_a_new_file_replaces_nothing_but_the_state_it_is_to_replace(tmp_path, monkeypatch):
    path = tmp_path / "x"
    assert write_new_file(path, b"first")
    assert not write_new_file(path, b"second")
    state = path.stat()
    assert write_new_file(path, b"third", replaces=state)
    assert not write_new_file(path, b"fourth", replaces=state)
    assert path.read_bytes() == b"third"

    # A file system without links.
    def refuse(*names):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(PermissionError):
        write_new_file(path, b"fifth", replaces=state)
    assert path.read_bytes() == b"third"
    assert os.listdir(tmp_path) == ["x"]
