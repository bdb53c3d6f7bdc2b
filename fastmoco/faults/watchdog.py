"""Names a rank that no longer moves, and ends it: a stopped process answers nobody, and its peers wait for it in a library.

Each rank has a thread that leaves a sign of life in the ranks' store, and looks for the sign of the next rank. A rank without
signs is stopped or lost. A rank whose thread lives and whose main thread does not get on names itself, if nobody is further
behind: whoever waits for a slower peer is ahead of it. Clocks of different machines are never compared.
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


class Watchdog:
    """A context in which a rank that hangs is named within the timeout, killed if it is on this machine, and the run ended.

    Args:
        world: this process among its peers; alone it is not watched.
        pulse: what this process's main thread does.
        rules: how long is too long.
    """

    def __init__(self, world: World, pulse: Pulse, rules: FaultConfig) -> None:
        self._world, self._pulse, self._timeout = world, pulse, rules.hang_timeout_s
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
        beats, rank = 0, self._world.rank
        neighbour = (rank + 1) % self._world.world_size
        seen, seen_at, begun = "", time.monotonic(), False
        try:
            while not self._over.wait(self._interval):
                beats += 1
                self._store.set(f"beat/{rank}", json.dumps(self._sign(beats)))
                # `check` of a store that has stopped waits for ever; `get` does not, but it waits for a first sign.
                begun = begun or self._store.check([f"beat/{neighbour}"])
                sign = self._store.get(f"beat/{neighbour}").decode() if begun else ""
                if sign != seen:
                    seen, seen_at = sign, time.monotonic()
                elif _has_left(sign):
                    seen_at = time.monotonic()
                elif time.monotonic() - seen_at > self._timeout:
                    self._end(neighbour, f"no sign of life for {self._timeout:.0f} s", sign)
                    return
                # Twice: it may have got on while the others were asked.
                if self._pulse.overdue() and self._is_behind() and self._pulse.overdue():
                    self._end(rank, f"{self._pulse.doing} has taken {self._pulse.age():.0f} s; {self._where()}", "")
                    return
            self._store.set(f"beat/{rank}", json.dumps({"left": True}))
        except StoreTimeoutError:
            say(f"rank {rank}: the store of the ranks has not answered for {self._timeout:.0f} s: its holder hangs")
            os._exit(EXIT_FAILED)  # the main thread waits in a library, where no exception reaches it
        except RuntimeError:
            return  # the store went down with the process that held it, which the main thread will notice

    def _sign(self, beats: int) -> dict[str, Any]:
        pulse = self._pulse
        sign: dict[str, Any] = {
            "beat": beats,
            "count": pulse.count,
            "section": pulse.doing,
            "process": _this_process(),
        }
        return sign | ({"place": pulse.place()} if pulse.overdue() else {})

    def _signs(self) -> dict[int, dict[str, Any]]:
        """The newest sign of every rank that has left one."""
        keys = {rank: f"beat/{rank}" for rank in range(self._world.world_size)}
        return {rank: json.loads(self._store.get(key)) for rank, key in keys.items() if self._store.check([key])}

    def _is_behind(self) -> bool:
        """Whether no rank has done less than this one."""
        return all(sign.get("count", self._pulse.count) >= self._pulse.count for sign in self._signs().values())

    def _where(self) -> str:
        """Where the main threads are of all that are as far as this one."""
        alike = {rank: sign for rank, sign in self._signs().items() if sign.get("count") == self._pulse.count}
        places = [f"rank {rank} is at {sign.get('place') or sign.get('section')}" for rank, sign in alike.items()]
        return "; ".join(places)

    def _end(self, rank: int, why: str, sign: str) -> None:
        """Say which rank hangs, and kill it if it is a process of this machine that stays mute."""
        text = f"rank {rank} hangs: {why}"
        first = report(self._store, text)
        say(f"ended by the failure of {first}")
        process = json.loads(sign).get("process") if sign else None
        if first == text and process and process == _process(process["pid"]):
            os.kill(process["pid"], signal.SIGKILL)


def _has_left(sign: str) -> bool:
    return bool(sign) and "left" in json.loads(sign)


def _this_process() -> dict[str, Any] | None:
    return _process(os.getpid())


def _process(pid: int) -> dict[str, Any] | None:
    """What tells a process of this machine from any other, a later one with its number included; None where it is gone."""
    try:
        started = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except (OSError, IndexError):
        return None
    return {"pid": pid, "started": started, "boot": boot, "host": socket.gethostname()}
