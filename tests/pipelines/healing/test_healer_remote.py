"""A loader that heals itself over shards of a server: damage there costs samples, and failures that
stay are named."""

from __future__ import annotations

import errno
import os
import re

import numpy as np
import pytest
import torch

from fastmoco_pipelines.errors import TooManyBadSamplesError
from fastmoco_pipelines.healing import healer
from fastmoco_pipelines.loading.loader import build_loader
from fastmoco_pipelines.sampling.order import epoch_order
from tests.pipelines.damage import damaged_copy, place_of
from tests.pipelines.healing.test_healer import assert_same, spec_of, take
from tests.pipelines.http_fault_server import plain, status
from tests.pipelines.stores.test_http_faults import QUICK

FIRST = epoch_order(7, 0, 45)


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(healer, "PATIENCE", (0.02,))
    monkeypatch.setattr("fastmoco_pipelines.sets.shard_set.Limits", lambda: QUICK)


def options(tmp_path, **more) -> dict:
    return {"cache_dir": str(tmp_path / "cache"), "cache_size_gb": 0.01, "shuffle_window": 0} | more


@pytest.mark.parametrize("manifest", [True, False])
def test_wrong_bytes_for_ever_cost_their_samples_alone(packed, server, tmp_path, manifest):
    """With a manifest the whole tar's SHA-256 is wrong, without one a sample's crc32: either way
    one sample is."""
    clean = take(packed, 3)
    victim = int(FIRST[14])
    tar, _, offset, size = place_of(packed, victim)
    middle = offset + size // 2
    server.always[tar.name] = plain(
        other=lambda data: data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
    )
    if not manifest:
        server.always["manifest.json"] = status(404)
    url = f"{server.url}/train-{{000000..000002}}.tar"
    told: list[str] = []
    with build_loader(spec_of(url, **options(tmp_path))) as loader:
        loader.report = told.append
        got = [loader.next() for _ in range(3)]
        assert loader.figures().left_out == 1
    assert [text for text in told if "its bytes differ from the index (crc32) (1 so far)" in text]
    keep = torch.from_numpy(clean[1].sample_ids != victim)
    assert int((~keep).sum()) == 1
    assert torch.equal(got[1].views[0][keep], clean[1].views[0][keep])
    assert_same(got[0], clean[0])
    assert_same(got[2], clean[2])
    # The same stand-in as a local copy of the set with that damage gives.
    local = damaged_copy(packed, tmp_path / "local", {victim: "changed"})
    assert np.array_equal(take(local, 3)[1].sample_ids, got[1].sample_ids)


def test_a_shard_that_the_server_has_lost_is_named(server, tmp_path):
    server.always["train-000001.tar"] = status(404)
    url = f"{server.url}/train-{{000000..000002}}.tar"
    with (
        build_loader(spec_of(url, **options(tmp_path))) as loader,
        pytest.raises(TooManyBadSamplesError) as raised,
    ):
        list(loader)
    assert "16 of 45 images cannot be used, 10 are allowed" in str(raised.value)
    assert (
        f"train-000001.tar: all of it (unreadable: {server.url}/train-000001.tar: does not exist"
        in str(raised.value)
    )


def test_a_cache_whose_disk_gives_up_costs_no_sample(packed, server, tmp_path, monkeypatch):
    clean, pread = take(packed, 3), os.pread

    def fail(descriptor: int, size: int, offset: int) -> bytes:
        if re.search(r"/cache/\w{64}\.tar$", os.readlink(f"/proc/self/fd/{descriptor}")):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return pread(descriptor, size, offset)

    monkeypatch.setattr(os, "pread", fail)
    with build_loader(spec_of(f"{server.url}/", **options(tmp_path))) as loader:
        for wanted in clean:
            assert_same(loader.next(), wanted)
        assert loader.figures().left_out == 0
