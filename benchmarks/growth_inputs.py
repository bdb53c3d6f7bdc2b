"""Synthetic inputs of any size, as a long run or a large set leaves them."""

from __future__ import annotations

import hashlib
import json
import math
import random
from pathlib import Path

import numpy as np

from fastmoco_pipelines.files.whole import write_file, write_json
from fastmoco_pipelines.formats.index import index_path, json_path
from fastmoco_pipelines.formats.index_file import ShardIndex, to_bytes
from fastmoco_pipelines.formats.index_json import json_content

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


def make_set(folder: Path, samples: int, *, per_shard: int = 2500, form: str = "binary") -> str:
    """Indexes of a set, beside tars that are holes of the right size and take no room.

    Args:
        folder: for the set; what is there already, of the same arguments, is used again.
        samples: of the set.
        per_shard: samples of each shard; 2,500 photographs of 110 kB are a shard of 275 MB.
        form: of the indexes, "binary" or "json".

    Returns:
        The pattern of the tars.
    """
    pattern = f"{folder}/train-*.tar"
    whole = folder / "whole"
    if whole.exists():
        return pattern
    folder.mkdir(parents=True, exist_ok=True)
    zeros = hashlib.sha256(bytes(8192)).hexdigest()  # of the ends of each tar
    rng = np.random.default_rng(0)
    for number, first in enumerate(range(0, samples, per_shard)):
        count = min(per_shard, samples - first)
        size = rng.integers(60_000, 160_000, count)
        # Whole blocks, and those of a label and two headers, to the next image.
        offset = np.cumsum([512, *(-(-size[:-1] // 512) * 512 + 1536)])
        tar = folder / f"train-{number:06d}.tar"
        tar_bytes = int(offset[-1] + size[-1]) + 8192
        columns = {
            "offset": offset,
            "size": size,
            "crc32": rng.integers(0, 2**32, count),
            "label": rng.integers(0, 1000, count),
            "height": rng.integers(300, 500, count),
            "width": rng.integers(300, 500, count),
        }

        # An index is written last and whole, so this shard is complete. Its numbers were drawn, as
        # those of the next shard follow them.
        path = json_path(tar) if form == "json" else index_path(tar)
        if path.exists():
            continue
        with open(tar, "wb") as file:
            file.truncate(tar_bytes)
        index = ShardIndex(
            tar=tar.name,
            tar_bytes=tar_bytes,
            tar_hash=zeros,
            keys=[f"{first + i:09d}" for i in range(count)],
            extensions=["jpg"] * count,
            columns={name: values.tolist() for name, values in columns.items()},
            skipped=[],
        )
        if form == "json":
            write_json(path, json_content(index), sealed=True)
        else:
            write_file(path, to_bytes(index))
    whole.touch()
    return pattern
