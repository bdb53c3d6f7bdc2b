"""What a run has ended in, and how two ends differ."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastmoco.checkpoint import load_latest
from fastmoco.checkpoint.errors import CheckpointError

_OF_TIME = ("time", "images_per_s", "wait_share")
_OF_TIME_BEGIN = ("loader/", "memory/", "slow/", "straggler/")


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """The last state of a run.

    Attributes:
        step: its last step.
        tensors: weights, momentum encoder and optimizer, by name.
        state: the JSON part, without what names the run.
        rows: of the metrics, by step, without what depends on time.
        repeated: steps with several rows.
    """

    step: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]
    rows: dict[int, dict[str, Any]]
    repeated: int


def end_of(run: Path) -> End:
    """The end of the run in a folder.

    Raises:
        CheckpointError: if no checkpoint verifies, or there is none.
    """
    found = load_latest(run / "checkpoints")
    if found is None:
        raise CheckpointError(f"{run}: no checkpoint")
    state = _lasting({name: value for name, value in found.state.items() if name != "run_id"})
    rows: dict[int, dict[str, Any]] = {}
    repeated = 0
    metrics = run / "metrics.jsonl"
    lines = metrics.read_text(errors="replace").splitlines() if metrics.is_file() else []
    for line in lines:
        try:
            row = json.loads(line)
            step = int(row["step"])
        except (ValueError, KeyError, TypeError):
            continue
        kept = {
            name: value
            for name, value in row.items()
            if name not in _OF_TIME and not name.startswith(_OF_TIME_BEGIN)
        }
        if "loss" in kept:
            repeated += step in rows
            rows[step] = kept
    return End(step=found.step, tensors=found.tensors, state=state, rows=rows, repeated=repeated)


def _lasting(state: dict[str, Any]) -> dict[str, Any]:
    """A state without sentences, which may name the memory that was free."""
    return {
        name: _lasting(value) if isinstance(value, dict) else value
        for name, value in state.items()
        if not name.endswith("reason")
    }


def differences(ours: End, theirs: End) -> list[str]:
    """What of the state differs, in words; empty for the same bits."""
    if ours.step != theirs.step:
        return [f"step {ours.step} instead of {theirs.step}"]
    found = [f"{name} is missing or new" for name in ours.tensors.keys() ^ theirs.tensors.keys()]
    for name in ours.tensors.keys() & theirs.tensors.keys():
        a, b = ours.tensors[name], theirs.tensors[name]
        if a.dtype != b.dtype or a.shape != b.shape or _bits(a) != _bits(b):
            found.append(f"{name} has other bits")
    if ours.state != theirs.state:
        names = [
            n for n in {**ours.state, **theirs.state} if ours.state.get(n) != theirs.state.get(n)
        ]
        found.append(f"state: {', '.join(names)}")
    return found


def row_differences(ours: End, theirs: End) -> list[str]:
    """What of the rows differs."""
    found = [f"step {step}" for step in theirs.rows if ours.rows.get(step) != theirs.rows[step]]
    found += [f"step {step} is too much" for step in ours.rows.keys() - theirs.rows.keys()]
    return found + ([f"{ours.repeated} rows repeated"] if ours.repeated else [])


def _bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
