"""One checkpoint folder on the disk: names, durable writes, the commit marker and what it vouches for."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

TENSORS, STATE, MARKER = "tensors.safetensors", "state.json", "COMMITTED"
FORMAT = "fastmoco-checkpoint-1"
_FOLDER = re.compile(r"step_(\d{8,})")
_HIDDEN = re.compile(r"\.(?:writing|replaced)-step_\d{8,}-[0-9a-f]{8}")


def list_checkpoints(root: Path) -> list[Path]:
    """Folders under ``root`` that carry a commit marker, oldest step first. Their content is not verified here."""
    return [path for path in _step_folders(root) if (path / MARKER).is_file()]


def unfinished_saves(root: Path) -> list[Path]:
    """What killed saves left behind: folders without a marker. Ignored on loading, swept away by the next save."""
    if not root.is_dir():
        return []
    hidden = [path for path in root.iterdir() if _HIDDEN.fullmatch(path.name) and path.is_dir()]
    return sorted(hidden + [path for path in _step_folders(root) if not (path / MARKER).is_file()])


def write_text(path: Path, text: str) -> None:
    """Write a new file (mode 0600) through to the disk."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def flush(path: Path) -> None:
    """Push a file's bytes, or a folder's list of names, through to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot flush a folder; its files are flushed by themselves.
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):
            raise
    finally:
        os.close(descriptor)


def fingerprint(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a plain file."""
    if path.is_symlink() or not path.is_file():
        raise FileNotFoundError(f"{path.name} is missing or not a plain file")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def marker_text(step: int, files: Mapping[str, Mapping[str, Any]]) -> str:
    """The exact content of the marker: a function of the step and the files, nothing else."""
    return json.dumps({"format": FORMAT, "step": step, "files": files}, indent=1)


def verify(path: Path) -> int:
    """Check every byte of a committed folder against its marker, and the marker against itself; return its step."""
    match = _FOLDER.fullmatch(path.name)
    marker = path / MARKER
    if match is None or marker.is_symlink() or not marker.is_file() or marker.stat().st_size > 4096:
        raise ValueError(f"it has no usable {MARKER} marker")
    actual = {name: fingerprint(path / name) for name in (TENSORS, STATE)}
    # The marker is a function of the step and the files, so a bit flipped in the marker itself shows as well.
    if marker.read_bytes() == marker_text(int(match[1]), actual).encode():
        return int(match[1])
    try:
        promised = json.loads(marker.read_bytes())["files"]
        changed = [name for name in actual if promised[name] != actual[name]]
    except (ValueError, KeyError, TypeError, RecursionError):
        changed = []
    if changed:
        raise ValueError(f"{' and '.join(changed)} differs in size or SHA-256 from what {MARKER} says was saved")
    raise ValueError(f"the {MARKER} marker is damaged")


def make_way(final: Path, marker: str) -> bool:
    """See that the name ``final`` is free: move aside what holds it, unless that is a valid checkpoint.

    Returns:
        False if the very content of ``marker`` is committed there already, so that nothing is left to write.

    Raises:
        FileExistsError: if another valid checkpoint stands there.
    """
    if not os.path.lexists(final):
        return True
    try:
        verify(final)
    except (OSError, ValueError):
        final.rename(final.with_name(f".replaced-{final.name}-{secrets.token_hex(4)}"))
        return True
    if (final / MARKER).read_bytes() != marker.encode():
        raise FileExistsError("another valid checkpoint of this step stands there and is never overwritten")
    return False


def commit(writing: Path, final: Path, marker: str) -> None:
    """Give a complete, flushed folder its name, then its marker. A kill in between leaves no checkpoint, and no harm."""
    writing.rename(final)
    flush(final.parent)
    write_text(final / f"{MARKER}.writing", marker)
    (final / f"{MARKER}.writing").rename(final / MARKER)
    flush(final)


def sweep(root: Path) -> None:
    """Remove what `unfinished_saves` lists. What cannot be removed stays: it is ignored anyway."""
    for leftover in unfinished_saves(root):
        shutil.rmtree(leftover, ignore_errors=True)


def prune(root: Path, *, newest: Path, keep: int) -> None:
    """Remove the oldest but ``keep``, counted back from ``newest``, whose content the caller has just hashed.

    Folders of later steps stay: a run arrives below them only if they did not verify, and then they are evidence.
    """
    committed = list_checkpoints(root)
    for path in committed[: max(0, committed.index(newest) + 1 - keep)]:
        try:
            (path / MARKER).unlink()  # first, so that a kill half-way leaves a folder that is ignored
        except OSError:
            continue
        shutil.rmtree(path, ignore_errors=True)


def _step_folders(root: Path) -> list[Path]:
    if not root.is_dir():
        return []
    found = [(int(m[1]), path) for path in root.iterdir() if (m := _FOLDER.fullmatch(path.name))]
    return [path for _, path in sorted(found) if path.is_dir() and not path.is_symlink()]
