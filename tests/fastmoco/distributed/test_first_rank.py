"""Long work of rank 0: the others get its result, its failure, or notice its silence."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from fastmoco.distributed import first_rank
from fastmoco.distributed.first_rank import first_rank_does
from fastmoco.distributed.mesh import World

GUARD_SECONDS = 60
"""Nothing here takes so long, on a loaded machine either."""


class Store:
    """The store of the ranks, in one process."""

    def __init__(self) -> None:
        self.content: dict[str, bytes] = {}
        self.changes = 0
        self.lock = threading.Lock()

    def set(self, key: str, value: str) -> None:
        self.content[key] = value.encode()
        self.changes += 1

    def get(self, key: str) -> bytes:
        return self.content[key]

    def check(self, keys: list[str]) -> bool:
        return set(keys) <= self.content.keys()

    def add(self, key: str, amount: int) -> int:
        with self.lock:
            total = int(self.content.get(key, b"0")) + amount
            self.content[key] = str(total).encode()
            self.changes += amount != 0
        return total


def wait_until(condition: Callable[[], bool], seconds: float = GUARD_SECONDS) -> None:
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:
        time.sleep(0.001)


class Clock:
    """Rank 1's: it looks into the store after each change, almost a silence later."""

    def __init__(self, store: Store, patience: float) -> None:
        self.store, self.patience = store, patience
        self.now, self.looks = 0.0, 0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, _: float) -> None:
        before = self.store.changes
        wait_until(lambda: self.store.changes > before, self.patience)
        self.now += 0.9 * first_rank.SILENCE_SECONDS
        self.looks += 1


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Clock:
    """How long it waits for a change: that of the test's mark, or as long as a test may take."""
    clock = Clock(Store(), getattr(request, "param", GUARD_SECONDS))
    times = SimpleNamespace(monotonic=clock.monotonic, sleep=clock.sleep)
    monkeypatch.setattr(first_rank, "time", times)
    monkeypatch.setattr(first_rank, "connect", lambda _: clock.store)
    monkeypatch.setattr(first_rank, "BEAT_SECONDS", 0.02)
    return clock


@pytest.fixture
def other(clock):
    """Rank 1, waiting in a thread: a function that gives its result or its error."""
    found: list[object] = []

    def wait() -> None:
        try:
            found.append(first_rank_does(World(rank=1, world_size=2), "it", lambda: "not called"))
        except RuntimeError as error:
            found.append(error)

    thread = threading.Thread(target=wait)
    thread.start()

    def result() -> object:
        thread.join(2 * GUARD_SECONDS)
        return found[0]

    return result


def test_all_ranks_get_the_result_however_long_it_takes(other, clock) -> None:
    def work() -> str:
        wait_until(lambda: clock.looks >= 4)  # in which more than three silences go by
        assert clock.looks >= 4
        return "found"

    assert first_rank_does(World(world_size=2), "it", work) == "found"
    assert other() == "found"


def test_a_failure_reaches_the_others(other) -> None:
    def work() -> str:
        raise ValueError("no images")

    with pytest.raises(ValueError, match="no images"):
        first_rank_does(World(world_size=2), "it", work)
    assert type(other()) is RuntimeError  # `first_cause` replaces it by the reason


@pytest.mark.parametrize("clock", [0.0], indirect=True)
def test_a_silent_rank_is_noticed(other) -> None:
    assert "has not answered" in str(other())


def test_one_process_needs_no_store(monkeypatch) -> None:
    monkeypatch.setattr(first_rank, "connect", None)
    assert first_rank_does(World(), "it", lambda: "found") == "found"
