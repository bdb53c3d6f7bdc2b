"""Accuracy of a model that learns classes, on held-out images."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from fastmoco.config import Config
from fastmoco.distributed.agree import total
from fastmoco.distributed.mesh import World
from fastmoco.evaluation.embed import encoder_function, eval_mode
from fastmoco.evaluation.interface import Monitor, Unmeasurable
from fastmoco.evaluation.monitor import evenly, part_of_rank
from fastmoco_pipelines import ShardSet
from fastmoco_pipelines.spec import Device
from fastmoco_pipelines.text import redact


class AccuracyMonitor(Monitor):
    """Shares of the held-out images whose class has the largest logit, and one of the five largest.

    Every image counts once, on any number of ranks: each classifies its part, and whole numbers are
    added.

    Args:
        config: of the run; `config.accuracy` names shards and budget.
        world: this process among its peers.
        threads: DALI threads of this process.
        device: where DALI decodes.
        precision: of the model: "bf16" (autocast), "fp32" or "fp64".
        quarantine_list: list of the bad images that the run has found.

    Attributes:
        classified: images of the last measurement, bad ones not counted.

    Raises:
        ValueError: if the set has other classes than the training set.
        ShardError: if an index is missing, broken or stale, or images have no label.
    """

    name = "accuracy"
    figures: ClassVar[Mapping[str, str]] = {"top1": "top-1", "top5": "top-5"}

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
        own = config.accuracy
        super().__init__(world, every_epochs=own.every_epochs, max_share=own.max_share)
        self.config = config
        self.precision = precision
        self.quarantine_list = quarantine_list
        self.classified = 0
        self._spec = config.eval_loader_spec(
            own.test_shards or config.knn.test_shards,
            device=device,
            threads=threads,
            limit=own.max_images,
        )
        self._shards = ShardSet.open(self._spec.shards, cache=config.data)
        try:
            self._require_comparable()
        except BaseException:
            self._shards.close()
            raise
        self.chance = self._chance()

    def subject(self, objective: Any) -> nn.Module:
        """Encoder and head, as one module."""
        classifier: nn.Module = objective.classifier()
        return classifier

    def evaluate(self, encoder: nn.Module) -> Mapping[str, float]:
        """Both accuracies of a module from images to logits."""
        loader = part_of_rank(self, self._spec, self._shards, self.quarantine_list)
        counts = torch.zeros(4, dtype=torch.int64, device=self.world.device)
        with loader, eval_mode(encoder), torch.no_grad():
            logits_of = encoder_function(encoder, self.world.device, self.precision)
            for batch in loader:
                counts += _counts(logits_of(batch.images), torch.from_numpy(batch.labels))
        images, first, among_five, broken = total(counts).tolist()
        self.classified = images
        if not images:
            raise Unmeasurable(f"{redact(self._spec.shards)} has no image that can be read")
        if broken:
            raise Unmeasurable(f"the logits of {broken} of {images} images are not finite")
        return {"top1": first / images, "top5": among_five / images}

    def state_dict(self) -> dict[str, Any]:
        """The figures, and the images they are shares of."""
        return {**super().state_dict(), "classified": self.classified}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load a saved state; an empty one gives the initial state."""
        super().load_state_dict(state)
        self.classified = int(state.get("classified", 0))

    @property
    def images(self) -> int:
        """Images of the set that are classified."""
        return len(evenly(len(self._shards), self._spec.limit or 0))

    def close(self) -> None:
        """Close the files of the set."""
        self._shards.close()

    def _require_comparable(self) -> None:
        """Refuse a set whose classes are not those that are learned."""
        self._shards.require_labels(self._spec.shards, self.config.objective.label_count)
        if self.config.data.synthetic:
            return
        with ShardSet.open(self.config.data.shards, cache=self.config.data) as trained:
            classes = trained.classes
        if classes and self._shards.classes and classes != self._shards.classes:
            raise ValueError(
                f"{redact(self._spec.shards)!r} has other classes than the training set "
                f"{redact(self.config.data.shards)!r}, so its labels mean something else: pack it "
                "from the same class folders"
            )

    def _chance(self) -> dict[str, float]:
        """Accuracy of the most frequent class, and of the five most frequent ones."""
        rows = evenly(len(self._shards), self._spec.limit or 0)
        found = np.sort(np.unique(self._shards.labels_of(rows), return_counts=True)[1])[::-1]
        return {name: float(found[:n].sum() / len(rows)) for name, n in (("top1", 1), ("top5", 5))}


def _counts(logits: Tensor, labels: Tensor) -> Tensor:
    """[4] int64: images, those whose class is first and among the first five, and those with logits
    that are not finite.

    Of equal logits that of the lower class counts as the larger.
    """
    labels = labels.to(logits.device)[:, None]
    own = logits.gather(1, labels)
    before = torch.arange(logits.shape[1], device=logits.device) < labels
    rank = ((logits > own) | ((logits == own) & before)).sum(dim=1)
    broken = ~torch.isfinite(logits).all(dim=1)
    return torch.stack(
        [torch.full_like(rank, 1).sum(), (rank < 1).sum(), (rank < 5).sum(), broken.sum()]
    )
