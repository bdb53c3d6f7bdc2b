"""Save a checkpoint."""

from __future__ import annotations

import json
import math
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from fastmoco.checkpoint.choose import by_score
from fastmoco.checkpoint.errors import CheckpointError, storage_errors
from fastmoco.checkpoint.folder import (
    METADATA,
    STATE,
    TENSORS,
    commit,
    fingerprint,
    flush,
    make_way,
    marker_text,
    prune,
    sweep,
    write_text,
)
from fastmoco.checkpoint.ranks import on_every_rank, on_first_rank, rank_in, size_of
from fastmoco.checkpoint.whole_file import write_whole
from fastmoco_kernels.tensors import is_dtensor
from fastmoco_pipelines.files.small import SMALL_BYTES

JSON: TypeAlias = "bool | int | float | str | Sequence[JSON] | Mapping[str, JSON] | None"


def save_checkpoint(
    root: Path,
    *,
    step: int,
    tensors: Mapping[str, Tensor],
    state: Mapping[str, JSON],
    keep: int,
    keep_multiple: int = 0,
    keep_best: bool = False,
    group: dist.ProcessGroup | None = None,
) -> Path:
    """Write one checkpoint, which is complete or does not exist, then remove
    all but the last `keep`.

    A folder of the same step is replaced only if it was never committed or no longer verifies.
    Saving the same content again changes nothing. A single process writes one safetensors file.
    Several ranks, and a process with a sharded tensor, write one file each with
    torch.distributed.checkpoint. With a group every rank calls this, one save at a time.

    Args:
        root: folder of the run's checkpoints, the same on all ranks; created (mode 0700) if absent.
        step: number of finished optimizer steps, >= 0.
        tensors: by name; dense, any device, any strides, sharded or not, of a dtype that
            safetensors supports. Shared storage is written once for each name. An unsharded tensor
            must be equal on all ranks that hold it.
        state: string keys, JSON values, finite floats only. Rank 0's is written; the marker
            contains its `run_id` too.
        keep: number of committed checkpoints to keep, including this one. An older one is removed
            only after this one has been read back and hashed, so the last verified checkpoint is
            never removed.
        keep_multiple: the newest checkpoint at a multiple of this many steps is
            kept as well; 0: none.
        keep_best: the checkpoint with the highest score (`choose.Score`) is kept as well.
        group: ranks that save together, see `group_for_saving`; its timeout is
            the longest wait for a rank.

    Returns:
        The folder `root/step_<step>`.

    Raises:
        ValueError: if `step` or `keep` is out of range.
        CheckpointError: on every remaining rank, if an entry cannot be stored (the message names
            it), the file system fails, a rank fails, ends or hangs, or a different valid checkpoint
            of this step exists. Older checkpoints are then unchanged, and no partial folder
            remains.
    """
    if step < 0:
        raise ValueError(f"step={step}: needs a step >= 0")
    if keep < 1:
        raise ValueError(f"keep={keep}: needs at least 1 checkpoint to keep")
    final = root / f"step_{step:08d}"
    sharded = group is not None or any(map(is_dtensor, tensors.values()))
    try:
        texts = on_every_rank(partial(_require_storable, tensors, state), group)
        writing = on_first_rank(partial(_begin, root, final, texts[0]), group)
        on_every_rank(partial(_require_seen, writing), group)
        if sharded:
            from fastmoco.checkpoint.shards import write_shards

            write_shards(writing, tensors, group)
        else:
            write_whole(writing / TENSORS, tensors)
        parts = on_every_rank(lambda: _fingerprints(writing, rank_in(group), sharded), group)
        files = {name: file for part in parts for name, file in sorted(part.items())}
        _require_readable(files)
        run_id = str(state.get("run_id", ""))
        saved_at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        marker = marker_text(
            step, files, world_size=size_of(group), saved_at=saved_at, run_id=run_id
        )
        drop = partial(
            prune,
            root,
            newest=final,
            keep=keep,
            keep_multiple=keep_multiple,
            ranked=by_score if keep_best else lambda paths: (),
        )
        on_first_rank(partial(_finish, writing, final, files, marker, drop), group)
    except storage_errors() as error:
        if isinstance(error, CheckpointError) and group is None:
            raise
        raise CheckpointError(
            f"{final}: the checkpoint of step {step} was not written: {_reason(error)}. "
            f"Earlier checkpoints are untouched. {_cure(error, root)}"
        ) from error
    finally:
        if rank_in(group) == 0:
            sweep(root)
    return final


def _begin(root: Path, final: Path, state: str) -> Path:
    """Make a hidden folder next to the final one and write the JSON part into it."""
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    sweep(root)
    writing = root / f".writing-{final.name}-{secrets.token_hex(4)}"
    writing.mkdir(mode=0o700)
    write_text(writing / STATE, state)
    return writing


def _require_seen(writing: Path) -> None:
    if not (writing / STATE).is_file():
        raise CheckpointError(
            f"{writing} does not exist on this rank: every rank must see the same folder"
        )


def _fingerprints(writing: Path, rank: int, sharded: bool) -> dict[str, dict[str, Any]]:
    """Hashes of the files that this rank wrote, after closing them to other users."""
    mine = sorted(path.name for path in writing.glob(f"__{rank}_*.distcp"))
    if rank == 0:
        mine += [METADATA, STATE] if sharded else [TENSORS, STATE]
    for name in mine:
        (writing / name).chmod(0o600)
    return {name: fingerprint(writing / name) for name in mine}


def _require_readable(files: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse a checkpoint that a load would refuse."""
    limits = {STATE: SMALL_BYTES}
    if METADATA in files:
        from fastmoco.checkpoint.dcp_metadata import most_bytes

        limits[METADATA] = most_bytes(files)
    for name, most in limits.items():
        if files[name]["bytes"] > most:
            raise CheckpointError(f"{name} is larger than the {most} bytes that a load reads")


def _finish(
    writing: Path,
    final: Path,
    files: Mapping[str, Mapping[str, Any]],
    marker: str,
    drop: Callable[[], None],
) -> None:
    """Rename the folder, write its marker, and remove old checkpoints."""
    for name, file in files.items():
        if (writing / name).stat().st_size != file["bytes"]:
            raise CheckpointError(
                f"{name} does not have the size that its rank wrote: every rank must see the same folder"
            )
    flush(writing)
    if make_way(final, files):
        commit(writing, final, marker)
    drop()


def _reason(error: BaseException) -> str:
    """One line. DCP's errors contain the tracebacks of all ranks; of these the
    first line for each rank.
    """
    failures: Mapping[int, tuple[BaseException, object]] = getattr(error, "failures", {})
    if failures:
        return "; ".join(
            f"rank {rank}: {_first_line(cause)}" for rank, (cause, _) in failures.items()
        )
    return _first_line(error)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _cure(error: BaseException, root: Path) -> str:
    if isinstance(error, FileExistsError) or "never overwritten" in str(error):
        return f"Continue from it, or move {root} away."
    return f"Free space under {root} or make it writable, then run the same command again."


def _require_storable(tensors: Mapping[str, Tensor], state: Mapping[str, JSON]) -> str:
    """Refuse tensors and values that cannot be saved, by name; return the JSON part as text."""
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_meta:
            raise CheckpointError(
                f"tensor {name!r} is {tensor.layout} on {tensor.device}: it has no dense data to save"
            )
    _require_json(state, "state")
    return json.dumps(state, allow_nan=False, indent=1)


def _require_json(value: object, where: str) -> None:
    """Refuse values that JSON would drop or change, by name."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise CheckpointError(f"{where} has the key {key!r}: JSON has string keys only")
            _require_json(item, f"{where}.{key}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _require_json(item, f"{where}[{index}]")
    elif isinstance(value, float) and not math.isfinite(value):
        raise CheckpointError(
            f"{where} is {value}: JSON has finite numbers only; store None instead"
        )
    elif not (value is None or type(value) in (bool, int, float, str)):
        raise CheckpointError(
            f"{where} is {type(value).__name__}: only JSON values can be saved with the tensors"
        )
