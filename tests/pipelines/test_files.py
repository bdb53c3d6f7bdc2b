"""Locks on the files of the cache, where a file system gives them only on conditions."""

from __future__ import annotations

import errno
import fcntl
import os

import pytest

from fastmoco_pipelines.files import is_free, lock_path
from fastmoco_pipelines.spec import CacheSpec
from fastmoco_pipelines.stores.cache import ShardCache
from tests.pipelines.stores.test_cache import A, B, C, put


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_room_is_made_on_a_network_file_system(tmp_path, monkeypatch):
    """NFS refuses an exclusive lock (EBADF) to a descriptor that may not write."""
    flock, before = fcntl.flock, open_files()

    def of_nfs(descriptor: int, how: int) -> None:
        if how & fcntl.LOCK_EX and fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        flock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", of_nfs)
    cache = ShardCache.open(CacheSpec(folder=str(tmp_path / "cache"), size_gb=3000e-9))
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
