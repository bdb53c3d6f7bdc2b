"""Folders of runs with made-up metrics, for reports."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fastmoco.config.serial import to_json
from fastmoco.recipes import quickstart_digits

PLACES = ("first_block", "last_block", "heads", "total")


def write_run(
    folder: Path,
    *,
    steps: int = 120,
    seed: int = 0,
    knn: Mapping[int, float] | None = None,
    spikes: Mapping[int, float] | None = None,
    change: Mapping[int, Mapping[str, float | None]] | None = None,
    more: tuple[Mapping[str, Any], ...] = (),
    config: Mapping[str, Any] | None = None,
    done: bool = True,
) -> Path:
    """A run that has learned, unless something else is asked for.

    Args:
        folder: of the run.
        steps: all of them logged.
        seed: of the noise.
        knn: accuracy by step; default a rising one.
        spikes: factors of the first block's gradient norm by step.
        change: values by step that replace the others; None: not finite.
        more: lines behind the others.
        config: values of `config.json` that replace the others.
        done: whether the run has finished.
    """
    draw = np.random.default_rng(seed)
    rows: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        row: dict[str, Any] = {
            "step": step,
            "time": 1.7e9 + step,
            "epoch": step / 10,
            "loss": 2 + 2 * math.exp(-4 * step / steps) + 0.02 * draw.standard_normal(),
            "lr": 1e-3 * math.cos(1.5 * step / steps),
            "ema_momentum": 0.99 + 0.01 * step / steps,
            "images_per_s": 900 + 20 * draw.standard_normal(),
            "wait_share": 0.01,
            "feature_std": 0.12,
            "cosine/positive": 0.8,
            "cosine/negative": 0.05,
            "update_ratio/first_block": 1e-3,
            "loader/read_ms": 3.0,
            "loader/decode_ms": 9.0,
        }
        row |= {f"gradient_norm/{place}": 1 + 0.1 * draw.random() for place in PLACES}
        rows.append(row | (change or {}).get(step, {}))
        if step in (spikes or {}):
            rows[-1]["gradient_norm/first_block"] *= spikes[step]
            event = {
                "name": "gradient_spike",
                "layer": "first_block",
                "size": spikes[step],
                "text": f"gradient spike in first_block, {spikes[step]:.0f} x its median",
            }
            rows.append({"step": step, "time": 1.7e9 + step, "event": event})
    found = knn if knn is not None else {0: 0.2, steps // 2: 0.6, steps: 0.8}
    rows += [{"step": step, "time": 1.7e9 + step, "knn": value} for step, value in found.items()]
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row) for row in (*rows, *more)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    saved = {
        "run_id": "0" * 14,
        "config": to_json(quickstart_digits()),
        "resolved": {"total_steps": steps, "world_size": 1, "device": "cpu", "steps_per_epoch": 10},
        "curves": {
            "figures": {"knn": "kNN"},
            "lines": {"knn": {"chance": 0.1}, "loss": {"knows nothing": 3.9}},
        },
    }
    (folder / "config.json").write_text(json.dumps(saved | dict(config or {})))
    if done:
        (folder / "DONE").write_text("\n")
    return folder
