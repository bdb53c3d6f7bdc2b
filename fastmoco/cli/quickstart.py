"""`fastmoco quickstart`: train an encoder on digits that scikit-learn
contains, and draw pictures.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from shlex import quote

import torch

from fastmoco.cli.next_steps import program
from fastmoco.cli.output import json_log
from fastmoco.cli.train import train
from fastmoco.config import Config
from fastmoco.errors import show
from fastmoco.evaluation.embed import raw_pixels
from fastmoco.evaluation.knn import knn_accuracy
from fastmoco.recipes import quickstart_digits
from fastmoco.recipes.suggest import suggest
from fastmoco.run.folder import RunFolder
from fastmoco.training import setup
from fastmoco_pipelines import build_eval_loader, pack_digits
from fastmoco_pipelines.inspecting.preview import save_view_grid
from fastmoco_pipelines.text import escaped


def quickstart(out: Path) -> int:
    """Pack the digits, train on them, and print the kNN accuracy.

    Args:
        out: folder for `data/` (shards), `run/` (checkpoints, metrics, curves.png) and `views.png`.

    Returns:
        The exit code of the training run. Calling it again continues a stopped run.
    """
    began = time.monotonic()
    fresh = not RunFolder(out / "run").metrics.exists()
    data = out / "data"
    train_shards, test_shards = str(data / "train-*.tar"), str(data / "test-*.tar")
    if not all(list(data.glob(f"{name}-*.tar.index*")) for name in ("train", "test")):
        train_shards, test_shards = pack_digits(data, seed=0, overwrite=True)
    config = quickstart_digits()
    config = replace(
        config,
        data=replace(config.data, shards=train_shards),
        knn=replace(config.knn, test_shards=test_shards),
    )
    show(f"1/3  packed 1,797 handwritten digits (8x8 pixels) into {data}")
    views = save_view_grid(train_shards, config.data.views, out / "views.png", rows=6, seed=0)
    show(f"2/3  drew pairs of augmented views: {views}")
    print(
        f"3/3  training {config.recipe}: {config.epochs:g} epochs "
        f"of {config.global_batch_size} images per step\n"
    )
    code = train(config, out / "run", hints=False)
    if code == 0:
        _summary(
            config,
            out,
            f"after {time.monotonic() - began:.0f} s" if fresh else "in an earlier call",
        )
    return code


def _summary(config: Config, out: Path, when: str) -> None:
    """Print the accuracy, the baselines, and the next commands."""
    history = RunFolder(out / "run").read_metric("knn")
    before, after = history[0][1], history[-1][1]
    pixels = _raw_pixel_accuracy(config)
    if (log := json_log()) is not None:
        log.write("result", run=str(out / "run"), knn_before=before, knn=after, raw_pixels=pixels)
    command = program()
    run, encoder = (escaped(quote(str(out / name))) for name in ("run", "encoder.safetensors"))
    chosen = suggest("gpu" if torch.cuda.is_available() else "cpu")
    source = ("--data.images", "YOUR_IMAGES", "--knn.holdout", "10%")
    print(f"""
kNN accuracy on 360 held-out digits (k = 20, no label was used in training)
  random encoder   {before:7.1%}
  after training   {after:7.1%}     {when}
  raw pixels       {pixels:7.1%}     Pixels of these centred 8x8 digits almost suffice to classify
                               them. The quickstart shows that training works, not that it beats
                               pixels here.

pictures  {escaped(str(out / "views.png"))}, {escaped(str(out / "run" / "curves.png"))}
next      {command} checkpoint consolidate {run} --encoder --out {encoder}
          {chosen.command(*source, program=command)}
""")


def _raw_pixel_accuracy(config: Config) -> float:
    """kNN accuracy of raw pixels."""

    def read(shards: str) -> tuple[torch.Tensor, torch.Tensor]:
        threads = setup.share_cores(config)
        spec = config.eval_loader_spec(shards, device="cpu", threads=threads)
        with build_eval_loader(spec) as loader:
            return raw_pixels(loader)

    bank, bank_labels = read(config.data.shards)
    queries, labels = read(config.knn.test_shards)
    knn = config.knn
    return knn_accuracy(bank, bank_labels, queries, labels, k=knn.k, temperature=knn.temperature)
