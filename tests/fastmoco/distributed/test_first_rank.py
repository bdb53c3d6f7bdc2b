"""Long work of rank 0: the others get its result, its failure, or notice its silence."""

from __future__ import annotations

import threading
import time

import pytest

from fastmoco.distributed import first_rank
from fastmoco.distributed.first_rank import first_rank_does
from fastmoco.distributed.mesh import World


class Store:
    """The store of the ranks, in one process."""

    def __init__(self) -> None:
        self.content: dict[str, bytes] = {}
        self.lock = threading.Lock()

    def set(self, key: str, value: str) -> None:
        self.content[key] = value.encode()

    def get(self, key: str) -> bytes:
        return self.content[key]

    def check(self, keys: list[str]) -> bool:
        return set(keys) <= self.content.keys()

    def add(self, key: str, amount: int) -> int:
        with self.lock:
            total = int(self.content.get(key, b"0")) + amount
            self.content[key] = str(total).encode()
        return total


@pytest.fixture
def other(monkeypatch):
    """Rank 1, waiting in a thread: a function that gives its result or its error."""
    store = Store()
    monkeypatch.setattr(first_rank, "connect", lambda _: store)
    monkeypatch.setattr(first_rank, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(first_rank, "BEAT_SECONDS", 0.02)
    monkeypatch.setattr(first_rank, "SILENCE_SECONDS", 0.2)
    found: list[object] = []

    def wait() -> None:
        try:
            found.append(first_rank_does(World(rank=1, world_size=2), "it", lambda: "not called"))
        except RuntimeError as error:
            found.append(error)

    thread = threading.Thread(target=wait)
    thread.start()

    def result() -> object:
        thread.join(30)
        return found[0]

    return result


def test_all_ranks_get_the_result_however_long_it_takes(other) -> None:
    def work() -> str:
        time.sleep(0.5)  # longer than a silence
        return "found"

    assert first_rank_does(World(world_size=2), "it", work) == "found"
    assert other() == "found"


def test_a_failure_reaches_the_others(other) -> None:
    def work() -> str:
        raise ValueError("no images")

    with pytest.raises(ValueError, match="no images"):
        first_rank_does(World(world_size=2), "it", work)
    assert type(other()) is RuntimeError  # `first_cause` replaces it by the reason


def test_a_silent_rank_is_noticed(other) -> None:
    assert "has not answered" in str(other())


def test_one_process_needs_no_store(monkeypatch) -> None:
    monkeypatch.setattr(first_rank, "connect", None)
    assert first_rank_does(World(), "it", lambda: "found") == "found"
