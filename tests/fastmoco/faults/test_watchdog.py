"""Who hangs is told from signs in a store; what two real ranks do about it is in
test_fault_table.py."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from fastmoco.config.faults import FaultConfig
from fastmoco.distributed.mesh import World
from fastmoco.faults import pulse as pulse_module
from fastmoco.faults import watchdog
from fastmoco.faults.pulse import Pulse
from fastmoco.faults.watchdog import Watchdog

pytestmark = pytest.mark.faults

RULES = FaultConfig(hang_timeout_s=1.0, first_step_timeout_s=0.5)
RANK_0 = World(rank=0, world_size=2)


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> dist.Store:
    """The ranks' store, in this process."""
    store = dist.HashStore()
    store.set_timeout(timedelta(seconds=5))
    monkeypatch.setattr(watchdog, "connect", lambda world, timeout_s: store)
    return store


def verdict(store: dist.Store) -> str | None:
    return store.get("first-cause").decode() if store.check(["first-cause"]) else None


def wait_for_verdict(store: dist.Store, seconds: float) -> str | None:
    until = time.monotonic() + seconds
    while verdict(store) is None and time.monotonic() < until:
        time.sleep(0.02)
    return verdict(store)


def sign_of_peer(store: dist.Store, beat: int, **more: object) -> None:
    store.set(
        "beat/1", json.dumps({"beat": beat, "count": 1, "section": "step", "process": None} | more)
    )


def test_a_mute_neighbour_is_named_and_its_process_killed(store: dist.Store) -> None:
    peer = subprocess.Popen(["sleep", "60"])
    try:
        peer.send_signal(signal.SIGSTOP)
        sign_of_peer(store, 7, process=watchdog._process(peer.pid))
        with Watchdog(RANK_0, Pulse(FaultConfig()), RULES):
            assert wait_for_verdict(store, 60) == "rank 1 hangs: no heartbeat for 1 s"
            assert peer.wait(timeout=60) == -signal.SIGKILL
    finally:
        peer.kill()


def test_a_later_process_of_the_same_number_is_left_alone(store: dist.Store) -> None:
    peer = subprocess.Popen(["sleep", "60"])
    try:
        process = watchdog._process(peer.pid)
        assert process is not None
        sign_of_peer(store, 7, process=process | {"started": "1"})
        with Watchdog(RANK_0, Pulse(FaultConfig()), RULES):
            assert wait_for_verdict(store, 60) is not None
            time.sleep(0.2)
        assert peer.poll() is None
    finally:
        peer.kill()
        peer.wait()


def wait_for_rounds(store: dist.Store, rounds: int) -> None:
    """Until the watchdog of rank 0 has written so many more signs, or a verdict."""

    def beats() -> int:
        return int(json.loads(store.get("beat/0"))["beat"]) if store.check(["beat/0"]) else 0

    wanted, until = beats() + rounds, time.monotonic() + 60
    while beats() < wanted and verdict(store) is None:
        assert time.monotonic() < until
        time.sleep(0.002)


# A peer that is further on waits for this rank; one that is behind is waited for; one that has left
# did its part.
@pytest.mark.parametrize(("count", "named"), [(9, True), (0, False)], ids=["ahead", "behind"])
def test_a_rank_that_does_not_get_on_names_itself_only_if_nobody_is_behind(
    store: dist.Store, count: int, named: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that goes on only when the watchdog has seen the peer's last sign."""
    now = [0.0]
    for module in (watchdog, pulse_module):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    pulse = Pulse(RULES)
    watching = Watchdog(RANK_0, pulse, RULES)
    watching._interval = 0.01
    with watching, pulse.step():
        for beat in range(20):
            sign_of_peer(store, beat, count=count)
            wait_for_rounds(store, 2)  # the first may have begun before the sign
            now[0] += 0.1
    found = verdict(store)
    assert (found is not None) == named
    if found is not None:
        assert found.startswith("rank 0 hangs: step has taken ")
        assert "test_watchdog.py" in found


def test_a_neighbour_that_has_left_is_not_missed(store: dist.Store) -> None:
    store.set("beat/1", json.dumps({"left": True}))
    with Watchdog(RANK_0, Pulse(FaultConfig()), RULES):
        time.sleep(1.6)
    assert verdict(store) is None
    assert "left" in json.loads(store.get("beat/0"))


@pytest.mark.parametrize(
    "raw", [b"", b"\xff", b"[1]", b"[" * 200_000, b'{"count": "x", "process": [1]}', b"9" * 5000]
)
def test_a_heartbeat_that_is_none_ends_no_thread(store: dist.Store, raw: bytes) -> None:
    """Anybody who reaches the store may write there."""
    store.set("beat/1", raw)
    dog = Watchdog(RANK_0, Pulse(FaultConfig()), RULES)
    dog._store = store
    assert dog._is_slowest()
    assert isinstance(dog._where(), str)
    assert not watchdog._has_left(raw.decode(errors="replace"))
    dog._end(1, "no heartbeat", raw.decode(errors="replace"))
    assert verdict(store) == "rank 1 hangs: no heartbeat"
