"""kNN accuracy of the encoder while it trains: when to measure, on which images, and within which share of the time."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastmoco.config import Config
from fastmoco.distributed.agree import of_first_rank
from fastmoco.distributed.gather import gather_rows
from fastmoco.distributed.mesh import World
from fastmoco.evaluation.embed import embed, eval_mode
from fastmoco.evaluation.knn import knn_accuracy
from fastmoco_pipelines import ShardSet, build_eval_loader
from fastmoco_pipelines.spec import CacheSpec


class KnnMonitor:
    """Measures kNN accuracy every so often, putting a measurement off while kNN has had more than its share of the time.

    Args:
        config: the run's config; ``config.knn`` names shards, neighbours and budget.
        world: this process's place; every rank embeds its part of the images, and all get the same answer.
        threads: DALI threads of this process.
        device: where DALI decodes.
        precision: the encoder's: ``"bf16"`` (autocast), ``"fp32"`` or ``"fp64"``.

    Raises:
        ValueError: if a set has no labels, or the two sets have different classes.
        ShardError: if an index is missing, broken or stale.
    """

    def __init__(
        self,
        config: Config,
        world: World,
        *,
        threads: int,
        device: Literal["cpu", "gpu"],
        precision: str,
        quarantine_list: Path | None = None,
    ) -> None:
        self.config, self.world, self.threads, self.device = config, world, threads, device
        self.precision, self.quarantine_list = precision, quarantine_list
        self.last_epoch = 0.0
        self.report: Callable[[str], None] | None = None
        self.last: float | None = None
        self.best: float | None = None
        self._spent, self._started = 0.0, time.monotonic()
        self.bank_shards = config.knn.train_shards or config.data.shards
        _require_comparable(self.bank_shards, config.knn.test_shards, config.data.cache)

    def is_due(self, epoch: float) -> bool:
        """Whether ``every_epochs`` have passed since the last measurement and the time budget allows another one.

        Every rank must ask at the same step: beyond one process rank 0's clock decides for all.
        """
        if epoch - self.last_epoch < self.config.knn.every_epochs - 1e-9:
            return False
        share = self._spent / max(time.monotonic() - self._started, 1e-9)
        return bool(of_first_rank(share <= self.config.knn.max_share, self.world.device))

    def measure(self, encoder: nn.Module, epoch: float) -> float:
        """kNN accuracy of the encoder's class-token features on the held-out shards.

        Args:
            encoder: maps [B, 3, H, W] to [B, E]; in eval mode meanwhile, and every part in its own mode
                afterwards.
            epoch: epochs trained so far, fractional.

        Returns:
            Share of held-out images classified right, in [0, 1].
        """
        began, knn = time.monotonic(), self.config.knn
        with eval_mode(encoder):
            bank, bank_labels = self._embed(encoder, self.bank_shards, knn.max_train_images)
            queries, labels = self._embed(encoder, knn.test_shards, knn.max_test_images)
        sets = (rows.to(self.world.device) for rows in (bank, bank_labels, queries, labels))
        accuracy = knn_accuracy(*sets, k=knn.k, temperature=knn.temperature)
        self.last, self.last_epoch = accuracy, epoch
        self.best = accuracy if self.best is None else max(self.best, accuracy)
        self._spent += time.monotonic() - began
        return accuracy

    def _embed(self, encoder: nn.Module, shards: str, limit: int) -> tuple[Tensor, Tensor]:
        """Features and labels of a set, in its own order, on all ranks: each embeds a part."""
        loader = build_eval_loader(
            shards,
            self.config.eval_spec(),
            batch_size=256,
            device=self.device,
            device_id=self.world.device.index if self.device == "gpu" else None,
            threads=self.threads,
            rank=self.world.rank,
            world_size=self.world.world_size,
            limit=limit or None,
            cache=self.config.data.cache,
            max_bad_share=self.config.data.max_bad_share,
            quarantine_list=self.quarantine_list,
        )
        if self.report is not None:
            loader.report = self.report
        with loader:

            def encode(images: Tensor) -> Tensor:
                images = images.to(self.world.device, torch.float64 if self.precision == "fp64" else torch.float32)
                with torch.autocast(self.world.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16"):
                    features: Tensor = encoder(images)
                return features

            features, labels = embed(encode, loader)
            return gather_rows(features, self.world.device), gather_rows(labels, self.world.device)

    def state_dict(self) -> dict[str, float | None]:
        """What continues with the run."""
        return {"last_epoch": self.last_epoch, "last": self.last, "best": self.best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a saved state; an empty one leaves the fresh state."""
        self.last_epoch = float(state.get("last_epoch", 0.0))
        self.last, self.best = state.get("last"), state.get("best")


def _require_comparable(bank: str, queries: str, cache: CacheSpec) -> None:
    """Refuse sets that cannot vote on each other, before the first step rather than after hours."""
    classes = []
    for pattern in (bank, queries):
        with closing(ShardSet.open(pattern, cache=cache)) as shards:
            if (shards.labels < 0).any():
                raise ValueError(
                    f"{pattern!r} has images without a label, kNN needs them: pack it from one folder per class"
                )
            classes.append(shards.classes)
    if all(classes) and classes[0] != classes[1]:  # tars from elsewhere have numbers without names
        raise ValueError(
            f"{queries!r} has {len(classes[1])} classes that are not the {len(classes[0])} classes of {bank!r}; "
            "pack both from folders with the same class names"
        )
