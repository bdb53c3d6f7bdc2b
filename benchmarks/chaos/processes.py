"""The processes of a command: how they are started, found, disturbed and awaited."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

TOKEN = "FASTMOCO_CHAOS"  # noqa: S105 - the name of a variable
"""Variable by which the processes of a command are found."""
LEFT_SECONDS = 10.0
"""Time that all processes have to end after their command."""
ROOT = Path(__file__).resolve().parents[2]


class Command:
    """`fastmoco` with some words, in a folder; its output goes to a file.

    Args:
        words: of the command.
        folder: where it runs.
        log: gets the output.
        limits: of the operating system, soft.
        forked: fork this process, which has imported everything, instead of starting an
            interpreter.
    """

    def __init__(
        self,
        words: Sequence[str],
        folder: Path,
        log: Path,
        *,
        limits: Mapping[int, int],
        forked: bool,
    ) -> None:
        self.log = log
        self.began = time.monotonic()
        self._code: int | None = None
        self._popen: subprocess.Popen[bytes] | None = None
        self._token = f"{os.getpid()}-{time.monotonic_ns()}"
        log.write_bytes(b"")
        variables = environment() | {TOKEN: self._token}
        if forked:
            self.pid = _fork(words, folder, log, limits, variables)
        else:
            with log.open("ab") as out:
                self._popen = subprocess.Popen(
                    [sys.executable, "-P", "-m", "fastmoco", *words],
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=out,
                    cwd=folder,
                    env=variables,
                    start_new_session=True,
                    preexec_fn=lambda: _prepare(limits),
                )
            self.pid = self._popen.pid

    def poll(self) -> int | None:
        """Exit code, minus the signal that ended it; None while it runs."""
        if self._code is None:
            if self._popen is not None:
                self._code = self._popen.poll()
            else:
                found, status = os.waitpid(self.pid, os.WNOHANG)
                self._code = os.waitstatus_to_exitcode(status) if found else None
        return self._code

    def text(self) -> str:
        """The output so far."""
        return self.log.read_text(errors="replace")

    def find(self, whom: str) -> int | None:
        """The process of a name of `plan.WHOM`; None if there is none now."""
        if whom == "run":
            return self.pid if self.poll() is None else None
        for pid in self.living():
            with suppress(OSError):
                folder = Path(f"/proc/{pid}")
                words = (folder / "cmdline").read_bytes()
                variables = (folder / "environ").read_bytes().split(b"\0")
                ranked = [one for one in variables if one.startswith(b"RANK=")]
                if whom == "agent" and b"cli.agent" in words and not ranked:
                    return pid
                if ranked and whom == f"rank {ranked[0][5:].decode()}" and b"train" in words:
                    return pid
        return None

    def living(self) -> list[int]:
        """All processes of the command, except those that have ended and are not awaited."""
        mark = f"{TOKEN}={self._token}".encode()
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError, IndexError):
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
                own = mark in (folder / "environ").read_bytes().split(b"\0")
                if fields[0] not in "ZX" and (own or int(fields[3]) == self.pid):
                    found.append(int(folder.name))
        return found

    def end_left(self) -> int:
        """Wait for all processes after the end of the command, and kill those that are left;
        their number."""
        until = time.monotonic() + LEFT_SECONDS
        while (left := self.living()) and time.monotonic() < until:
            time.sleep(0.05)
        self.kill()
        return len(left)

    def kill(self) -> None:
        """End all of it."""
        for pid in self.living():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        while self.poll() is None:
            time.sleep(0.01)


def environment() -> dict[str, str]:
    """As for a user, with one thread per process."""
    paths = os.pathsep.join(str(ROOT / folder) for folder in (".", "kernels", "pipelines"))
    left = ("SLURM_", "TORCHELASTIC_", "PYTEST_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(left)}
    return kept | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}


def _prepare(limits: Mapping[int, int]) -> None:
    for kind, value in limits.items():
        if kind == resource.RLIMIT_AS:  # beyond what the process has
            with open("/proc/self/statm") as file:
                value += int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(kind, (value, resource.getrlimit(kind)[1]))
    # Not as under nohup, and not as in this process.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


def _fork(
    words: Sequence[str],
    folder: Path,
    log: Path,
    limits: Mapping[int, int],
    variables: Mapping[str, str],
) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setsid()
        os.chdir(folder)
        out = os.open(log, os.O_WRONLY | os.O_APPEND)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(out, 1)
        os.dup2(out, 2)
        os.environ.clear()
        os.environ.update(variables)
        sys.argv = ["fastmoco", *words]
        _prepare(limits)
        _run_here()
        code = _main()
        sys.stdout.flush()
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(code)


def _run_here() -> None:
    """Without the picture of the curves, which takes longer than the run."""
    from fastmoco.cli import train

    train._draw = lambda *arguments, **options: None


def _main() -> int:
    from fastmoco.cli.main import main

    return main()


def preload() -> None:
    """Import once what forked commands need."""
    import importlib

    names = ("cli.main", "cli.recipe_commands", "cli.train", "training.trainer")
    for name in (*(f"fastmoco.{name}" for name in names), "nvidia.dali"):
        with suppress(ModuleNotFoundError):
            importlib.import_module(name)


def wait_until(condition: Callable[[], bool], command: Command, seconds: float) -> bool:
    """Whether a condition has come true before the command ended."""
    until = time.monotonic() + seconds
    while not condition():
        if command.poll() is not None or time.monotonic() > until:
            return False
        time.sleep(0.003)
    return True
