"""Whether a run may go on from a checkpoint here, and what a user should know if it does."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from fastmoco.checkpoint import Checkpoint
from fastmoco.config import Config
from fastmoco.config.serial import differences, from_json, marked, may_change
from fastmoco.distributed.gather import gather_rows
from fastmoco.distributed.mesh import World
from fastmoco.errors import RunError
from fastmoco.run.folder import RunFolder
from fastmoco.run.identity import RunIdentity
from fastmoco_pipelines.spec import Resume

MACHINE_FIELDS = ("world_size", "device", "threads", "optimizer", "chunk", "versions")
"""What a checkpoint says of the machine that wrote it; a change is reported when a run continues."""


def machine_changes(checkpoint: Checkpoint, now: Mapping[str, Any]) -> list[str]:
    """What differs between the machine that wrote a checkpoint and this one, each as ``name before -> now``."""
    before = checkpoint.state["resolved"]
    known = [name for name in MACHINE_FIELDS if name in before]
    return [f"{name} {before[name]} -> {now[name]}" for name in known if before[name] != now[name]]


def announce(
    checkpoint: Checkpoint, identity: RunIdentity, now: Mapping[str, Any], report: Callable[[str], None]
) -> None:
    """Say what a user should know of the checkpoint that a run continues from.

    Args:
        checkpoint: where the run stands.
        identity: of the run.
        now: what the run came to here, for `machine_changes`.
        report: takes a line.
    """
    for path, reason in checkpoint.skipped:
        report(f"passed over {path.name}: {reason}")
    whose = "" if checkpoint.run_id == identity.run_id else f", written by run {checkpoint.run_id or 'without an id'}"
    report(f"continuing from {checkpoint.path.name}{whose}")
    changed = machine_changes(checkpoint, now)
    if changed:
        report(f"another set-up: {', '.join(changed)}; losses agree to rounding, not bit for bit")


def require_run(checkpoint: Checkpoint | None) -> None:
    """Refuse a checkpoint that holds tensors and no run."""
    if checkpoint is not None and not {"config", "resolved", "data"} <= checkpoint.state.keys():
        raise RunError(
            f"{checkpoint.path}: no run wrote this checkpoint, so none can be continued from it; move it away"
        )


def require_same_step(checkpoint: Checkpoint | None, world: World) -> None:
    """Refuse ranks that would continue from different steps, as on machines that do not share ``out``."""
    step = checkpoint.step if checkpoint is not None else 0
    steps = gather_rows(torch.tensor([step]), world.device).tolist()
    if len(set(steps)) > 1:
        raise RunError(
            f"the ranks would continue from different steps, {steps}: every rank must see the same --out; "
            "put it on a file system that all machines share"
        )


def require_same_run(
    checkpoint: Checkpoint,
    config: Config,
    precision: str,
    digest: str,
    folder: RunFolder,
    allow: Sequence[str] = (),
) -> None:
    """Refuse to continue a run under another config, in another precision or on other images.

    Each field of the config says whether it is free to change, or may where the user names it (`Resume`).

    Args:
        checkpoint: where the run stands.
        config: what is wanted now.
        precision: what the config's comes to on this machine.
        digest: of the images.
        folder: of the run.
        allow: fields that may differ, e.g. ``optim.lr``.

    Raises:
        RunError: with every difference, and what can be done about it.
    """
    named = [name.replace("-", "_") for name in allow]
    fixed = [name for name in named if not may_change(config, name, Resume.WITH_ALLOW)]
    if fixed:
        those = ", ".join(marked(config, Resume.WITH_ALLOW))
        raise RunError(f"--allow {' '.join(fixed)}: cannot change within a run; those that can: {those}")
    every = differences(from_json(checkpoint.state["config"]), config)
    changed = [line for line in every if line.partition(":")[0] not in named]
    before = checkpoint.state["resolved"]["precision"]
    if before != precision:
        changed.append(f"precision on this machine: {before!r} -> {precision!r} (give --precision {before})")
    if changed:
        could = [name for line in changed if may_change(config, name := line.partition(":")[0], Resume.WITH_ALLOW)]
        hint = f", give --allow {' '.join(could)} if you mean it" if len(could) == len(changed) else ""
        raise RunError(
            f"{folder.path} holds a run of another config; changed: {'; '.join(changed)}. "
            f"Repeat the original command to continue it{hint}, or choose another --out for a new run"
        )
    if checkpoint.state["data"]["digest"] != digest:
        raise RunError(
            f"{folder.path} was trained on other images than data.shards holds now; "
            "point --data.shards at the original set, or choose another --out for a new run"
        )


def shuffle_window(checkpoint: Checkpoint | None) -> int | None:
    """The number of shards that a run has shuffled together so far (0: the whole set); None for a new run."""
    return int(checkpoint.state["data"].get("shuffle_window", 0)) if checkpoint is not None else None


def require_same_order(checkpoint: Checkpoint, order_digest: str) -> None:
    """Refuse to go on in another order of the images: cut into other shards, they are shuffled together otherwise."""
    if checkpoint.state["data"].get("order_digest", "") != order_digest:
        raise RunError(
            f"the run has shuffled the images within windows of {shuffle_window(checkpoint)} shards (0: the whole set), and "
            "data.shards now holds the same images in other shards, or data.shuffle_window is another: point "
            "--data.shards at the original shards, and leave --data.shuffle-window as it was"
        )
