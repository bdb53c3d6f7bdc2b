"""Lines of results: printing one, and running a process and reading its lines as they come."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from benchmarks.outcome import OK


def emit(name: str, status: str = OK, **fields: Any) -> None:
    """Print one line of results, at once.

    Args:
        name: of the figure or check.
        status: one of `benchmarks.outcome`.
        fields: further entries.
    """
    print(json.dumps({"name": name, "status": status, **fields}, default=str), flush=True)


def run_lines(
    command: Sequence[str],
    *,
    limit: float,
    log: Path,
    environment: Mapping[str, str],
    take: Callable[[dict[str, Any]], None],
    cwd: Path,
) -> int:
    """Run a process and pass on its lines as they come.

    Other output and errors go to `log`. At its limit the process and all its children are killed.

    Args:
        command: program and arguments.
        limit: seconds.
        log: file to append to.
        environment: of the process.
        take: called with every line that is a JSON object.
        cwd: folder to run in.

    Returns:
        Its exit code; 124 if the limit ended it.
    """
    with open(log, "a") as file:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=file,
            text=True,
            env=dict(environment),
            cwd=cwd,
            start_new_session=True,
        )
        assert process.stdout is not None  # noqa: S101 - a type: it was opened with a pipe
        reader = threading.Thread(target=_read, args=(process.stdout, file, take), daemon=True)
        reader.start()
        try:
            code = process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            code = 124
            file.write(f"\nended after {limit:.0f} s\n")
        finally:
            with contextlib.suppress(ProcessLookupError):  # also children that outlived it
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            reader.join(timeout=10)
    return code


def _read(stdout: IO[str], log: IO[str], take: Callable[[dict[str, Any]], None]) -> None:
    for text in stdout:
        line = _parsed(text)
        if line is None:
            log.write(text)
            continue
        try:
            take(line)
        except (
            Exception
        ):  # keep reading: later lines are needed, and a full pipe would block the process
            log.write(f"{text}{traceback.format_exc()}")


def _parsed(text: str) -> dict[str, Any] | None:
    if not text.startswith("{"):
        return None
    try:
        line = json.loads(text)
    except ValueError:
        return None
    return line if isinstance(line, dict) and "name" in line else None


def last_words(log: Path, length: int = 500) -> str:
    """The end of a log, as `end_first`."""
    if not log.exists():
        return ""
    with open(log, "rb") as file:
        file.seek(max(0, log.stat().st_size - 4 * length))
        return end_first(file.read().decode(errors="replace"), length)


def end_first(text: str, length: int) -> str:
    """The end of a text as one paragraph, its last line first: of a reason only the beginning is
    shown, and the last line of a traceback is the error."""
    lines = [line.strip() for line in text.splitlines() if line.strip(" ^~|")]
    return " | before it: ".join([*lines[-1:], " | ".join(lines[:-1])[-length:]])[:length]
