"""Report a rank that makes no progress, and end it: a stopped process does not answer, and its
peers wait for it inside a library.

Each rank has a thread that writes a heartbeat to the ranks' store and reads the heartbeat of the
next rank. A rank without heartbeats is stopped or lost. A rank whose thread runs but whose main
thread makes no progress reports itself, unless another rank has made less progress, because a rank
that waits for a slower peer is ahead of it. Clocks of different machines are never compared.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any

from fastmoco.config.faults import FaultConfig
from fastmoco.distributed.mesh import World
from fastmoco.distributed.store import StoreTimeoutError, connect
from fastmoco.errors import EXIT_FAILED, say
from fastmoco.faults.first_cause import report
from fastmoco.faults.pulse import Pulse
from fastmoco_pipelines.files.small import UnfitFileError, json_of


class Watchdog:
    """A context in which a rank that hangs is reported within the timeout.

    It is killed if it is on this machine, and the run ends.

    Args:
        world: this process among its peers; a single process is not watched.
        pulse: what the main thread of this process is doing.
        rules: the timeouts.
    """

    def __init__(self, world: World, pulse: Pulse, rules: FaultConfig) -> None:
        self._world = world
        self._pulse = pulse
        self._timeout = rules.hang_timeout_s
        self._interval = min(1.0, self._timeout / 8)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="fastmoco-watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        if self._world.world_size > 1:
            self._store = connect(self._world, max(5.0, self._timeout))
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._thread.is_alive():
            self._thread.join(5 * self._interval)

    def _watch(self) -> None:
        beats = 0
        rank = self._world.rank
        neighbour = (rank + 1) % self._world.world_size
        seen = ""
        seen_at = time.monotonic()
        begun = False
        try:
            while not self._over.wait(self._interval):
                beats += 1
                self._store.set(f"beat/{rank}", json.dumps(self._heartbeat(beats)))

                # The heartbeat of the next rank. On a store that has stopped, `check` waits
                # indefinitely; `get` has a timeout, but would wait for the first heartbeat.
                begun = begun or self._store.check([f"beat/{neighbour}"])
                heartbeat = (
                    self._store.get(f"beat/{neighbour}").decode(errors="replace") if begun else ""
                )
                if heartbeat != seen:
                    seen = heartbeat
                    seen_at = time.monotonic()
                elif _has_left(heartbeat):
                    seen_at = time.monotonic()
                elif time.monotonic() - seen_at > self._timeout:
                    self._end(neighbour, f"no heartbeat for {self._timeout:.0f} s", heartbeat)
                    return

                # This rank itself; asked twice, because it may have progressed meanwhile.
                if self._pulse.overdue() and self._is_slowest() and self._pulse.overdue():
                    self._end(
                        rank,
                        f"{self._pulse.doing} has taken {self._pulse.age():.0f} s; {self._where()}",
                        "",
                    )
                    return
            self._store.set(f"beat/{rank}", json.dumps({"left": True}))
        except StoreTimeoutError:
            say(
                f"rank {rank}: the store of the ranks has not answered for {self._timeout:.0f} s: "
                f"the process that hosts it hangs"
            )
            os._exit(EXIT_FAILED)  # an exception cannot interrupt the main thread inside a library
        except RuntimeError:
            # The store ended with the process that hosted it, which the main thread will notice.
            return

    def _heartbeat(self, beats: int) -> dict[str, Any]:
        pulse = self._pulse
        heartbeat: dict[str, Any] = {
            "beat": beats,
            "count": pulse.count,
            "section": pulse.doing,
            "process": _this_process(),
        }
        return heartbeat | ({"place": pulse.place()} if pulse.overdue() else {})

    def _heartbeats(self) -> dict[int, dict[str, Any]]:
        """The newest heartbeat of every rank that has written one."""
        keys = {rank: f"beat/{rank}" for rank in range(self._world.world_size)}
        return {
            rank: _content(self._store.get(key))
            for rank, key in keys.items()
            if self._store.check([key])
        }

    def _is_slowest(self) -> bool:
        """Whether no rank has made less progress than this one."""
        return all(
            _count(heartbeat, self._pulse.count) >= self._pulse.count
            for heartbeat in self._heartbeats().values()
        )

    def _where(self) -> str:
        """Positions of the main threads of all ranks with the progress of this one."""
        alike = {
            rank: heartbeat
            for rank, heartbeat in self._heartbeats().items()
            if heartbeat.get("count") == self._pulse.count
        }
        places = [
            f"rank {rank} is at {heartbeat.get('place') or heartbeat.get('section')}"
            for rank, heartbeat in alike.items()
        ]
        return "; ".join(places)

    def _end(self, rank: int, why: str, heartbeat: str) -> None:
        """Report which rank hangs; kill it if it is on this machine and has no heartbeat."""
        text = f"rank {rank} hangs: {why}"
        first = report(self._store, text)
        say(f"ended by the failure of {first}")
        process = _content(heartbeat).get("process")
        pid = process.get("pid") if isinstance(process, dict) else None
        if first == text and type(pid) is int and process == _process(pid):
            os.kill(pid, signal.SIGKILL)


def _count(heartbeat: dict[str, Any], unknown: int) -> int:
    """Progress of a rank; `unknown` if it has none to show."""
    count = heartbeat.get("count")
    return count if type(count) is int else unknown


def _has_left(heartbeat: str) -> bool:
    return "left" in _content(heartbeat)


def _content(heartbeat: str | bytes) -> dict[str, Any]:
    """A heartbeat from the store; empty if it is none."""
    raw = heartbeat.encode() if isinstance(heartbeat, str) else heartbeat
    try:
        found = json_of(raw, "heartbeat")
    except UnfitFileError:
        return {}
    return found if isinstance(found, dict) else {}


def _this_process() -> dict[str, Any] | None:
    return _process(os.getpid())


def _process(pid: int) -> dict[str, Any] | None:
    """What identifies a process of this machine, since numbers are reused; None if it has ended."""
    try:
        started = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except (OSError, IndexError):
        return None
    return {"pid": pid, "started": started, "boot": boot, "host": socket.gethostname()}
