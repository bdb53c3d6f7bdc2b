"""A new store is one class and one row: this file holds the whole of one, which serves files from a
dictionary."""

from __future__ import annotations

import fnmatch
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from fastmoco_pipelines import text
from fastmoco_pipelines.errors import AbsentError, PassingError, RemoteError
from fastmoco_pipelines.loading.loader import build_loader
from fastmoco_pipelines.sets.patterns import is_remote
from fastmoco_pipelines.sets.remote_set import SmallFiles, find_urls
from fastmoco_pipelines.sets.shard_set import ShardSet
from fastmoco_pipelines.spec import CacheSpec, LoaderSpec
from fastmoco_pipelines.stores import Body, Request, Store, register
from fastmoco_pipelines.text import redact
from tests.pipelines.stores.test_http import require_equal
from tests.pipelines.stores.test_http_faults import QUICK

SECRET = "Geheim123"


class ToyStore(Store):
    """Files by name, as `bucket/name`."""

    lists = True

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self.asked: list[Request] = []
        self.failures = 1

    @contextmanager
    def open(self, request: Request) -> Iterator[Body]:
        self.asked.append(request)
        name = request.url.partition("://")[2].partition("?")[0]
        if name not in self.files:
            raise AbsentError(f"{redact(request.url)}: does not exist")
        if name.endswith(".tar") and self.failures:
            self.failures -= 1
            raise PassingError(f"{redact(request.url)}: the toy is out of order")
        data = self.files[name]
        validator = hashlib.sha256(data).hexdigest()
        same = request.known == validator
        chunks = iter(()) if same else iter([data[request.start : request.stop]])
        yield Body(
            start=request.start,
            total=len(data),
            validator=validator,
            kind="toy",
            chunks=chunks,
            unchanged=same,
        )

    def find(self, url: str, limits) -> list[str]:
        del limits
        pattern = url.partition("://")[2]
        return sorted(f"toy://{name}" for name in self.files if fnmatch.fnmatch(name, pattern))


@pytest.fixture
def store(packed):
    store = ToyStore({f"set/{path.name}": path.read_bytes() for path in packed.iterdir()})
    register("toy", store)
    yield store
    del text.STORES["toy"]


@pytest.fixture
def cache(tmp_path):
    return CacheSpec(cache_dir=str(tmp_path / "cache"))


@pytest.mark.parametrize(
    "pattern", ["toy://set/", "toy://set/train-*.tar", "toy://set/train-{000000..000002}.tar"]
)
def test_the_patterns_of_a_registered_scheme_are_read(pattern, store, cache, packed):
    with (
        ShardSet.open(pattern, cache=cache, limits=QUICK) as shards,
        ShardSet.open(str(packed)) as local,
    ):
        require_equal(shards, local)
    tars = [request for request in store.asked if request.url.endswith(".tar")]
    assert len(tars) == 3 + 1, "each tar once, and one more try where the first one failed"


def test_a_glob_is_resolved_by_the_store(store, packed):
    assert find_urls("toy://set/*0[12].tar", SmallFiles(None, QUICK)) == [
        f"toy://set/train-00000{number}.tar" for number in (1, 2)
    ]
    assert not store.asked


def test_a_loader_delivers_from_it_what_it_delivers_from_local_files(store, cache, packed):
    def batches(shards: str) -> list[np.ndarray]:
        size = cache.cache_size_gb
        spec = LoaderSpec(
            shards=shards,
            global_batch_size=12,
            threads=1,
            shuffle_window=0,
            cache_dir=cache.cache_dir,
            cache_size_gb=size,
        )
        with build_loader(spec) as loader:
            return [
                array
                for _ in range(2)
                for batch in [loader.next()]
                for array in (batch.sample_ids, batch.views[0])
            ]

    assert all(
        np.array_equal(a, b)
        for a, b in zip(batches("toy://set/"), batches(str(packed)), strict=True)
    )


def test_the_secrets_of_its_urls_are_hidden(store, cache):
    for pattern in (f"toy://user:{SECRET}@set/train-*.tar", f"toy:/user:{SECRET}@set/train-*.tar"):
        with pytest.raises(ValueError, match="toy:") as raised:
            ShardSet.open(pattern, cache=cache, limits=QUICK)
        assert SECRET not in str(raised.value)
    with pytest.raises(RemoteError, match=r"toy://set/absent\.tar\.index") as absent:
        SmallFiles(None, QUICK)._parsed(f"toy://set/absent.tar.index?token={SECRET}", bytes)
    assert SECRET not in str(absent.value)
    with pytest.raises(
        NotImplementedError, match=r"ToyStore does not list toy://set/\*\.tar"
    ) as unlisted:
        Store.find(store, f"toy://user:{SECRET}@set/*.tar?{SECRET}", QUICK)
    assert SECRET not in str(unlisted.value)
    braces = f"{{toy://u:{SECRET}@h:1,http://v:{SECRET}@i:2}}/b.tar?{SECRET}"
    assert redact(braces) == "{toy://h:1,http://i:2}/b.tar"


def test_without_its_row_a_scheme_is_refused(store):
    assert is_remote("toy://set/train-000000.tar")
    with pytest.raises(
        ValueError, match=r"reading over toys is not supported yet: .* gs:// or toy://, or copy"
    ):
        is_remote("toys://set/train-000000.tar")
    assert redact("toys:u:p") == "toys:u:p"


@pytest.mark.parametrize(
    ("scheme", "words"), [("toy", "has a store already"), ("c", "two letters"), ("file", "file")]
)
def test_a_row_is_added_once_and_named_well(scheme, words, store):
    with pytest.raises(ValueError, match=words):
        register(scheme, store)
