"""Synthetic inputs of any size, as a long run or a large set leaves them."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

LINES_PER_KNN = 500
"""Log lines between two lines with a kNN accuracy."""


def write_metrics(path: Path, lines: int, *, log_every: int = 10, seed: int = 0) -> Path:
    """Write a `metrics.jsonl` with the metrics that a run of MoCo v3 on shards logs.

    About 870 bytes a line. Its loss falls with noise, and its gradient norms have a spike of one
    step now and then. The first line, and every 500th from there on, is that of a kNN accuracy.

    Args:
        path: file to write; its folder is created.
        lines: in the file.
        log_every: steps between two log lines.
        seed: of the noise.

    Returns:
        `path`.
    """
    draw = random.Random(seed)
    steps = max(1, lines * log_every)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for line in range(lines):
            step = line * log_every
            row = {"step": step, "time": round(1.8e9 + 0.5 * step, 3), "epoch": step / 1251}
            if line % LINES_PER_KNN == 0:
                row["knn"] = 0.7 - 0.6 * math.exp(-3 * step / steps) + 0.01 * draw.random()
            else:
                row |= _logged(draw, step / steps)
            file.write(json.dumps(row) + "\n")
    return path


def _logged(draw: random.Random, done: float) -> dict[str, float]:
    """The metrics of a log step at a share of the run."""
    noise = [draw.random() for _ in range(20)]
    spike = 30.0 if noise[0] > 0.9999 else 1.0
    return {
        "loss": 2.0 + 4.6 * math.exp(-5 * done) + 0.2 * noise[1],
        "lr": 1e-4 * (1 + math.cos(math.pi * done)),
        "ema_momentum": 1 - 0.005 * (1 + math.cos(math.pi * done)),
        "images_per_s": 5000 + 300 * noise[2],
        "wait_share": 0.01 * noise[3],
        "feature_std": 0.06 + 0.002 * noise[4],
        "cosine/positive": 0.7 + 0.1 * noise[5],
        "cosine/negative": 0.01 * noise[6],
        "contrast/top1": 0.4 + 0.1 * noise[7],
        "contrast/top5": 0.7 + 0.1 * noise[8],
        "gradient_norm/patch_embed": spike * (0.2 + 0.2 * noise[9]),
        "gradient_norm/first_block": spike * (0.5 + 0.3 * noise[10]),
        "gradient_norm/last_block": 0.3 + 0.1 * noise[11],
        "gradient_norm/heads": 0.4 + 0.2 * noise[12],
        "gradient_norm/total": spike * (1.5 + 0.5 * noise[13]),
        "loader/read_ms": 2 * noise[14],
        "loader/draw_ms": 4 * noise[15],
        "loader/decode_ms": 10 * noise[16],
        "loader/augment_ms": 14 * noise[17],
        "loader/queue_depth": 2.0,
        "loader/quarantined": 0.0,
    }
