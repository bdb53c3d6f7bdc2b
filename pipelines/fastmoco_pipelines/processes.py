"""Processes that this one starts: nothing from the current folder runs in them, and they end with
it.

`python -m`, an empty part of `PYTHONPATH` and a relative part of `PATH` all look into the current
folder first, and a folder of somebody's images may contain a `random.py` or a `git`. A command
therefore calls `without_current_folder` first, for all that libraries start, and starts its own
children with `python_command` and `child_environment`.

A child asks the kernel for a SIGCONT at the end of its parent, which continues a stopped process
and harms no other, and a thread looks for that end too. A signal that ends the child would not do
alone: the kernel sends it at the end of the thread that has started the child.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from importlib.machinery import PathFinder
from pathlib import Path

PARENT = "FASTMOCO_PARENT"
"""Variable with the process that has started this one, which may have ended before it could ask."""
POLL_SECONDS = 0.5
"""Time between two looks for the end of the parent."""
_OWN = ("fastmoco", "fastmoco_pipelines", "fastmoco_kernels")
_PR_SET_PDEATHSIG = 1
_followed: _Followed | None = None


def python_command(module: str, *words: str) -> list[str]:
    """The argument list that runs a module in this interpreter, without the current folder.

    Args:
        module: with an absolute name.
        words: its arguments.
    """
    return [sys.executable, "-P", "-m", module, *words]


def interpreter() -> str:
    """The path of this interpreter, for messages and for commands that are only shown."""
    return sys.executable


def child_environment(environment: Mapping[str, str] | None = None, **more: str) -> dict[str, str]:
    """The variables of a child that calls `follow_parent`.

    Args:
        environment: to begin with; default that of this process.
        more: variables beside it.
    """
    variables = {**(os.environ if environment is None else environment), **more}
    without_current_folder(variables)
    return variables | {PARENT: str(os.getpid())}


def without_current_folder(environment: MutableMapping[str, str]) -> None:
    """Take the current folder out of where children look for modules and programs.

    `PYTHONSAFEPATH` is what `python -P` does, and is inherited. `PYTHONPATH` loses its empty parts
    and `.`, other relative folders in it become absolute ones. `PATH` loses all relative folders.
    Absolute folders stay, also the current one: somebody has named it.
    """
    environment["PYTHONSAFEPATH"] = "1"
    named = environment.get("PYTHONPATH", "").split(os.pathsep)
    parts = [part if os.path.isabs(part) else _absolute(part) for part in named]
    folders = [*filter(None, parts), *_roots_of_our_own()]
    _set_folders(environment, "PYTHONPATH", list(dict.fromkeys(folders)))
    if "PATH" in environment:
        programs = filter(os.path.isabs, environment["PATH"].split(os.pathsep))
        _set_folders(environment, "PATH", list(programs))


def leave_current_folder() -> None:
    """Take the current folder, which `fastmoco` has put last, out of `sys.path`, unless our own
    packages are there and nowhere else."""
    try:
        here = os.getcwd()
    except OSError:
        return
    if sys.path[-1:] == [here] and not _roots_of_our_own():
        del sys.path[-1]


def _set_folders(environment: MutableMapping[str, str], name: str, folders: list[str]) -> None:
    """An empty variable would be the current folder again."""
    if folders:
        environment[name] = os.pathsep.join(folders)
    else:
        environment.pop(name, None)


def _absolute(part: str) -> str:
    """A relative folder; empty for the current one."""
    try:
        here = os.getcwd()
    except OSError:  # it is removed
        return ""
    path = os.path.normpath(os.path.join(here, part))
    return "" if path == os.path.normpath(here) else path


def _roots_of_our_own() -> list[str]:
    """The current folder, if one of our own packages comes from there and is nowhere else."""
    try:
        here = os.getcwd()
    except OSError:
        return []
    rest = [part for part in sys.path if part and not _is_here(part, here)]
    for name in _OWN:
        module = sys.modules.get(name)
        file = getattr(module, "__file__", None)
        if file is None or not _is_here(str(Path(file).parents[1]), here):
            continue
        others = [finder for finder in sys.meta_path if finder is not PathFinder]
        found = (finder.find_spec(name, None) for finder in others)
        if PathFinder.find_spec(name, rest) is None and not any(found):
            return [here]
    return []


def _is_here(part: str, here: str) -> bool:
    return os.path.normpath(part) == os.path.normpath(here)


class _Followed:
    """A process that this one ends with: its parent, or one further up.

    Args:
        process: its number.
    """

    def __init__(self, process: int) -> None:
        self._process = process
        self._direct = os.getppid()
        # Without /proc only the parent can be looked for.
        self._ended = process not in ancestors() and started(os.getpid()) is not None
        self._started = started(process)

    def has_ended(self) -> bool:
        """Whether it, or a process between it and this one, has ended."""
        if not self._ended:
            gone = self._process != self._direct and started(self._process) != self._started
            self._ended = gone or os.getppid() != self._direct
        return self._ended


def follow_parent(process: int | None = None, at_end: Callable[[], None] | None = None) -> None:
    """End with the parent of this process, also if it has ended already. To be called once.

    The children of this process do not inherit the variable `PARENT`.

    Args:
        process: to follow; default the one in `PARENT`, else the parent.
        at_end: called at its end, in a thread; default: this process gets a SIGTERM.
    """
    global _followed
    given = os.environ.pop(PARENT, "")
    if process is None:
        process = int(given) if given.isascii() and given.isdigit() else os.getppid()
    prctl(_PR_SET_PDEATHSIG, signal.SIGCONT)
    _followed = _Followed(process)
    act = at_end or end_by_signal
    if is_orphan():
        act()
        return
    threading.Thread(target=_watch, args=[act], name="fastmoco-parent", daemon=True).start()


def is_orphan() -> bool:
    """Whether the process that this one follows has ended."""
    return _followed is not None and _followed.has_ended()


def end_by_signal() -> None:
    """Send this process a SIGTERM."""
    os.kill(os.getpid(), signal.SIGTERM)


def _watch(act: Callable[[], None]) -> None:
    while not is_orphan():
        time.sleep(POLL_SECONDS)
    act()


def ancestors() -> list[int]:
    """The parent of this process, the parent of that, and so on; the parent alone without /proc."""
    found = [os.getppid()]
    while found[-1] > 1 and (stat := _stat(found[-1])):
        found.append(int(stat[1]))
    return found


def children() -> list[int]:
    """Processes whose parent is this one; none where the system has no /proc."""
    own = str(os.getpid())
    numbers = (int(path.name) for path in _processes())
    return [number for number in numbers if (stat := _stat(number)) and stat[1] == own]


def started(process: int) -> str | None:
    """When a process started, in ticks of this machine, since numbers are used again; None if it
    has ended."""
    stat = _stat(process)
    return stat[19] if stat and stat[0] not in "ZX" else None


def _processes() -> Iterator[Path]:
    with contextlib.suppress(OSError):
        yield from Path("/proc").glob("[0-9]*")


def _stat(process: int) -> list[str]:
    """The fields of a process behind its name: state, parent, ...; empty if there is none."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except (OSError, UnicodeDecodeError):
        return []


def prctl(option: int, value: int) -> None:
    """Ask the kernel of Linux for a behaviour of this process; elsewhere nothing happens."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)
