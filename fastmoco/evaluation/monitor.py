"""kNN accuracy of the encoder during training."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from fastmoco.config import Config
from fastmoco.distributed.gather import gather_rows
from fastmoco.distributed.mesh import World
from fastmoco.evaluation.embed import embed, eval_mode
from fastmoco.evaluation.interface import Monitor
from fastmoco.evaluation.knn import knn_accuracy
from fastmoco_pipelines import ShardSet, build_eval_loader
from fastmoco_pipelines.spec import CacheSpec, Device, EvalLoaderSpec
from fastmoco_pipelines.text import redact


class KnnMonitor(Monitor):
    """The kNN accuracy of the encoder; the figure is named `knn`.

    Args:
        config: of the run; `config.knn` names shards, neighbours and budget.
        world: this process among its peers; each rank embeds its part of the images, and all get
            the same figure.
        threads: DALI threads of this process.
        device: where DALI decodes.
        precision: of the encoder: "bf16" (autocast), "fp32" or "fp64".
        quarantine_list: list of the bad images that the run has found.

    Raises:
        ValueError: if a set has no labels, or the two sets have different classes.
        ShardError: if an index is missing, broken or stale.
    """

    name = "knn"
    figures: ClassVar[Mapping[str, str]] = {"knn": "kNN"}

    def __init__(
        self,
        config: Config,
        world: World,
        *,
        threads: int,
        device: Device,
        precision: str,
        quarantine_list: Path | None = None,
    ) -> None:
        super().__init__(
            world, every_epochs=config.knn.every_epochs, max_share=config.knn.max_share
        )
        self.config = config
        self.threads = threads
        self.device = device
        self.precision = precision
        self.quarantine_list = quarantine_list
        self.bank_shards = config.knn.train_shards or config.data.shards
        _require_comparable(self.bank_shards, config.knn.test_shards, config.data)

    def evaluate(self, encoder: nn.Module) -> Mapping[str, float]:
        """Share of held-out images that kNN on the class-token features classifies correctly."""
        knn = self.config.knn
        with eval_mode(encoder):
            bank, bank_labels = self._embed(encoder, self.bank_shards, knn.max_train_images)
            queries, labels = self._embed(encoder, knn.test_shards, knn.max_test_images)
        sets = (rows.to(self.world.device) for rows in (bank, bank_labels, queries, labels))
        return {"knn": knn_accuracy(*sets, k=knn.k, temperature=knn.temperature)}

    def _embed(self, encoder: nn.Module, shards: str, limit: int) -> tuple[Tensor, Tensor]:
        """Features and labels of a set, in its order, on all ranks; each rank embeds a part."""
        data = self.config.data
        spec = EvalLoaderSpec(
            shards=shards,
            image=self.config.eval_spec(),
            batch_size=256,
            device=self.device,
            threads=self.threads,
            limit=limit or None,
            max_bad_share=data.max_bad_share,
            cache_dir=data.cache_dir,
            cache_size_gb=data.cache_size_gb,
        )
        loader = build_eval_loader(
            spec,
            rank=self.world.rank,
            world_size=self.world.world_size,
            device_id=self.world.device.index if self.device == "gpu" else None,
            quarantine_list=self.quarantine_list,
        )
        if self.report is not None:
            loader.report = self.report
        with loader:

            def encode(images: Tensor) -> Tensor:
                images = images.to(
                    self.world.device, torch.float64 if self.precision == "fp64" else torch.float32
                )
                with torch.autocast(
                    self.world.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16"
                ):
                    features: Tensor = encoder(images)
                return features

            features, labels = embed(encode, loader)
            return gather_rows(features, self.world.device), gather_rows(labels, self.world.device)


def _require_comparable(bank: str, queries: str, cache: CacheSpec) -> None:
    """Refuse sets with different classes before the first step, instead of hours later."""
    classes = []
    for pattern in (bank, queries):
        with closing(ShardSet.open(pattern, cache=cache)) as shards:
            if shards.unlabelled:
                raise ValueError(
                    f"{redact(pattern)!r} has images without a label, which kNN needs: "
                    f"pack it from one folder per class"
                )
            classes.append(shards.classes)
    if all(classes) and classes[0] != classes[1]:  # tars of other tools have no names
        raise ValueError(
            f"{redact(queries)!r} has {len(classes[1])} classes that are not the "
            f"{len(classes[0])} classes of {redact(bank)!r}; pack both "
            f"from folders with the same class names"
        )
