"""The shard cache: bounded, shared, never trusting what it has not checked; and what happens where
it cannot be used."""

from __future__ import annotations

import errno
import os
import shutil
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pytest

from fastmoco_pipelines.errors import NoRoomError, RemoteError
from fastmoco_pipelines.making.pack import pack_folder
from fastmoco_pipelines.sets.shard_set import ShardSet
from fastmoco_pipelines.spec import CacheSpec
from fastmoco_pipelines.stores import cache as cache_module
from fastmoco_pipelines.stores import transfer
from fastmoco_pipelines.stores.authorities import tls_context
from fastmoco_pipelines.stores.cache import ShardCache
from fastmoco_pipelines.stores.credentials import credentials_for
from fastmoco_pipelines.stores.proxies import proxy_of
from fastmoco_pipelines.stores.retries import Limits
from tests.pipelines.http_fault_server import FaultServer, plain
from tests.pipelines.stores.test_http_faults import QUICK, require_no_threads

PATTERN = "train-{000000..000002}.tar"
A, B, C = ("a" * 64, "b" * 64, "c" * 64)


@pytest.fixture
def expected(packed):
    with ShardSet.open(str(packed)) as shards:
        return [data.tobytes() for data in shards.read(np.arange(len(shards)))]


@pytest.fixture
def cache(tmp_path):
    return ShardCache.open(CacheSpec(cache_dir=str(tmp_path / "cache"), cache_size_gb=3000e-9))


def put(cache: ShardCache, key: str, size: int, keep: tuple[str, ...] = ()) -> None:
    part = cache.claim(key, size, keep)
    assert part is not None
    os.pwrite(part.descriptor, b"x" * size, 0)
    cache.finish(key, part)
    part.close()


def open_set(server: FaultServer, folder: Path, *, size_gb: float = 1) -> ShardSet:
    return ShardSet.open(
        f"{server.url}/{PATTERN}",
        cache=CacheSpec(cache_dir=str(folder), cache_size_gb=size_gb),
        limits=QUICK,
    )


def read_all(shards: ShardSet) -> list[bytes]:
    return [data.tobytes() for data in shards.read(np.arange(len(shards)))]


def test_what_was_used_longest_ago_goes_first(cache):
    for age, key in ((30, A), (20, B), (10, C)):
        put(cache, key, 900)
        os.utime(cache.folder / f"{key}.tar", (time.time() - age,) * 2)
    os.close(cache.lookup(A, 900))  # now the one used last
    put(cache, "d" * 64, 900)
    assert [cache.holds(key) for key in (A, B, C, "d" * 64)] == [True, False, True, True]
    assert cache.size() <= cache.limit


def test_what_is_in_use_or_wanted_is_never_evicted(cache):
    put(cache, A, 1400)
    put(cache, B, 1400)
    descriptor = cache.lookup(A, 1400)
    with pytest.raises(NoRoomError, match="all else in it is in use"):
        cache.claim(C, 1400, keep=[B])
    assert cache.holds(B)  # nothing is thrown away where it does not help
    assert not list(cache.folder.glob("*.part"))
    put(cache, C, 1400)
    assert [cache.holds(key) for key in (A, B, C)] == [True, False, True]
    with pytest.raises(NoRoomError):
        cache.claim(B, 3001)
    os.close(descriptor)
    put(cache, B, 3000)
    assert [cache.holds(key) for key in (A, B, C)] == [False, True, False]


def test_one_fetches_and_the_others_wait(cache):
    part = cache.claim(A, 1000)
    assert cache.claim(A, 1000) is None
    assert cache.size() == 1000  # what is on its way counts whole
    part.close()  # as when its owner dies
    again = cache.claim(A, 1000)
    assert again is not None
    again.close()


def test_a_part_is_taken_up_only_with_its_validator(cache):
    part = cache.claim(A, 1000)
    part.restart('"one"')
    os.pwrite(part.descriptor, b"x" * 400, 0)
    part.close()
    part = cache.claim(A, 1000)
    assert part.resume_point() == (400, '"one"')
    part.restart("")
    os.pwrite(part.descriptor, b"x" * 300, 0)
    assert part.resume_point() == (0, "")
    part.close()


def test_the_folder_belongs_to_one_user(tmp_path):
    ShardCache.open(CacheSpec(cache_dir=str(tmp_path / "new")))
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o700
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    (tmp_path / "link").symlink_to(tmp_path / "new")
    for name in ("open", "link"):
        with pytest.raises(ValueError, match=r"cache_dir=.*chmod 700"):
            ShardCache.open(CacheSpec(cache_dir=str(tmp_path / name)))


def test_the_default_folder_follows_xdg(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert ShardCache.open(CacheSpec()).folder == tmp_path / "fastmoco" / "shards"


def test_links_inside_are_not_followed(server, expected, tmp_path):
    folder, secret = tmp_path / "cache", tmp_path / "secret"
    with open_set(server, folder) as shards:
        assert read_all(shards) == expected
    secret.write_bytes(b"do not touch")
    for path in folder.glob("*.tar"):
        size = path.stat().st_size
        path.unlink()
        path.symlink_to(secret)
        for name in (f"{size}.part", "from"):
            path.with_suffix(f".{name}").unlink(
                missing_ok=True
            )  # of a transfer that closing cut short
            path.with_suffix(f".{name}").symlink_to(secret)
    with warnings.catch_warnings(), open_set(server, folder) as shards:
        warnings.simplefilter("error")  # they are no reason to do without the cache
        assert read_all(shards) == expected
    assert all(path.is_file() and not path.is_symlink() for path in folder.iterdir())
    assert secret.read_bytes() == b"do not touch"


def test_parts_of_killed_runs_are_checked_and_old_ones_removed(server, expected, tmp_path, packed):
    folder = tmp_path / "cache"
    with open_set(server, folder) as shards:
        read_all(shards)
    tars = sorted(folder.glob("*.tar"))
    tag = '"x"'
    for path, content in zip(
        tars,
        (b"\0" * 4000, tars[1].read_bytes()[:4000], bytes(tars[2].stat().st_size)),
        strict=True,
    ):
        size = path.stat().st_size
        path.unlink()
        path.with_name(f"{path.stem}.{size}.part").write_bytes(content)
        path.with_name(f"{path.stem}.from").write_text(tag)
    old = folder / f"{A}.5000.part"
    old.write_bytes(b"x" * 100)
    os.utime(old, (time.time() - 100_000,) * 2)
    with open_set(server, folder) as shards:
        assert not old.exists()
        assert read_all(shards) == expected
    require_no_threads()
    assert not [path for path in folder.iterdir() if path.suffix in (".part", ".from")]


def test_small_files_of_killed_writers_are_removed_once_they_are_old(tmp_path):
    spec = CacheSpec(cache_dir=str(tmp_path / "cache"), cache_size_gb=1)
    folder = ShardCache.open(spec).folder
    old, fresh, other = (
        folder / name
        for name in (f".{A}.doc.0123abcd.tmp", f".{A}.doc.4567cdef.tmp", ".notes.doc.0123abcd.tmp")
    )
    for path in (old, fresh, other):
        path.write_bytes(b"x")
    for path in (old, other):
        os.utime(path, (time.time() - 100_000,) * 2)
    ShardCache.open(spec)
    assert sorted(folder.iterdir()) == sorted([fresh, other])


def test_shards_of_one_name_do_not_mix(packed, image_folder, tmp_path):
    """Fault T24: another cache took the second shard for the first."""
    root = tmp_path / "root"
    shutil.copytree(packed, root / "one")
    pack_folder(image_folder, root / "two", shard_samples=16, seed=1)
    with FaultServer(root) as server:
        for name in ("one", "two", "one"):
            spec = CacheSpec(cache_dir=str(tmp_path / "cache"))
            with (
                ShardSet.open(f"{server.url}/{name}/{PATTERN}", cache=spec, limits=QUICK) as shards,
                ShardSet.open(str(root / name)) as local,
            ):
                assert read_all(shards) == read_all(local)
        before = len(server.requests)
        shutil.rmtree(root / "one")  # a new state under the old name
        pack_folder(image_folder, root / "one", shard_samples=16, seed=2)
        url = f"{server.url}/one/{PATTERN}"
        with (
            ShardSet.open(url, cache=spec, limits=QUICK) as shards,
            ShardSet.open(str(root / "one")) as local,
        ):
            assert read_all(shards) == read_all(local)
        assert sum(name.endswith(".tar") for name, _, _ in server.requests[before:]) == 3
    assert len(list((tmp_path / "cache").glob("*.tar"))) == 9


def test_damaged_and_vanished_copies_are_fetched_again(server, expected, tmp_path):
    folder = tmp_path / "cache"
    patient = Limits(
        first_delay_seconds=0.01
    )  # a try that a loaded machine makes too late would count as a request
    shards = ShardSet.open(
        f"{server.url}/{PATTERN}", cache=CacheSpec(cache_dir=str(folder)), limits=patient
    )
    assert read_all(shards) == expected
    for path in folder.glob("*.tar"):
        raw = bytearray(path.read_bytes())
        raw[700:-700] = bytes(len(raw) - 1400)
        path.write_bytes(raw)
    assert read_all(shards) == expected
    for path in folder.glob("*.tar"):
        path.unlink()
    assert read_all(shards) == expected  # what is open stays readable
    shards.close()
    assert read_all(shards) == expected
    for path in folder.glob("*.tar"):
        os.truncate(path, 100)
    shards.close()
    assert read_all(shards) == expected
    shards.close()
    assert 4 <= server.count("train-000001.tar") <= 6  # fetched ahead or not


def test_without_a_cache_samples_are_read_one_by_one(server, expected, tmp_path):
    """Fault T25: a folder that cannot be made or written."""
    (tmp_path / "file").touch()
    with pytest.warns(RuntimeWarning, match=r"the shard cache cannot be used .*--data\.cache-dir"):
        shards = open_set(server, tmp_path / "file" / "cache")
    with shards:
        assert read_all(shards) == expected
    assert {request[1][:6] for request in server.requests if request[0].endswith(".tar")} == {
        "bytes="
    }
    server.always["train-000001.tar"] = plain(ranges=False)
    with pytest.warns(RuntimeWarning):
        shards = open_set(server, tmp_path / "file" / "cache")
    words = r"000001\.tar: its server ignores Range requests.*--data\.cache-dir"
    with shards, pytest.raises(RuntimeError, match=words):
        read_all(shards)


@pytest.mark.parametrize(
    "what", ["no room on the disk", "write fails", "folder is read-only", "shard larger than it"]
)
def test_a_full_cache_costs_time_alone(what, server, expected, tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    shards = open_set(server, folder, size_gb=1e-6 if what == "shard larger than it" else 1)

    def fail(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    if what == "no room on the disk":
        usage = shutil._ntuple_diskusage(100, 100, 0)
        monkeypatch.setattr(cache_module.shutil, "disk_usage", lambda path: usage)
    elif what == "write fails":
        monkeypatch.setattr(transfer.os, "pwrite", fail)
    elif what == "folder is read-only":
        monkeypatch.setattr(cache_module, "try_lock", fail)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with shards:
            assert read_all(shards) == expected
            assert read_all(shards) == expected
    assert len([w for w in caught if "read from the server one by one" in str(w.message)]) == 1
    require_no_threads()
    assert not [path for path in folder.iterdir() if path.suffix in (".tar", ".part")]


@pytest.mark.filterwarnings("error")
def test_a_cache_smaller_than_the_set_keeps_its_limit(server, expected, tmp_path, packed):
    largest = max(path.stat().st_size for path in packed.glob("*.tar"))
    indexes = sum(path.stat().st_size + 100 for path in packed.iterdir() if path.suffix != ".tar")
    shards = open_set(server, tmp_path / "cache", size_gb=(2 * largest + indexes) / 1e9)
    cache = ShardCache.open(
        CacheSpec(cache_dir=str(tmp_path / "cache"), cache_size_gb=(2 * largest + indexes) / 1e9)
    )
    most, stop = [0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.001):
            most[0] = max(most[0], cache.size())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        with shards:
            for _ in range(3):
                for ids in np.array_split(np.arange(45), 9):
                    assert [data.tobytes() for data in shards.read(ids)] == [
                        expected[i] for i in ids
                    ]
    finally:
        stop.set()
        watcher.join()
    assert largest < most[0] <= cache.limit


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero"), Path.mkdir])
def test_what_is_no_file_in_the_cache_is_not_waited_for(cache, make):
    for name in (f"{A}.tar", f"{A}.doc", f"{A}.10.part", f"{A}.from"):
        make(cache.folder / name)
    assert cache.lookup(A, 10) is None
    assert cache.read_document(A) == ("", b"")
    assert cache.map_document(A) is None
    if make is Path.mkdir:  # nothing is removed with what may be in it
        with pytest.raises(NoRoomError, match=rf"{A}\.10\.part: is a folder"):
            cache.claim(A, 10)
        return
    part = cache.claim(A, 10)
    assert part.resume_point() == (0, "")
    os.pwrite(part.descriptor, b"x", 0)
    assert part.resume_point() == (0, "")
    part.close()


@pytest.mark.parametrize(("variable", "words"), [("HF_TOKEN_PATH", "token"), ("NETRC", "netrc")])
def test_credentials_that_are_no_file_are_said_and_not_waited_for(
    tmp_path, caplog, variable, words
):
    os.mkfifo(tmp_path / "secret")
    environment = {variable: str(tmp_path / "secret"), "HOME": str(tmp_path)}
    url = "https://huggingface.co/x.tar"
    assert credentials_for(url, url, environment).headers == {}
    assert "secret: is a named pipe where a file is due" in caplog.text
    assert words in caplog.text


def test_no_netrc_file_is_said_by_the_null_device(tmp_path, caplog):
    url = "https://host/x.tar"
    environment = {"NETRC": os.devnull, "HOME": str(tmp_path)}
    assert credentials_for(url, url, environment).headers == {}
    assert caplog.text == ""


@pytest.mark.parametrize(
    "environment", [{}, {"HF_TOKEN_PATH": "~nobody_here/token", "NETRC": "~nobody_here/netrc"}]
)
def test_a_user_without_a_home_folder_has_no_credentials_there(monkeypatch, environment):
    def no_entry(user):
        raise KeyError(user)

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", no_entry)
    url = "https://huggingface.co/x.tar"
    assert credentials_for(url, url, environment).headers == {}


@pytest.mark.parametrize("value", ["http://[", "http://a\u2100b/"])
def test_an_endpoint_that_is_no_url_is_refused_by_name(value):
    url = "https://host/x.tar"
    with pytest.raises(RemoteError, match="HF_ENDPOINT: its value is not a URL"):
        credentials_for(url, url, {"HF_ENDPOINT": value})


def test_a_port_of_no_proxy_that_is_no_port_is_passed_over():
    environment = {"https_proxy": "http://proxy:1", "no_proxy": f"host:{'9' * 5000}"}
    assert proxy_of("https", "host", 443, environment) is not None


@pytest.mark.parametrize("variable", ["SSL_CERT_FILE", "FASTMOCO_CLIENT_CERT"])
def test_certificates_that_are_no_file_are_not_waited_for(tmp_path, variable):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(RemoteError, match=f"{variable}="):
        tls_context(((variable, str(tmp_path / "pipe")),))
