"""Check whether a run may continue from a checkpoint, and report what changed since the save."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from fastmoco.checkpoint import Checkpoint
from fastmoco.checkpoint.folder import STATE
from fastmoco.config import Config, Resolved
from fastmoco.config.serial import differences, flatten, from_json, marked, may_change
from fastmoco.distributed.gather import gather_rows
from fastmoco.distributed.mesh import World
from fastmoco.errors import RunError
from fastmoco.run.folder import RunFolder
from fastmoco.run.identity import RunIdentity
from fastmoco_pipelines.sampling.order import ORDER_VERSION, ORDER_VERSIONS
from fastmoco_pipelines.spec import Resume

MACHINE_FIELDS = ("world_size", "device", "threads", "optimizer", "chunk", "versions")
"""Fields of `resolved` that describe the machine. A run that continues reports their changes."""
WITHOUT_ALLOW = ("linear_probe", "finetune")
"""Recipes of commands that have no options `--allow` and `--precision`."""
SCHEDULE_FIELDS = (
    "epochs",
    "optim.lr",
    "optim.lr_scaling",
    "optim.schedule",
    "optim.warmup_epochs",
    "optim.warmup_lr",
    "optim.final_lr",
    "optim.milestones",
    "optim.milestone_factor",
)
"""Fields of the config that make the schedule of the learning rate."""


def machine_changes(checkpoint: Checkpoint, now: Mapping[str, Any]) -> list[str]:
    """Differences between the machine that wrote a checkpoint and this one, each as `name before ->
    now`."""
    before = checkpoint.state["resolved"]
    known = [name for name in MACHINE_FIELDS if name in before]
    return [f"{name} {before[name]} -> {now[name]}" for name in known if before[name] != now[name]]


def announce(
    checkpoint: Checkpoint,
    identity: RunIdentity,
    now: Mapping[str, Any],
    report: Callable[[str], None],
) -> None:
    """Report the checkpoint that a run continues from, and the changes that affect its numbers.

    Args:
        checkpoint: the one that the run continues from.
        identity: of the run.
        now: the resolved values on this machine, for `machine_changes`.
        report: called with each log line.
    """
    for warning in checkpoint.warnings:
        report(f"warning: {warning}")
    whose = (
        ""
        if checkpoint.run_id == identity.run_id
        else f", written by run {checkpoint.run_id or 'without an id'}"
    )
    report(f"continuing from {checkpoint.path.name}{whose}")
    changed = machine_changes(checkpoint, now)
    if changed:
        report(f"another set-up: {', '.join(changed)}; losses agree to rounding, not bit for bit")


def schedule_changes(checkpoint: Checkpoint, config: Config, now: Resolved) -> str | None:
    """What the learning rate does after the fields of its schedule have changed; None if they have
    not.

    Args:
        checkpoint: the one that the run continues from.
        config: given now.
        now: the resolved values of the run now.
    """
    saved = from_json(checkpoint.state["config"], file=checkpoint.path / STATE)
    old, new = flatten(saved), flatten(config)
    changed = [
        f"{name} {_shown(old[name])} -> {_shown(new[name])}"
        for name in SCHEDULE_FIELDS
        if old[name] != new[name]
    ]
    if not changed:
        return None
    from fastmoco.optim.schedule import (  # a finished run needs no optimizer
        run_end,
        run_learning_rate,
    )

    # The schedule is a function of the step alone, so both can be asked at any step.
    step = checkpoint.step
    before, after = run_learning_rate(step, saved, now), run_learning_rate(step, config, now)
    again = ": it rises again" if after > before and step > 0 else ""
    (last, reached), (last_before, reached_before) = run_end(config, now), run_end(saved, now)
    instead = (
        f"{last_before}"
        if reached == reached_before
        else f"{reached_before:g} after step {last_before}"
    )
    return (
        f"{', '.join(changed)}: the schedule spans all epochs, so the learning rate of step {step} "
        f"is {after:.3g} instead of {before:.3g}{again}, and reaches {reached:g} after step {last} "
        f"instead of {instead}"
    )


def _shown(value: Any) -> str:
    """A value of a config field in a sentence."""
    if isinstance(value, tuple):
        return ", ".join(map(_shown, value)) or "none"
    return value if isinstance(value, str) else f"{value:g}"


def require_run(checkpoint: Checkpoint | None) -> None:
    """Refuse a checkpoint that was saved outside a run and so lacks config and data state."""
    if checkpoint is not None and not {"config", "resolved", "data"} <= checkpoint.state.keys():
        raise RunError(
            f"{checkpoint.path}: no run wrote this checkpoint, so no run can continue from it; "
            "move it away"
        )


def require_same_step(checkpoint: Checkpoint | None, world: World) -> None:
    """Refuse to start if ranks would continue from different steps, for example because their
    machines do not share `out`."""
    step = checkpoint.step if checkpoint is not None else 0
    steps = gather_rows(torch.tensor([step]), world.device).tolist()
    if len(set(steps)) > 1:
        raise RunError(
            f"the ranks would continue from different steps, {steps}: "
            "every rank must see the same --out; put it on a file system that all machines share"
        )


def require_same_run(
    checkpoint: Checkpoint,
    config: Config,
    precision: str,
    same_images: bool,
    folder: RunFolder,
    allow: Sequence[str] = (),
) -> None:
    """Refuse to continue a run with another config, in another precision or on other images.

    Args:
        checkpoint: the one that the run continues from.
        config: the config given now.
        precision: its precision, resolved on this machine.
        same_images: whether `data.shards` holds the images of the checkpoint.
        folder: of the run.
        allow: fields that may differ, e.g. `optim.lr`.

    Raises:
        RunError: listing every difference, with the cure.
    """
    require_same_config(checkpoint, config, precision, folder, allow)
    if not same_images:
        raise RunError(
            f"{folder.path} was trained on other images than those now in data.shards, or on the "
            "same ones in other shards; point --data.shards at the original set, or choose another "
            "--out for a new run"
        )


def require_same_config(
    checkpoint: Checkpoint,
    config: Config,
    precision: str,
    folder: RunFolder,
    allow: Sequence[str] = (),
) -> None:
    """Refuse to continue a run with another config or in another precision.

    Each field of the config declares whether it may change always, only with `--allow`, or never
    (`Resume`).

    Args:
        checkpoint: the one that the run continues from.
        config: the config given now.
        precision: its precision, resolved on this machine.
        folder: of the run.
        allow: fields that may differ, e.g. `optim.lr`.

    Raises:
        RunError: listing every difference, with the cure.
    """
    named = [name.replace("-", "_") for name in allow]
    fixed = [name for name in named if not may_change(config, name, Resume.WITH_ALLOW)]
    if fixed:
        those = ", ".join(marked(config, Resume.WITH_ALLOW))
        raise RunError(
            f"--allow {' '.join(fixed)}: cannot change within a run; fields that can: {those}"
        )
    saved = from_json(checkpoint.state["config"], file=checkpoint.path / STATE)
    # `precision` is compared as it was resolved: the cure is to name it where it was `auto`.
    changed = [
        line
        for line in differences(saved, config)
        if not _is_among(line.partition(":")[0], ("precision", *named))
    ]
    before = checkpoint.state["resolved"]["precision"]
    if before != precision:
        cure = f" (give --precision {before})" if config.recipe not in WITHOUT_ALLOW else ""
        changed.append(f"precision on this machine: {before!r} -> {precision!r}{cure}")
    if changed:
        could = [
            name
            for line in changed
            if may_change(config, name := line.partition(":")[0], Resume.WITH_ALLOW)
        ]
        hint = (
            f", give --allow {' '.join([*named, *could])} if you mean it"
            if len(could) == len(changed) and config.recipe not in WITHOUT_ALLOW
            else ""
        )
        raise RunError(
            f"{folder.path} holds a run with another config; changed: {'; '.join(changed)}. "
            f"Repeat the original command to continue it{hint}, "
            "or choose another --out for a new run"
        )


def _is_among(name: str, fields: Sequence[str]) -> bool:
    """Whether a field of a config is one of these, or in one of these groups."""
    return any(name == field or name.startswith(f"{field}.") for field in fields)


def shuffle_window(checkpoint: Checkpoint | None) -> int | None:
    """Number of shards that a run shuffles together (0: the whole set); None for a new run."""
    return (
        int(checkpoint.state["data"].get("shuffle_window", 0)) if checkpoint is not None else None
    )


def order_version(checkpoint: Checkpoint | None) -> int:
    """Version of the order of the images: that of the run, and the newest for a new run.

    Runs from before there were versions have version 1.

    Raises:
        RunError: for a version that this fastmoco does not know.
    """
    if checkpoint is None:
        return ORDER_VERSION
    version = checkpoint.state["data"].get("order_version", 1)
    if version not in ORDER_VERSIONS:
        raise RunError(
            f"{checkpoint.path}: the run shuffles its images by version {version!r} of the order; "
            f"this fastmoco knows {' and '.join(map(str, ORDER_VERSIONS))}, and another order would "
            "show some images twice in an epoch and others never. Continue with the fastmoco that "
            "wrote the checkpoint, or a later one, or choose another --out for a new run"
        )
    return int(version)


def require_same_order(checkpoint: Checkpoint, order_digest: str) -> None:
    """Refuse to continue if the order of the images would change.

    The same images in other shards, or in windows of another size, are shuffled in another order.
    """
    if checkpoint.state["data"].get("order_digest", "") != order_digest:
        raise RunError(
            "this run would continue with another order of the images, because data.shards holds "
            "the same images in other shards, or data.shuffle_window has changed: "
            f"it has shuffled {shuffle_window(checkpoint)} shards together (0: the whole set). "
            "Point --data.shards at the original shards, and give the original "
            "--data.shuffle-window"
        )
