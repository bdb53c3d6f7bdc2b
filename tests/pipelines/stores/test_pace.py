"""How many transfers go on at once: by a clock of the test's own, and against a server that counts
them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fastmoco_pipelines.errors import BusyError, PassingError
from fastmoco_pipelines.making.pack import pack_folder
from fastmoco_pipelines.sets.shard_set import ShardSet
from fastmoco_pipelines.spec import CacheSpec, LoaderOptions
from fastmoco_pipelines.stores import object_store
from fastmoco_pipelines.stores.pace import START, Pace
from tests.pipelines.http_fault_server import FaultHandler, FaultServer
from tests.pipelines.stores.test_http_faults import QUICK

RESET = PassingError("the connection failed")


class World:
    """A server that answers each transfer after 0.2 s, up to a number at once, and a clock."""

    def __init__(self, limit: int, most: int = 32) -> None:
        self.now = 100.0
        self.limit = limit
        self.pace = Pace(most, lambda: self.now)
        self.ends = 0.0

    def run(self, seconds: float, *, failing: float = 0.0) -> int:
        """Let the loader wait for shards meanwhile; returns the number at the end."""
        return self._run(seconds, failing, waits=True)

    def rest(self, seconds: float) -> int:
        """The same, while nobody waits."""
        return self._run(seconds, 0.0, waits=False)

    def _run(self, seconds: float, failing: float, *, waits: bool) -> int:
        def go_on() -> None:
            for _ in range(round(seconds / 0.05)):
                self.now += 0.05
                before = self.ends
                self.ends += min(self.pace.width, self.limit) * 0.05 / 0.2
                for number in range(int(before), int(self.ends)):
                    if failing and number % round(1 / failing) == 0:
                        self.pace.failed(RESET)
                    else:
                        self.pace.arrived(1000)
                        self.pace.ended()

        if waits:
            with self.pace.waiting():
                go_on()
        else:
            go_on()
        return self.pace.width


@pytest.mark.parametrize(("limit", "least", "most"), [(1000, 32, 32), (4, 1, 8), (12, 8, 17)])
def test_as_many_as_bring_more_bytes(limit, least, most):
    world = World(limit)
    assert world.pace.width == START
    assert least <= world.run(30) <= most
    assert least <= world.run(30) <= most


def test_a_hard_limit_and_one_below_the_start():
    assert World(1000, most=6).run(60) == 6
    assert World(1000, most=2).run(60) == 2


def test_nobody_waits_so_it_does_not_rise_and_falls_slowly():
    assert World(1000).rest(60) == START
    world = World(1000)
    assert world.run(20) == 32
    assert 20 < world.rest(60) < 32
    assert world.rest(600) == START


def test_resets_neither_raise_it_without_bound_nor_stop_it():
    assert World(1000).run(30, failing=0.05) == 32
    world = World(12)
    assert 8 <= max(world.run(5, failing=0.05) for _ in range(12)) <= 20
    assert World(1000).run(30, failing=0.5) < START  # a server that refuses every second one


def test_a_server_that_asks_for_fewer_gets_fewer_for_as_long_as_it_says():
    world = World(1000)
    assert world.run(20) == 32
    for _ in range(20):  # the answers to one burst count once
        world.pace.failed(BusyError("HTTP 429", 30))
    assert world.pace.width == 16
    assert world.run(25) == 16
    assert 16 < world.run(15) <= 32
    world.pace.failed(BusyError("HTTP 503"))
    assert world.pace.width <= 16
    for _ in range(10):
        world.now += 1
        world.pace.failed(BusyError("HTTP 503"))
    assert world.pace.width == 1


def test_a_cache_without_room_gets_one_less():
    world = World(1000)
    assert world.run(20) == 32
    world.pace.no_room()
    assert world.pace.width == 31


def test_an_object_store_says_that_it_is_busy():
    error = OSError("x")
    error.response = {"Error": {"Code": "SlowDown"}}  # type: ignore[attr-defined]
    assert isinstance(object_store._explained("s3://b/k", error), BusyError)


@pytest.mark.parametrize("number", [0, -1, 257])
def test_a_number_of_transfers_that_makes_no_sense_is_refused(number):
    with pytest.raises(ValueError, match=f"max_transfers={number}: counts shards"):
        LoaderOptions(max_transfers=number)


class Counted(FaultHandler):
    """Counts the tars that are asked for at once, and holds them until there are `wanted`."""

    def do_GET(self) -> None:
        server = self.server
        assert isinstance(server, CountingServer)
        if not self.path.endswith(".tar"):
            super().do_GET()
            return
        with server.change:
            server.now += 1
            server.most = max(server.most, server.now)
            server.change.notify_all()
            server.change.wait_for(lambda: server.most >= server.wanted, 60)
        try:
            super().do_GET()
        finally:
            with server.change:
                server.now -= 1


class CountingServer(FaultServer):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder, Counted)
        self.change = threading.Condition()
        self.now = self.most = 0
        self.wanted = 1

    def wait_for(self, number: int) -> None:
        with self.change:
            self.wanted = number
            assert self.change.wait_for(lambda: self.most >= number, 60), self.most


def test_a_server_sees_as_many_as_the_pace_says(image_folder, tmp_path, own_threads):
    """The threads follow the number up and down; what is read does not depend on it."""
    pytest.importorskip("webdataset")
    folder = tmp_path / "set"
    pack_folder(image_folder, folder, shard_samples=1)
    now = [100.0]
    cache = CacheSpec(cache_dir=str(tmp_path / "cache"), cache_size_gb=0.01)
    with ShardSet.open(str(folder)) as local, CountingServer(folder) as server:
        expected = [data.tobytes() for data in local.read(np.arange(45))]
        with ShardSet.open(f"{server.url}/", cache=cache, limits=QUICK, max_transfers=9) as shards:
            fetcher = shards._files._fetcher
            pace = fetcher._state.pace = Pace(9, lambda: now[0])
            server.wanted = START
            fetcher.want(range(45))
            server.wait_for(START)
            server.wanted = 9
            with pace.waiting():  # the answers are held; by the clock they bring more and more
                while pace.width < 9:
                    now[0] += 2
                    fetcher._state.arrived(round(1000 * now[0] ** 9))
                server.wait_for(9)
            found = [data.tobytes() for data in shards.read(np.arange(45))]
            assert found == expected
            assert server.most <= 10  # the reader itself may fetch one
        assert _ended(own_threads)


def _ended(names: Callable[[], list[str]]) -> bool:
    pause = threading.Event()
    return any(not names() or pause.wait(0.05) for _ in range(600)) and not names()
