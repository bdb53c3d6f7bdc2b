"""Every way in which a server can fail: the same samples as without the fault, or an error that
names URL and cause, in time."""

from __future__ import annotations

import dataclasses
import re
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from fastmoco_pipelines.errors import RemoteError
from fastmoco_pipelines.sets.shard_set import ShardSet
from fastmoco_pipelines.spec import CacheSpec
from fastmoco_pipelines.stores import retries
from fastmoco_pipelines.stores.retries import Limits
from tests.pipelines.http_fault_server import (
    FaultServer,
    drip,
    drop,
    html,
    plain,
    redirect,
    serve,
    stall,
    status,
    wrong_range,
)

BAD = "train-000001.tar"
QUICK = Limits(deadline_seconds=120, attempts=4, first_delay_seconds=0.01, max_delay_seconds=0.05)
"""No pauses to speak of, for servers that answer: no try may end because a machine is loaded."""
HASTY = dataclasses.replace(
    QUICK,
    connect_seconds=1,
    respond_seconds=0.6,
    read_seconds=0.3,
    speed_seconds=0.3,
    min_bytes_per_s=2000,
    deadline_seconds=3,
)
"""For servers that hang for ever."""
AGAIN = dataclasses.replace(HASTY, deadline_seconds=120, attempts=100)
"""For servers that hang once: a try that a loaded machine makes too late is only made again."""


@pytest.fixture
def expected(packed):
    with ShardSet.open(str(packed)) as shards:
        return [data.tobytes() for data in shards.read(np.arange(len(shards)))]


def read_all(server: FaultServer, cache: Path, limits: Limits = QUICK) -> list[bytes]:
    """Every sample, in an order that changes shards often; then no thread may be left."""
    pattern = f"{server.url}/train-{{000000..000002}}.tar"
    with ShardSet.open(pattern, cache=CacheSpec(cache_dir=str(cache)), limits=limits) as shards:
        order = np.random.default_rng(0).permutation(len(shards))
        found = dict(
            zip(order.tolist(), (data.tobytes() for data in shards.read(order)), strict=True)
        )
    return [found[i] for i in range(len(found))]


def require_no_threads() -> None:
    until = time.monotonic() + 60
    while left := [
        thread.name for thread in threading.enumerate() if thread.name.startswith("fastmoco-")
    ]:
        assert time.monotonic() < until, left
        time.sleep(0.02)


HEALED = {
    "503 twice": [status(503), status(503)],
    "429 with a wish": [status(429, Retry_After=0)],
    "dropped in mid body": [drop(5000)],
    "dropped again and again": [drop(3000) for _ in range(6)],
    "dropped at a member boundary": [drop(3 * 512)],
    "dropped at a boundary, no length": [drop(3 * 512, sized=False)],
    "dropped in chunks": [drop(4096, sized=False, chunked=True)],
    "dropped before the first byte": [drop(0)],
    "stalled once": [stall(2000)],
    "no answer once": [stall(None)],
    "dripped once": [drip()],
    "head dripped once": [drip(head=True)],
    "page of a portal once": [html()],
    "page as long as the tar": [html(None)],
    "wrong bytes once": [plain(other=lambda data: data[:700] + b"\0" * 300 + data[1000:])],
    "resumed by a server without ranges": [drop(5000), plain(ranges=False)],
    "resumed at the wrong place, said": [drop(5000), wrong_range()],
    "resumed at the wrong place, unsaid": [drop(5000), wrong_range(honest=False)],
    "changed between, told": [drop(5000, tag='"old"'), serve],
    "changed between, untold": [
        drop(5000, tag='"old"'),
        lambda handler, data: ignore_if_range(handler, data),
    ],
    "no validator": [drop(5000, tag=""), plain(tag="")],
    "range refused": [drop(5000), status(416)],
}


HANGING = {"stalled once", "no answer once", "dripped once", "head dripped once"}
HANGING |= {"stalled for ever", "no answer for ever", "dripping for ever"}


def ignore_if_range(handler, data):
    del handler.headers["If-Range"]
    serve(handler, data)


@pytest.mark.parametrize("fault", HEALED)
def test_faults_that_pass_cost_nothing(fault, server, expected, tmp_path):
    server.script[BAD] = list(HEALED[fault])
    limits = AGAIN if fault in HANGING else QUICK
    assert read_all(server, tmp_path / "cache", limits) == expected
    assert not server.script[BAD]
    require_no_threads()


FATAL = {
    "404": (status(404), r"does not exist \(HTTP 404\)", 1),
    "403": (status(403), r"access is refused \(HTTP 403\).*signature", 1),
    "400": (status(400), r"HTTP 400", 1),
    "500 for ever": (status(500), r"HTTP 500; given up after 4 tries", 4),
    "stalled for ever": (
        stall(2000),
        r"(no answer in time|not complete in time|ended after).*; given up after",
        60,
    ),
    "no answer for ever": (stall(None), r"no answer in time|was lost", 8),
    "dripping for ever": (
        drip(),
        r"(bytes/s arrive|not complete in time|ended after).*; given up after",
        60,
    ),
    "short body": (
        plain(other=lambda data: data[:6000]),
        r"has 6000 bytes .*its index says \d+",
        3,
    ),
    "short body, no length": (
        lambda handler, data: drop(6000, sized=False)(handler, data[:6000]),
        r"is shorter than its index says",
        6,
    ),
    "long body": (
        plain(other=lambda data: data + b"x" * 512),
        r"has \d+ bytes .*its index says",
        3,
    ),
    "a page for ever": (html(100), r"has 100 bytes \(text/html: a web page instead of a tar\)", 3),
    "a page as long as the tar": (html(None), r"not what its index was made for", 3),
    "redirect to a file": (redirect("file:///etc/passwd"), r"redirects to 'file'.*refused", 1),
    "redirect to ftp": (redirect("ftp://127.0.0.1/x.tar"), r"redirects to 'ftp'.*refused", 1),
    "redirect nowhere": (redirect(""), r"redirects to", 1),
    "redirect in a circle": (redirect(f"/{BAD}"), "redirects more than 5 times", 6),
}


@pytest.mark.parametrize("fault", FATAL)
def test_faults_that_stay_are_named_in_time(fault, server, tmp_path):
    server.always[BAD], words, most = FATAL[fault]
    began = time.monotonic()
    with pytest.raises(RemoteError, match=words) as raised:
        read_all(server, tmp_path / "cache", HASTY if fault in HANGING else QUICK)
    assert f"{server.url}/{BAD}: " in str(raised.value)
    assert time.monotonic() - began < 90
    assert (
        1 <= server.count(BAD) <= 2 * most + 6
    )  # the thread that fetched ahead may have had its tries too
    require_no_threads()
    assert not list((tmp_path / "cache").glob("*.tar")) or all(
        path.stat().st_size != 0 for path in (tmp_path / "cache").glob("*.tar")
    )


def test_a_broken_download_is_taken_up_where_it_broke_off(server, expected, tmp_path):
    server.script[BAD] = [drop(5000), drop(4000)]
    assert read_all(server, tmp_path / "cache") == expected
    ranges = [(request[1], bool(request[2])) for request in server.requests if request[0] == BAD]
    assert ranges == [("", False), ("bytes=5000-", True), ("bytes=9000-", True)]


def test_a_server_that_is_not_there_is_named(tmp_path):
    with FaultServer(tmp_path) as server:
        url = f"{server.url}/train-000000.tar"
    with pytest.raises(
        RemoteError,
        match=r"http://127\.0\.0\.1:\d+/train-000000\.tar\.index: the connection failed",
    ):
        ShardSet.open(url, cache=CacheSpec(cache_dir=str(tmp_path / "cache")), limits=QUICK)


def test_a_host_that_does_not_answer_is_told_once_and_at_once(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(retries, "_told", set())  # an earlier server may have had the same port
    with FaultServer(tmp_path) as server:
        url = server.url.replace("://", "://user:Geheim123@")
    slow = dataclasses.replace(QUICK, first_delay_seconds=0.4, max_delay_seconds=0.4)
    ended = []
    for _ in range(2):
        with pytest.raises(RemoteError, match="given up after 4 tries"):
            ShardSet.open(
                f"{url}/train-00000{{0,1}}.tar",
                cache=CacheSpec(cache_dir=str(tmp_path / "cache")),
                limits=slow,
            )
        ended.append(time.time())
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.created < ended[0] - 0.5  # before the first of three pauses, 0.2 s each at least
    words = r"http://127\.0\.0\.1:\d+/\S+: the connection failed \(Connection refused\); trying again, up to 3 times"
    assert re.match(words, record.message)
    assert "Geheim123" not in record.message


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (
            status(404),
            r"HTTP 404.*every shard on a server needs its index beside it: run `fastmoco data index`",
        ),
        (html(100), r"is not an index of fastmoco"),
        (plain(other=lambda data: data[:-20]), r"has \d+ bytes instead of \d+"),
        (drop(100), r"ended after 100 of \d+ bytes; given up"),
        (status(500), r"HTTP 500; given up after 4 tries"),
    ],
)
def test_indexes_that_cannot_be_read_are_named(fault, words, server, tmp_path):
    server.always[f"{BAD}.index"] = fault
    with pytest.raises(RuntimeError, match=words) as raised:
        read_all(server, tmp_path / "cache")
    assert f"{server.url}/{BAD}.index: " in str(raised.value)
