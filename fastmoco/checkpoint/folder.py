"""A checkpoint folder on the disk: names, durable writes, and the commit marker
with the hashes of its files.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastmoco.checkpoint.errors import CheckpointError, DamageError
from fastmoco.checkpoint.state_form import is_count, require_state
from fastmoco_pipelines.files.small import (
    UnfitFileError,
    json_of,
    open_regular,
    read_json,
    read_small,
    require_solid,
)
from fastmoco_pipelines.files.whole import hash_file, remove, write_file
from fastmoco_pipelines.text import escaped

TENSORS, METADATA, STATE, MARKER = "tensors.safetensors", ".metadata", "state.json", "COMMITTED"
FORMAT = "fastmoco-checkpoint-3"
_ENTRIES = {"format", "step", "world_size", "saved_at", "run_id", "files", "sha256"}
_UNRELEASED_FORMATS = ("fastmoco-checkpoint-1", "fastmoco-checkpoint-2")
"""Formats of commits before 0.1.0, which are recognized but not read."""
KEPT = ".kept"
"""End of the name of a file beside a folder that was passed over though no damage is proven, and of
such a folder that made way for a save of its step. Neither is ever removed."""
MARKER_LIMIT = 64 * 2**20
"""Bytes. An entry takes about a hundred, and each rank writes one file."""
_KNOWN = re.compile(
    r"tensors\.safetensors|\.metadata|state\.json|__([0-9]{1,9})_[0-9]{1,9}\.distcp"
)
_SHA256 = re.compile(r"[0-9a-f]{64}")
_FOLDER = re.compile(r"step_([0-9]{8,})")
_HIDDEN = re.compile(r"\.(?:writing|replaced)-step_[0-9]{8,}-[0-9a-f]{8}")


def list_checkpoints(root: Path) -> list[Path]:
    """Folders under `root` with a commit marker, oldest step first. Their
    content is not verified here.
    """
    return [path for path in _step_folders(root) if is_committed(path)]


def is_committed(path: Path) -> bool:
    """Whether a folder has a commit marker; also if that cannot be told now, since what is taken for
    an unfinished save is removed.
    """
    try:
        return stat.S_ISREG((path / MARKER).stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True


def keep(path: Path) -> None:
    """Keep a folder from `prune` for good. A mark beside it says so, as the folder itself may be
    unreadable.

    Raises:
        CheckpointError: if the mark cannot be written.
    """
    mark = path.with_name(path.name + KEPT)
    try:
        write_text(mark, "passed over once; no save removes it\n")
    except FileExistsError:
        return
    except OSError as error:
        raise CheckpointError(
            f"{mark}: {error}, so {path.name} might be lost; free space and run the same command "
            "again, or move it away"
        ) from error


def keep_no_longer(path: Path) -> None:
    """Take back what `keep` did."""
    remove(str(path.with_name(path.name + KEPT)))


def is_kept(path: Path) -> bool:
    """Whether `keep` was called for a folder."""
    return os.path.lexists(path.with_name(path.name + KEPT))


def unfinished_saves(root: Path) -> list[Path]:
    """Folders without a marker, left by killed saves, and what a save has moved aside. Loading
    ignores them, and the next save removes them.
    """
    if not root.is_dir():
        return []
    hidden = [path for path in root.iterdir() if _HIDDEN.fullmatch(path.name)]
    return sorted(hidden + [path for path in _step_folders(root) if not is_committed(path)])


def step_of(path: Path) -> int:
    """The step in the name of a folder that `list_checkpoints` returned."""
    return int(path.name.removeprefix("step_"))


def write_text(path: Path, text: str) -> None:
    """Write a new file (mode 0600) and flush it to the disk."""
    with os.fdopen(
        os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8"
    ) as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def require_writable(root: Path, rank: int) -> None:
    """Write, flush and remove a small file, so that a run that cannot save is
    refused before its first step.

    Args:
        root: folder of the checkpoints; created (mode 0700) if absent.
        rank: of the caller; several ranks may call this at the same time.

    Raises:
        CheckpointError: with the error of the file system.
    """
    probe = root / f".probe-{rank}-{secrets.token_hex(4)}"
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_text(probe, "can this run save?")
    except OSError as error:
        in_the_way = isinstance(error, FileExistsError | NotADirectoryError)
        cure = "move it away" if in_the_way else "free space"
        raise CheckpointError(
            f"cannot write checkpoints to {root}: {error}; {cure} or choose another --out"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()


def flush(path: Path) -> None:
    """Flush a file's bytes, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot flush a folder; its files have been flushed one by one.
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):
            raise
    finally:
        os.close(descriptor)


def fingerprint(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a plain file.

    Raises:
        DamageError: if it is missing.
        ValueError: if it is no plain file.
        OSError: if it cannot be read.
    """
    return {"bytes": _size(path), "sha256": hash_file(path)}


def _size(path: Path) -> int:
    try:
        found = path.lstat()
    except FileNotFoundError:
        raise DamageError(f"{path.name} is missing or not a plain file") from None
    if not stat.S_ISREG(found.st_mode):  # perhaps a link to a sound file
        raise ValueError(f"{path.name} is missing or not a plain file")
    descriptor = open_regular(path, follow=False)
    try:
        require_solid(descriptor, path)
    finally:
        os.close(descriptor)
    return found.st_size


def marker_text(
    step: int,
    files: Mapping[str, Mapping[str, Any]],
    *,
    world_size: int,
    saved_at: str,
    run_id: str = "",
) -> str:
    """The exact content of a marker. Its last entry is the SHA-256 of all the entries before it.

    Args:
        step: number of optimizer steps that were finished.
        files: `fingerprint` of every file of the checkpoint, by name.
        world_size: ranks that wrote it.
        saved_at: UTC, ISO 8601.
        run_id: of the run that wrote it; "" outside a run.
    """
    body = {
        "format": FORMAT,
        "step": step,
        "world_size": world_size,
        "saved_at": saved_at,
        "run_id": run_id,
        "files": dict(files),
    }
    return json.dumps(body | {"sha256": _digest(body)}, indent=1)


def read_marker(path: Path) -> dict[str, Any]:
    """Read the marker of a folder and check it against its own hash and the
    folder's name, not yet against the files.

    Returns:
        The entries `format`, `step`, `world_size`, `saved_at`, `run_id` and `files`.

    Raises:
        ValueError: if there is none, if it has another format, or if a bit of it has changed; a
            `DamageError` if the format is this one.
        OSError: if it cannot be read.
    """
    match = _FOLDER.fullmatch(path.name)
    if match is None or not is_committed(path):
        raise DamageError(f"it has no usable {MARKER} marker")
    try:
        raw = read_small(path / MARKER, MARKER_LIMIT, follow=False)
        promised = json_of(raw, path / MARKER, strict=True)
    except UnfitFileError as error:
        raise ValueError(f"the {MARKER} marker is damaged: {error}") from error
    found = promised.get("format") if isinstance(promised, dict) else None
    if found in _UNRELEASED_FORMATS:
        raise ValueError(
            f"the {MARKER} marker has the format {found} of an unreleased version; "
            f"this version reads {FORMAT} alone, so only the version that wrote it can load it"
        )
    wrong = _fault(promised, raw, int(match[1]))
    if wrong:
        kind = DamageError if found == FORMAT else ValueError  # else perhaps of a later version
        raise kind(f"the {MARKER} marker is damaged: {wrong}")
    return {name: value for name, value in promised.items() if name != "sha256"}


def _fault(promised: Any, raw: bytes, step: int) -> str:
    """What is wrong with the content of a marker; "" if nothing is."""
    if not isinstance(promised, dict) or promised.keys() != _ENTRIES:
        return f"it has other entries than {', '.join(sorted(_ENTRIES))}"
    body = {name: value for name, value in promised.items() if name != "sha256"}
    if promised["format"] != FORMAT:
        return f"its format is not {FORMAT}"
    if json.dumps(promised, indent=1).encode() != raw or promised["sha256"] != _digest(body):
        return "its own SHA-256 is another"
    if not is_count(promised["step"]) or promised["step"] != step:
        return "step is not that of the folder's name"
    ranks = promised["world_size"]
    if not is_count(ranks, 1):
        return "world_size is no number of ranks"
    texts = promised["saved_at"], promised["run_id"]
    if not all(isinstance(text, str) and text.isprintable() and len(text) < 200 for text in texts):
        return "saved_at or run_id is no plain text"

    # The files: those of one format, each once, with size and hash, written by ranks that there are.
    files = promised["files"]
    if not isinstance(files, dict) or STATE not in files:
        return f"files does not list {STATE}"
    if (TENSORS in files) == (METADATA in files) or (TENSORS in files and len(files) > 2):
        return f"files lists neither {TENSORS} alone nor {METADATA} with its parts"
    for name, file in files.items():
        known = _KNOWN.fullmatch(name)
        if known is None or (known[1] is not None and int(known[1]) >= ranks):
            return f"files lists {escaped(name[:200])!r}, which is no file of its {ranks} rank(s)"
        if not (
            isinstance(file, dict)
            and file.keys() == {"bytes", "sha256"}
            and is_count(file["bytes"])
            and isinstance(file["sha256"], str)
            and _SHA256.fullmatch(file["sha256"])
        ):
            return f"files has no size and SHA-256 of {name}"
    return ""


def verify(path: Path) -> dict[str, Any]:
    """Check the marker of a committed folder against its own hash and every
    file against the marker.

    Files that the marker does not list are not opened.

    Returns:
        The marker.

    Raises:
        OSError: if a file cannot be read.
        DamageError: if a file is missing or has changed since the save; the message names the files.
        ValueError: if a marker is of another format, or a file no plain file.
    """
    promised = read_marker(path)
    changed = [
        name
        for name, file in promised["files"].items()
        if _size(path / name) != file["bytes"] or fingerprint(path / name) != file
    ]
    if changed:
        raise DamageError(
            f"{' and '.join(changed)} differs in size or SHA-256 from what {MARKER} lists"
        )
    return promised


def read_state(path: Path) -> dict[str, Any]:
    """The JSON part of a checkpoint, verified; its tensors are not read.

    Args:
        path: folder of the checkpoint.

    Raises:
        CheckpointError: if it is missing, changed or no JSON object.
    """
    try:
        return _verified_state(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: {error}. Restore {path.name} from a copy, or remove it."
        ) from error


def _verified_state(path: Path) -> dict[str, Any]:
    marker = read_marker(path)
    if fingerprint(path / STATE) != marker["files"][STATE]:
        raise DamageError(f"{STATE} differs in size or SHA-256 from what {MARKER} lists")
    return state_of(path, marker["run_id"])


def state_of(path: Path, run_id: str) -> dict[str, Any]:
    """The JSON part of a folder whose files have been verified.

    Args:
        path: the folder.
        run_id: of its marker.

    Raises:
        ValueError: naming the file, and what no run can have written there.
        OSError: if it cannot be read.
    """
    state = read_json(path / STATE, follow=False, strict=True)
    if not isinstance(state, dict):
        raise ValueError(f"{STATE} holds no JSON object")
    try:
        require_state(state, run_id)
    except ValueError as error:
        raise ValueError(f"{STATE}: {error}") from error
    return state


def make_way(final: Path, files: Mapping[str, Mapping[str, Any]]) -> bool:
    """Free the name `final`: move a folder of that name aside, unless it is a valid checkpoint. A
    link of that name is moved itself, wherever it leads. What is not proven to be damaged, or was
    passed over, gets a name that nothing removes.

    Returns:
        False if the same `files` are committed there already, so that nothing is left to write.

    Raises:
        FileExistsError: if the name belongs to another valid checkpoint.
    """
    if not os.path.lexists(final):
        return True
    aside = f"{final.name}{KEPT}"
    try:
        if final.is_symlink():
            raise DamageError(f"{final} is a link")
        existing = verify(final)
    except DamageError:
        aside = f".replaced-{final.name}"
    except (OSError, ValueError):
        pass  # no damage is proven
    else:
        if existing["files"] == files:
            return False
        if not is_kept(final):
            raise FileExistsError(
                "another valid checkpoint of this step exists and is never overwritten"
            )
    final.rename(final.with_name(f"{aside}-{secrets.token_hex(4)}"))
    return True


def commit(writing: Path, final: Path, marker: str) -> None:
    """Rename a complete, flushed folder, then write its marker. A kill in
    between leaves a folder that is ignored.
    """
    keep_no_longer(final)  # of a folder that had this name before
    writing.rename(final)
    flush(final.parent)
    write_file(final / MARKER, marker.encode(), mode=0o600, durable=True)
    flush(final)


def sweep(root: Path) -> None:
    """Remove what `unfinished_saves` names, of a link the link alone. What cannot be removed stays,
    because it is ignored anyway.
    """
    for leftover in unfinished_saves(root):
        if leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            remove(str(leftover))


def prune(
    root: Path,
    *,
    newest: Path,
    keep: int,
    keep_multiple: int = 0,
    ranked: Callable[[Sequence[Path]], Sequence[Path]] = lambda paths: (),
) -> None:
    """Remove all but the last `keep` checkpoints up to `newest`, whose content
    the caller has just hashed.

    Folders of later steps stay: a run saves at an earlier step only if they did not verify, and
    then they are evidence. The newest folder whose step is a multiple of `keep_multiple` stays as
    well, if that is not 0, and so does the first of those that `ranked` returns. So do all that were
    passed over (`keep`), which do not count, and all that cannot be read now though no damage is
    proven, e.g. those of a later version.
    """
    committed = list_checkpoints(root)
    committed = [path for path in committed[: committed.index(newest) + 1] if not is_kept(path)]
    old = committed[: max(0, len(committed) - keep)]
    if not old:
        return
    regular = [path for path in committed if keep_multiple and step_of(path) % keep_multiple == 0]
    kept = [*regular[-1:], *ranked(committed)[:1]]
    for path in old:
        if path in kept or not _may_go(path):
            continue
        try:
            (
                path / MARKER
            ).unlink()  # first, so that a kill in between leaves a folder that is ignored
        except OSError:
            continue
        shutil.rmtree(path, ignore_errors=True)


def _may_go(path: Path) -> bool:
    """Whether a checkpoint can be read, or is proven to be damaged. Its tensors are not read."""
    try:
        _verified_state(path)
    except DamageError:
        return True
    except (OSError, ValueError, MemoryError):
        return False
    return True


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, indent=1).encode()).hexdigest()


def _step_folders(root: Path) -> list[Path]:
    if not root.is_dir():
        return []
    found = [(int(m[1]), path) for path in root.iterdir() if (m := _FOLDER.fullmatch(path.name))]
    return [path for _, path in sorted(found) if _is_folder(path)]


def _is_folder(path: Path) -> bool:
    """Whether this is a folder itself, no link to one; also if that cannot be told now."""
    try:
        return stat.S_ISDIR(path.lstat().st_mode)
    except FileNotFoundError:
        return False
    except OSError:
        return True
