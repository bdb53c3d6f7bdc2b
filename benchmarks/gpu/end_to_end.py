"""From JPEG shards to a kNN figure: sixty steps of ViT-S through DALI, or three
of a tiny encoder in a dry run.
"""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.gpu.lines import emit
from benchmarks.outcome import FAILED, OK, SKIPPED

NAME = "JPEG shards to kNN"
CLASSES = 4
LEARNT = 1.5 / CLASSES
"""kNN accuracy that even a barely trained encoder reaches on images of such different colors."""


def main() -> int:
    """Train and evaluate; returns 1 if the result is implausible."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--only", default="")
    dry = parser.parse_args().dry_run
    for module in ("nvidia.dali", "webdataset"):
        if not _has(module):
            emit(NAME, SKIPPED, reason=f"needs {module}, which is not here")
            return 0
    with tempfile.TemporaryDirectory() as folder:
        return _run(Path(folder), dry)


def _has(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # nor its parent package
        return False


def _run(folder: Path, dry: bool) -> int:
    from fastmoco.config import Config, DataConfig, KnnConfig
    from fastmoco.distributed.mesh import start_world
    from fastmoco.recipes import vit_nano8_e60_b256, vit_s16_e300_b1024
    from fastmoco.run.folder import RunFolder
    from fastmoco.training.trainer import Trainer
    from fastmoco_pipelines.making.pack import pack_folder

    batch, warm, steps = (8, 1, 3) if dry else (512, 10, 60)
    side = 40 if dry else 400
    train = pack_folder(
        _pictures(folder / "train", 2 * batch, side, 0), folder / "train-shards"
    ).pattern
    test = pack_folder(_pictures(folder / "test", batch, side, 1), folder / "test-shards").pattern

    base: Config = vit_nano8_e60_b256() if dry else vit_s16_e300_b1024()
    config = replace(
        base,
        device="cpu" if dry else "gpu",
        threads=1 if dry else 14,
        global_batch_size=batch,
        epochs=steps / 2,
        log_every_steps=20,
        data=replace(base.data, shards=train) if dry else DataConfig(shards=train),
        knn=replace(KnnConfig(), test_shards=test, every_epochs=1e6),
        optim=replace(base.optim, warmup_epochs=0),
    )

    # Time the steps after the warm-up.
    out = folder / "run"
    trainer = Trainer.build(config, out, start_world(config.device))
    try:
        trainer.run(max_steps=warm)
        began = time.monotonic()
        trainer.run(
            max_steps=steps - warm
        )  # the last step is logged, which waits for the device, and evaluated
        seconds = time.monotonic() - began
    finally:
        trainer.close()

    # Judge the accuracy, and report.
    accuracy = RunFolder(out).read_metric("knn")[-1][1]
    fault = (
        "" if dry or accuracy >= LEARNT else f"kNN accuracy {accuracy:.2f}, no better than chance"
    )
    rate = round((steps - warm) * batch / seconds, 1)
    emit(
        NAME,
        FAILED if fault else OK,
        reason=fault,
        images_per_s_with_knn=rate,
        knn=accuracy,
        steps=steps,
    )
    return int(bool(fault))


def _pictures(folder: Path, count: int, side: int, seed: int) -> Path:
    """JPEGs of smooth noise, a folder for each class, each class with its own color."""
    rng = np.random.default_rng(seed)
    for number in range(count):
        label = number % CLASSES
        place = folder / f"class{label}"
        place.mkdir(parents=True, exist_ok=True)
        coarse = rng.integers(0, 128, (9, 12, 3), dtype=np.uint8)
        coarse[..., label % 3] += np.uint8(100 if label < 3 else 0)
        picture = Image.fromarray(coarse).resize((side * 4 // 3, side), Image.Resampling.BICUBIC)
        picture.save(place / f"{number:05d}.jpg", quality=90)
    return folder


if __name__ == "__main__":
    raise SystemExit(main())
