"""The tables of a report, and what is known of speed and memory beside the metrics."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np

from fastmoco.checkpoint import list_checkpoints
from fastmoco.checkpoint.choose import score_of
from fastmoco.checkpoint.folder import is_committed, read_marker, step_of, unfinished_saves
from fastmoco.config.serial import from_json
from fastmoco.errors import describe
from fastmoco.planning.chips import chip_named
from fastmoco.planning.costs import count_step
from fastmoco.run.listing import HOST
from fastmoco.run.report.pictures import Table
from fastmoco.run.report.reading import ReportRun
from fastmoco_pipelines.text import counted, escaped

Made = TypeVar("Made")


def tried(make: Callable[[], Made]) -> Made | str:
    """What a function makes, or the error as one sentence, whatever a damaged file has caused."""
    try:
        return make()
    except Exception as error:
        said = " ".join(describe(error).split()) or type(error).__name__
        return said if said.endswith(".") else f"{said}."


def newest_checkpoint(run: ReportRun) -> Path | None:
    """The folder of the newest committed checkpoint; None without one."""
    found = tried(lambda: list_checkpoints(run.folder.checkpoints))
    return found[-1] if isinstance(found, list) and found else None


def checkpoint_table(run: ReportRun) -> Table:
    """The checkpoints of a run, without reading their tensors."""
    folder = run.folder
    paths = tried(
        lambda: [*list_checkpoints(folder.checkpoints), *unfinished_saves(folder.checkpoints)]
    )
    if isinstance(paths, str):
        return Table(why=f"The checkpoints cannot be listed: {paths}")
    if not paths:
        return Table(why="The run has saved no checkpoint yet.")
    rows = []
    for path in paths:
        state = tried(lambda path=path: _checkpoint_row(path))  # type: ignore[misc]
        if (
            isinstance(state, str)
            and run.state in ("running", "elsewhere")
            and not is_committed(path)
        ):
            continue  # being saved, or removed since
        step = path.name.removeprefix("step_").lstrip("0") or "0"
        rows.append([step, "-", "-", "-", f"damaged: {state}"] if isinstance(state, str) else state)
    return Table(
        head=["step", "saved at (UTC)", "size", "accuracy", "state"],
        rows=rows,
        note="Sizes and marks only; fastmoco checkpoint verify reads every byte.",
    )


def _checkpoint_row(path: Path) -> list[str]:
    marker = read_marker(path)
    for name, promised in marker["files"].items():
        found, wanted = (path / name).lstat().st_size, promised["bytes"]
        if found != wanted:
            raise ValueError(f"{escaped(name)} has {found:,} bytes in place of {wanted:,}")
    size = sum(file.lstat().st_size for file in path.iterdir())
    score = score_of(path)
    ranks = counted(int(marker["world_size"]), "rank")
    return [
        f"{step_of(path):,}",
        str(marker["saved_at"]).replace("T", " ")[:19],
        f"{size / 1e6:,.1f} MB",
        str(score) if score is not None else "-",
        f"committed by {ranks}",
    ]


def environment_table(run: ReportRun) -> Table:
    """Where a run was trained, from its `config.json`."""
    resolved = run.resolved
    if not resolved:
        return Table(why="The run has no config.json that says where it was trained.")
    rows = [
        [name, str(resolved[key])]
        for key, name in (
            ("device", "device"),
            ("world_size", "processes"),
            ("precision", "precision"),
            ("threads", "CPU threads"),
            ("optimizer", "optimizer"),
            ("sample_count", "training images"),
            ("steps_per_epoch", "steps per epoch"),
            ("local_batch_size", "batch of a process"),
        )
        if key in resolved
    ]
    for key, name in (("attention", "attention"), ("plan", "batch")):
        value = resolved.get(key)
        if isinstance(value, dict):
            said = [str(value[part]) for part in ("backend", "reason") if value.get(part)]
            rows.append([name, ", ".join(said)])
    versions = resolved.get("versions")
    if isinstance(versions, dict):
        rows += [[str(name), str(version)] for name, version in versions.items()]
    if run.saved.get(HOST):
        rows.append(["machine of the newest start", str(run.saved[HOST])])
    rows.append(["run", str(run.saved.get("run_id", "-"))])
    rows.append(["folder", str(run.folder.path)])
    return Table(head=["what", "value"], rows=rows)


def speed_facts(run: ReportRun, chip: str) -> list[str]:
    """The model FLOP utilisation of a run on a named GPU, in sentences; [] without a name.

    Raises:
        ValueError: if the table of chips has no such GPU.
    """
    if not chip:
        return []
    rates = chip_named(chip)
    speed = run.series.get("images_per_s")
    config = tried(lambda: from_json(dict(run.config)))
    ranks = run.resolved.get("world_size")
    if speed is None or isinstance(config, str) or type(ranks) is not int or ranks < 1:
        return ["The MFU is unknown, because the run has no config or no speed."]
    precision = str(run.resolved.get("precision", "bf16"))
    peak = rates.peak_flops_per_s if precision == "bf16" else rates.peak_tf32_flops_per_s
    images = max(1, config.global_batch_size // ranks)
    step = tried(lambda: count_step(config, precision, images))
    if isinstance(step, str):
        return [f"The MFU is unknown: {step}"]
    rate = float(np.median(speed.values)) / ranks
    share = step.flops / images * rate / peak
    return [
        f"MFU {share:.1%}: {step.flops / images / 1e9:.3g} GFLOPs an image and {rate:,.0f} images/s on "
        f"each {rates.name}, whose peak is {peak / 1e12:,.0f} TFLOP/s."
    ]


def memory_facts(run: ReportRun) -> list[str]:
    """What is known of the memory of a run, in sentences."""
    plan = run.resolved.get("plan")
    peak = plan.get("peak_bytes") if isinstance(plan, dict) else None
    found = []
    if isinstance(peak, int | float) and 0 < peak < 1e18:
        found.append(f"Planned peak of a step: {peak / 1e9:.2f} GB, beside weights and optimizer.")
    elif isinstance(plan, dict) and plan.get("reason"):
        found.append(f"No peak was planned; why the batch is computed as it is: {plan['reason']}.")
    return found
