"""The indexes of shards on a server: either form, kept in the cache, and as they were when the set
was opened."""

from __future__ import annotations

import json
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fastmoco_pipelines.errors import LostIndexError, ShardError, StoppedError
from fastmoco_pipelines.formats.index import (
    build_index,
    index_path,
    json_path,
    read_index,
    write_index,
    write_json_index,
)
from fastmoco_pipelines.sets.shard_set import ShardSet
from fastmoco_pipelines.spec import CacheSpec
from fastmoco_pipelines.stores.retries import Limits
from tests.pipelines.http_fault_server import FaultServer, stall
from tests.pipelines.stores.test_http_faults import HASTY, QUICK

PATTERN = "train-{000000..000002}.tar"
TAR = "train-000001.tar"


@pytest.fixture
def folder(packed, tmp_path):
    folder = Path(shutil.copytree(packed, tmp_path / "set"))
    (folder / "manifest.json").unlink()  # its checksums are not what is tested
    return folder


@pytest.fixture
def server(folder):
    with FaultServer(folder) as server:
        yield server


def opened(server, tmp_path, limits: Limits = QUICK) -> ShardSet:
    cache = CacheSpec(cache_dir=str(tmp_path / "cache"))
    return ShardSet.open(f"{server.url}/{PATTERN}", cache=cache, limits=limits)


def to_json(folder: Path, **columns) -> None:
    """Leave the JSON form alone, with other columns."""
    for tar in folder.glob("*.tar"):
        index = read_index(tar)
        index = replace(index, columns=index.columns | {k: [v] * 16 for k, v in columns.items()})
        index = replace(
            index, columns={k: column[: len(index)] for k, column in index.columns.items()}
        )
        write_json_index(tar, index)
        index_path(tar).unlink(missing_ok=True)


def test_the_json_form_is_read_where_there_is_no_other(server, folder, packed, tmp_path):
    to_json(folder)
    with opened(server, tmp_path) as shards, ShardSet.open(str(packed)) as local:
        assert shards.digest == local.digest
        assert [data.tobytes() for data in shards.read(np.arange(45))] == [
            data.tobytes() for data in local.read(np.arange(45))
        ]
        assert shards.keys == local.keys
    before = server.count("train-000000.tar.index.json")
    with opened(server, tmp_path) as shards:  # now from the cache, in the binary form
        assert len(shards.labels) == 45
    assert server.count("train-000000.tar.index.json") == before + 1  # "unchanged"


def test_a_binary_form_that_is_gone_does_not_hide_the_json_form(server, folder, tmp_path):
    opened(server, tmp_path).close()
    to_json(folder, label=7)
    for _ in range(2):
        with opened(server, tmp_path) as shards:
            assert set(shards.labels.tolist()) == {7}


def test_a_copy_that_the_disk_has_damaged_is_fetched_again(server, tmp_path):
    with opened(server, tmp_path) as shards:
        expected = shards.digest
        for path in (tmp_path / "cache").glob("*.doc"):
            data = bytearray(path.read_bytes())
            data[-90] ^= 1  # of a name
            data[-500] ^= 1  # of a record or a name
            path.write_bytes(data)
        assert len(shards.labels) == 45
    with opened(server, tmp_path) as shards:
        assert shards.digest == expected


def test_another_index_on_the_server_is_noticed_and_its_checksums_are_not_used(
    server, folder, tmp_path
):
    shards = opened(server, tmp_path)
    for path in (tmp_path / "cache").glob("*.doc"):
        path.unlink()
    tar = folder / "train-000000.tar"
    index = read_index(tar)
    index.columns["label"][3] += 1
    write_index(tar, index)
    with shards, pytest.raises(LostIndexError, match=r"tar\.index: was replaced while the set"):
        shards.labels_of(np.array([0]))
    with pytest.raises(RuntimeError, match="was replaced"):
        shards._files._fetcher._state.shards[0].rows()
    with opened(server, tmp_path) as shards:
        assert shards.labels[3] == index.columns["label"][3]


def test_a_server_that_fails_costs_the_shards_whose_index_is_not_there(server, tmp_path):
    shards = opened(server, tmp_path, HASTY)
    for path in (tmp_path / "cache").glob("*.doc"):
        path.unlink()
    server.always["train-000001.tar.index"] = stall(10)
    with shards:
        found = shards.read_each(np.array([0, 16, 40]))
    assert [isinstance(data, LostIndexError) for data in found] == [False, True, False]


def test_cancelling_ends_the_transfer_of_an_index(server, tmp_path):
    shards = opened(server, tmp_path, HASTY)
    for path in (tmp_path / "cache").glob("*.doc"):
        path.unlink()
    server.always["train-000001.tar.index"] = stall(10)
    threading.Timer(0.3, shards.cancel).start()
    with pytest.raises((StoppedError, LostIndexError)):
        shards.labels_of(np.array([20]))
    shards.close()
    server.always.clear()
    assert len(shards.read(np.array([20]))) == 1
    shards.close()


def test_without_a_cache_indexes_are_held(server, tmp_path, recwarn):
    (tmp_path / "file").write_text("no folder")
    cache = CacheSpec(cache_dir=str(tmp_path / "file" / "cache"))
    with ShardSet.open(f"{server.url}/{PATTERN}", cache=cache, limits=QUICK) as shards:
        count = server.count("train-000000.tar.index")
        assert len(shards.labels) == 45
        assert server.count("train-000000.tar.index") == count
    assert [str(warning.message) for warning in recwarn if "cannot be used" in str(warning.message)]


def test_a_conversion_leaves_the_folder_of_a_server_alone(server, folder, tmp_path):
    to_json(folder)
    opened(server, tmp_path).close()
    assert not [path for path in folder.glob("*.tar") if index_path(path).exists()]
    assert all(json_path(path).exists() for path in folder.glob("*.tar"))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("manifest.json", b'{"a":' * 200_000, r"manifest\.json: is not valid JSON .*deeper"),
        ("manifest.json", b"\xff", r"manifest\.json: .*0xff is not UTF-8"),
        ("manifest.json", "shards", r"shard 0: name='\.\./x\.tar' is not the name of a file"),
        ("manifest.json", 3000, r"manifest\.json: is larger than 2000 bytes"),
        (f"{TAR}.index", 3000, r"index: is larger than 2000 bytes"),
        (f"{TAR}.index.json", b"[" * 200_000, r"json: is not valid JSON .*deeper"),
        (f"{TAR}.index.json", 3000, r"json: is larger than 2000 bytes"),
    ],
    ids=["deep", "no text", "a path", "large", "large index", "deep index", "large JSON"],
)
def test_documents_of_a_server_keep_the_limits_of_local_ones(
    folder, server, tmp_path, monkeypatch, name, content, words
):
    if content == "shards":
        sets = {"train": {"classes": [], "shards": [{"name": "../x.tar"}]}}
        text = {"format": "fastmoco-manifest", "version": 1, "sets": sets}
        content = json.dumps(text).encode()
    if isinstance(content, int):
        content = b" " * content
        for limit in ("MAX_INDEX_BYTES", "MAX_JSON_BYTES", "MAX_MANIFEST_BYTES"):
            monkeypatch.setattr(f"fastmoco_pipelines.sets.remote_set.{limit}", 2000)
    if name.endswith("json"):
        index_path(folder / TAR).unlink()
    (folder / name).write_bytes(content)
    if name == "manifest.json":
        write_index(folder / TAR, build_index(folder / TAR))
    with pytest.raises(ShardError, match=words):
        opened(server, tmp_path)
