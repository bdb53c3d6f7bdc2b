"""The runs below a folder: what each is, how far it is, and whether it still trains.

Reads a few kilobytes of most files and takes no lock, so it changes nothing for a run that starts at
the same moment. Imports no torch.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from fastmoco.run.folder import FILES, FOLDERS, read_object
from fastmoco.run.metrics_file import MOST_BYTES
from fastmoco_pipelines.files.small import UnfitFileError, open_regular, read_small, reason_of

HOST = "host"
"""Entry of config.json: the machine of the newest start."""
DEPTH = 8
"""Folders below the given one that are looked into."""
MOST_FOLDERS = 20_000
"""That are looked into in all."""
MOST_ENTRIES = 100_000
"""Of one folder; those after them are left out."""
TAIL = 1 << 16
"""Bytes at the end of metrics.jsonl that hold the newest values."""
CURVE = 64 << 20
"""Bytes at the end of metrics.jsonl that are searched for accuracies."""
BLOCK = 1 << 20
State = Literal["running", "finished", "stopped", "failed", "elsewhere", "not begun", "unreadable"]


@dataclass(frozen=True, kw_only=True)
class RunLine:
    """What is known of one run; None where its files do not say it."""

    path: str
    """Folder of the run."""
    state: State
    """`running`: a process of this machine holds the lock. `finished` and `stopped` (saved on a
    signal): by the files DONE and PREEMPTED. `elsewhere`: none of these, and its newest start was on
    another machine, where it may train. `failed`: it has begun and none of these. `not begun`: it has
    no line of metrics."""
    pid: int | None = None
    """Process that holds the lock, on this machine."""
    host: str | None = None
    """Machine of the newest start."""
    recipe: str | None = None
    step: int | None = None
    """Of the last line of metrics."""
    total_steps: int | None = None
    knn: float | None = None
    """The newest kNN accuracy, a share."""
    knn_best: float | None = None
    """The highest in the last 64 MB of metrics."""
    images_per_s: float | None = None
    written: float | None = None
    """When metrics, or else config.json, were last written: seconds since 1970."""
    fault: str | None = None
    """Why something of it could not be read."""

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


def find_runs(folder: Path) -> tuple[list[RunLine], list[str]]:
    """The runs in and below a folder, those that were written last first.

    Links to folders are followed, each folder is looked into once.

    Returns:
        The runs, and sentences about what was left out.

    Raises:
        OSError: if the folder cannot be read.
    """
    notes: list[str] = []
    locks = held_locks()
    runs = [read_run(Path(path), locks) for path in _run_folders(folder, notes)]
    runs.sort(key=lambda run: (-(run.written or 0.0), run.path))
    return runs, notes


def _run_folders(folder: Path, notes: list[str]) -> Iterator[str]:
    """Paths of folders that look like those of runs."""
    seen: set[tuple[int, int]] = set()
    level = [str(folder)]
    for _ in range(DEPTH + 1):
        below: list[str] = []
        for path in level:
            try:
                found = os.stat(path)
                if (found.st_dev, found.st_ino) in seen:
                    continue
                seen.add((found.st_dev, found.st_ino))
                if len(seen) > MOST_FOLDERS:
                    notes.append(f"more than {MOST_FOLDERS:,} folders: give one further down")
                    return
                names, folders = _entries(path, notes)
            except OSError as error:
                if path == str(folder):
                    raise
                notes.append(f"{path}: {error.strerror}")
                continue
            if _is_run(path, names):
                yield path
                folders = [name for name in folders if name not in FOLDERS]
            below += [os.path.join(path, name) for name in sorted(folders)]
        level = below
    if level:
        notes.append(f"folders deeper than {DEPTH} below {folder} are left out")


def _entries(path: str, notes: list[str]) -> tuple[set[str], list[str]]:
    """Names that a run has among the entries of a folder, and the folders in it."""
    names: set[str] = set()
    folders: list[str] = []
    with os.scandir(path) as entries:
        for count, entry in enumerate(entries):
            if count >= MOST_ENTRIES:
                notes.append(f"{path}: only the first {MOST_ENTRIES:,} entries were looked at")
                break
            if entry.name in FILES:
                names.add(entry.name)
            elif not entry.name.startswith(".") and _is_folder(entry):
                folders.append(entry.name)
                names.update({entry.name} & set(FOLDERS))
    return names, folders


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


def _is_run(path: str, names: set[str]) -> bool:
    """Whether a folder with these files is that of a run. config.json alone may be another program's,
    and a folder of a run that was refused has a lock alone."""
    if "metrics.jsonl" in names or ("checkpoints" in names and "lock" in names):
        return True
    return "config.json" in names and _is_config(read_object(Path(path) / "config.json"))


def _is_config(saved: dict[str, Any]) -> bool:
    return isinstance(saved.get("config"), dict) and "run_id" in saved


def read_run(path: Path, locks: dict[int, set[int]] | None = None) -> RunLine:
    """What the files of a run say.

    Args:
        path: its folder.
        locks: `held_locks`, if they are known already.
    """
    faults: list[str] = []
    saved = read_object(path / "config.json")
    if not saved and os.path.lexists(path / "config.json"):
        readable = os.access(path / "config.json", os.R_OK)
        faults.append("config.json is damaged" if readable else "config.json cannot be read")
    elif not _is_config(saved):
        faults.append("config.json is missing" if not saved else "config.json is not that of a run")
    last, best, written = _metrics(path / "metrics.jsonl", faults)
    if written is None:
        written = _time(path / "config.json")

    # The state.
    pid = _owner(path / "lock", held_locks() if locks is None else locks)
    host = saved.get(HOST)
    host = host if isinstance(host, str) else None
    elsewhere = host is not None and host != socket.gethostname()
    state: State = "failed"
    if pid is not None:
        state = "running"
    elif os.path.exists(path / "DONE"):  # `Path.exists` raises an error without permission
        state = "finished"
    elif os.path.exists(path / "PREEMPTED"):
        state = "stopped"
    elif elsewhere:
        state = "elsewhere"
    elif "step" not in last:
        state = "unreadable" if faults else "not begun"

    config, resolved = saved.get("config"), saved.get("resolved")
    return RunLine(
        path=str(path),
        state=state,
        pid=pid,
        host=host,
        recipe=_text(config, "recipe"),
        step=_whole(last, "step"),
        total_steps=_whole(resolved, "total_steps"),
        knn=_number(last, "knn"),
        knn_best=best,
        images_per_s=_number(last, "images_per_s"),
        written=written,
        fault="; ".join(faults) or None,
    )


def _metrics(path: Path, faults: list[str]) -> tuple[dict[str, Any], float | None, float | None]:
    """The newest value of each metric of interest, the best kNN, and when the file was written."""
    last: dict[str, Any] = {}
    try:
        descriptor = open_regular(path, follow=False, limit=MOST_BYTES)
    except FileNotFoundError:
        return last, None, None
    except UnfitFileError as error:
        faults.append(f"{path.name}: {reason_of(error, path)}")
        return last, None, _time(path)
    except OSError as error:
        faults.append(f"{path.name}: {error.strerror}")
        return last, None, None
    with open(descriptor, "rb") as file:
        found = os.fstat(file.fileno())
        for line in reversed(_end(file.fileno(), found.st_size, TAIL)):
            row = _row(line)
            for name in ("step", "knn", "images_per_s"):
                if name not in last and _number(row, name) is not None:
                    last[name] = row[name]
        if found.st_size and "step" not in last:
            faults.append(f"{path.name} has no line of metrics at its end")
        scores = _scores(file.fileno(), found.st_size)
    if scores:
        last["knn"] = scores[-1]
    return last, max(scores, default=None), found.st_mtime


def _end(descriptor: int, size: int, count: int) -> list[bytes]:
    """Whole lines of the last bytes of a file."""
    begin = max(0, size - count)
    lines = os.pread(descriptor, size - begin, begin).split(b"\n")
    return lines[1:] if begin else lines


def _scores(descriptor: int, size: int) -> list[float]:
    """Every kNN accuracy at the end of the file, in order. Lines with one are rare: only those are
    parsed."""
    found: list[float] = []
    begin = max(0, size - CURVE)
    rest = b""
    while begin < size:
        block = os.pread(descriptor, min(BLOCK, size - begin), begin)
        if not block:
            break
        begin += len(block)
        block = rest + block
        whole = block.rfind(b"\n") + 1
        rest = block[whole:] if len(block) - whole < BLOCK else b""
        at = block.find(b'"knn":', 0, whole)
        while at >= 0:
            start, end = block.rfind(b"\n", 0, at) + 1, block.find(b"\n", at)
            score = _number(_row(block[start:end]), "knn")
            if score is not None:
                found.append(score)
            at = block.find(b'"knn":', end, whole)
    return found


def _row(line: bytes) -> dict[str, Any]:
    """A line of metrics; empty for a damaged one."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return row if isinstance(row, dict) and type(row.get("step")) is int else {}


def _time(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except OSError:
        return None


def _owner(path: Path, locks: dict[int, set[int]]) -> int | None:
    """The process of this machine that holds a lock, if its number is written in it."""
    try:
        inode = path.stat(follow_symlinks=False).st_ino
        written = read_small(path, FILES["lock"], follow=False).strip()
    except (OSError, UnfitFileError):
        return None
    pid = int(written) if written.isdigit() and len(written) < 20 else None
    return pid if pid in locks.get(inode, ()) else None


def held_locks() -> dict[int, set[int]]:
    """Processes that hold a lock of flock on a file, by its inode: as the kernel lists them, without
    taking one. Empty where it does not."""
    found: dict[int, set[int]] = {}
    try:
        lines = Path("/proc/locks").read_text().splitlines()
    except OSError:
        return found
    for line in lines:
        words = line.split()
        if len(words) > 5 and words[1] == "FLOCK" and words[4].isdigit():
            inode = words[5].rpartition(":")[2]
            if inode.isdigit():
                found.setdefault(int(inode), set()).add(int(words[4]))
    return found


def _text(group: Any, name: str) -> str | None:
    value = group.get(name) if isinstance(group, dict) else None
    return value if isinstance(value, str) else None


def _number(group: Any, name: str) -> float | None:
    value = group.get(name) if isinstance(group, dict) else None
    known = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**63
    return value if known else None  # NaN is no number of JSON, and compares as false


def _whole(group: Any, name: str) -> int | None:
    value = _number(group, name)
    return int(value) if value is not None else None
