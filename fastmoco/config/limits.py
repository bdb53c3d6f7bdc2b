"""Largest numbers that fields and options take. Below them a number may be unwise, and the planner or
the loader says so; beyond them it would end in an overflow, or in an allocation of terabytes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from fastmoco_pipelines.spec import MOST_SIDE, MOST_THREADS, MOST_VIEWS, require

MOST_WIDTH = 32_768
"""Channels: a layer of so many has 4 GiB of weights. Published heads have at most 8,192."""
MOST_ROWS = 1 << 20
"""Prototypes or classes. Published runs have at most 65,536."""
MOST_NUMBER = 10**9
"""Of a field without a limit of its own: in seconds 30 years, and no product of two overflows."""
MOST: Mapping[str, int] = {
    "batch": 1 << 22,
    "classes": MOST_ROWS,
    "copies": MOST_VIEWS,
    "cores": 1 << 16,
    "epochs": 10**6,
    "global_batch_size": 1 << 22,
    "gpus": 1 << 20,
    "heads": 1024,
    "hidden_dim": MOST_WIDTH,
    "image_size": MOST_SIDE,
    "intermediate_hidden_dim": MOST_WIDTH,
    "keep": 10**6,
    "layers": 64,
    "max_side": MOST_SIDE,
    "nodes": 1 << 20,
    "patch_size": MOST_SIDE,
    "predictor_hidden_dim": MOST_WIDTH,
    "projection_dim": MOST_WIDTH,
    "prototypes": MOST_ROWS,
    "queue": 1 << 46,  # one that does not fit into the memory is refused with what it would take
    "resize": MOST_SIDE,
    "rows": 1024,
    "seed": 2**63 - 1,
    "sinkhorn_iterations": 1000,
    "size": MOST_SIDE,
    "steps": 10**6,
    "threads": MOST_THREADS,
    "window": 1024,
    "workers": MOST_THREADS,
}
"""Last part of a field's or an option's name -> its limit."""


def require_limits(group: Any, path: str = "") -> None:
    """Refuse a number of a config, or of the options of a command, that is not finite or beyond its
    limit: no schedule and no loss has a use for one, and JSON cannot store NaN or infinity.

    Args:
        group: a dataclass, with those within it.
        path: dotted name of the group with a dot at its end.

    Raises:
        FieldError: naming the field.
    """
    for entry in fields(group):
        require_limit(path + entry.name, getattr(group, entry.name), least=-MOST_NUMBER)


def require_limit(name: str, value: object, *, least: int = 0) -> None:
    """`require_limits` of one value: a number, several, or a group; texts and the like have none.

    Args:
        name: dotted name of the field.
        value: of the field.
        least: smallest number.

    Raises:
        FieldError: naming the field.
    """
    if is_dataclass(value):
        require_limits(value, f"{name}.")
        return
    if isinstance(value, tuple) and any(map(is_dataclass, value)):
        for number, one in enumerate(value):
            require_limits(one, f"{name}.{number}.")
        return
    most = MOST.get(name.rpartition(".")[2], MOST_NUMBER)
    for one in _numbers(value):
        # A whole number is finite, and may be too large to be asked.
        require(isinstance(one, int) or math.isfinite(one), name, value, "must be finite")
        require(one <= most, name, value, f"must be at most {most:,}")
        rule = "must be from 0 on" if least == 0 else f"must be at least {least:,}"
        require(one >= least, name, value, rule)


def _numbers(value: object) -> Iterator[int | float]:
    for one in value if isinstance(value, tuple) else (value,):
        if isinstance(one, int | float) and not isinstance(one, bool):
            yield one
