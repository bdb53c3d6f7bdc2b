"""Save and load a whole checkpoint."""

from __future__ import annotations

import json
import math
import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastmoco.checkpoint.errors import CheckpointError
from fastmoco.checkpoint.folder import (
    STATE,
    TENSORS,
    commit,
    fingerprint,
    flush,
    list_checkpoints,
    make_way,
    marker_text,
    prune,
    sweep,
    verify,
    write_text,
)

JSON: TypeAlias = "bool | int | float | str | Sequence[JSON] | Mapping[str, JSON] | None"


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A verified checkpoint in memory.

    Attributes:
        step: optimizer steps done when it was saved.
        tensors: by name, on the CPU, contiguous, in the dtype they were saved in; they own their memory.
        state: the JSON part; tuples come back as lists.
        path: its folder.
        skipped: newer committed folders that could not be believed, newest first, each with the reason. Print them.
    """

    step: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]
    path: Path
    skipped: tuple[tuple[Path, str], ...] = ()


def save_checkpoint(
    root: Path, *, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, JSON], keep: int
) -> Path:
    """Write one checkpoint so that it exists whole or not at all, then drop all but the last ``keep``.

    A folder of the same step is replaced only if it was never committed or no longer verifies; saving the same content
    again changes nothing. One writer at a time: with several ranks, rank 0 saves.

    Args:
        root: folder of the run's checkpoints; made (mode 0700) if absent.
        step: optimizer steps done, >= 0.
        tensors: by name; any dtype safetensors knows, any device, any strides; shared storage is stored once a name.
        state: string keys, JSON values, finite floats only.
        keep: committed checkpoints to keep, this one among them. The one just written has been read back and hashed
            before an older one goes, so the last verified one is never removed.

    Returns:
        The folder ``root/step_<step>``.

    Raises:
        ValueError: if ``step`` or ``keep`` is out of range.
        CheckpointError: if something is not storable (named), the disk refuses, or a different valid checkpoint of this
            step exists. Older checkpoints are untouched then, and no partial folder is left.
    """
    if step < 0:
        raise ValueError(f"step={step}: needs a step >= 0")
    if keep < 1:
        raise ValueError(f"keep={keep}: needs at least 1 checkpoint to keep")
    storable, text = _storable(tensors), _json_text(state)
    final = root / f"step_{step:08d}"
    writing = root / f".writing-{final.name}-{secrets.token_hex(4)}"
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        sweep(root)
        writing.mkdir(mode=0o700)
        _write_tensors(writing / TENSORS, storable)
        write_text(writing / STATE, text)
        flush(writing)
        marker = marker_text(step, {name: fingerprint(writing / name) for name in (TENSORS, STATE)})
        if make_way(final, marker):
            commit(writing, final, marker)
        prune(root, newest=final, keep=keep)
    except (OSError, SafetensorError) as error:
        cure = f"Free space under {root} or make it writable, then run the same command again."
        if isinstance(error, FileExistsError):
            cure = f"Continue from it, or move {root} away."
        raise CheckpointError(
            f"{final}: the checkpoint of step {step} was not written: {error}. Earlier checkpoints are untouched. {cure}"
        ) from error
    finally:
        sweep(root)
    return final


def load_latest(root: Path) -> Checkpoint | None:
    """Load the newest checkpoint that verifies, or None where nothing was ever committed.

    Args:
        root: folder of the run's checkpoints.

    Returns:
        The checkpoint, with every newer one that was passed over and why in ``skipped``.

    Raises:
        CheckpointError: if committed folders exist and none verifies. Starting from scratch is the user's decision.
    """
    skipped: list[tuple[Path, str]] = []
    for path in reversed(list_checkpoints(root)):
        try:
            loaded = load_checkpoint(path)
        except CheckpointError as error:
            skipped.append((path, str(error)))
            continue
        return Checkpoint(
            step=loaded.step, tensors=loaded.tensors, state=loaded.state, path=path, skipped=tuple(skipped)
        )
    if not skipped:
        return None
    reasons = "\n  ".join(reason for _, reason in skipped)
    raise CheckpointError(
        f"{root}: {len(skipped)} checkpoint(s) exist and none can be trusted:\n  {reasons}\n"
        f"Put back an intact copy of one of these folders, or move {root} away to start from scratch."
    )


def load_checkpoint(path: Path) -> Checkpoint:
    """Verify and load one committed folder.

    Raises:
        CheckpointError: naming the file that is missing, changed or unreadable, and the cure.
    """
    cure = f"Restore {path.name} from a copy, or remove it to continue from an earlier checkpoint."
    try:
        step = verify(path)
        state = json.loads((path / STATE).read_bytes())
        if not isinstance(state, dict):
            raise ValueError(f"{STATE} holds a {type(state).__name__} where an object is due")
        with safe_open(path / TENSORS, framework="pt", device="cpu") as file:
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118  (not a mapping)
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise CheckpointError(f"{path}: {error}. {cure}") from error
    return Checkpoint(step=step, tensors=tensors, state=state, path=path)


def _storable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous host tensors, no two in one storage: safetensors stores each as a run of bytes of its own."""
    storable: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        if name == "__metadata__":
            raise CheckpointError("a tensor cannot be called '__metadata__': safetensors keeps that name for itself")
        if tensor.layout != torch.strided or tensor.is_meta:
            raise CheckpointError(
                f"tensor {name!r} is {tensor.layout} on {tensor.device}: it has no dense data to save"
            )
        host = tensor.detach().to("cpu").resolve_conj().resolve_neg().contiguous()
        if host.untyped_storage().data_ptr() in seen:
            host = host.clone()
        seen.add(host.untyped_storage().data_ptr())
        storable[name] = host
    return storable


def _write_tensors(path: Path, storable: dict[str, Tensor]) -> None:
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    try:
        save_file(storable, path)
    except KeyError as error:  # safetensors' table of dtypes
        names = [name for name, tensor in storable.items() if str(tensor.dtype) == str(error.args[0])]
        raise CheckpointError(f"tensors {names[:5]} are {error.args[0]}, which safetensors cannot store") from error
    path.chmod(0o600)
    flush(path)


def _json_text(state: Mapping[str, JSON]) -> str:
    _require_json(state, "state")
    return json.dumps(state, allow_nan=False, indent=1)


def _require_json(value: object, where: str) -> None:
    """Refuse, by name, what JSON would drop or change on the way."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise CheckpointError(f"{where} has the key {key!r}: JSON keeps string keys only")
            _require_json(item, f"{where}.{key}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _require_json(item, f"{where}[{index}]")
    elif isinstance(value, float) and not math.isfinite(value):
        raise CheckpointError(f"{where} is {value}: JSON knows finite numbers only; store None instead")
    elif not (value is None or type(value) in (bool, int, float, str)):
        raise CheckpointError(f"{where} is {type(value).__name__}: only JSON values can be saved beside the tensors")
