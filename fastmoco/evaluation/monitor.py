"""kNN accuracy of the encoder during training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import nn

from fastmoco.config import Config
from fastmoco.distributed.mesh import World
from fastmoco.evaluation.embed import LabelledRows, embed_part, encoder_function, eval_mode
from fastmoco.evaluation.interface import Monitor
from fastmoco.evaluation.knn import shared_knn_accuracy
from fastmoco.evaluation.meaning import Meaning, meaning
from fastmoco_pipelines import EvalLoader, ShardSet, build_eval_loader
from fastmoco_pipelines.spec import CacheSpec, Device, EvalLoaderSpec
from fastmoco_pipelines.text import redact


class KnnMonitor(Monitor):
    """The kNN accuracy of the encoder; the figure is named `knn`.

    Args:
        config: of the run; `config.knn` names shards, neighbours and budget.
        world: this process among its peers; each rank embeds its part of the images, keeps its part
            of the bank, and all get the same figure.
        threads: DALI threads of this process.
        device: where DALI decodes.
        precision: of the encoder: "bf16" (autocast), "fp32" or "fp64".
        quarantine_list: list of the bad images that the run has found.
        memory_bytes: gives the largest size of a set's features in the memory of this process, when
            it is measured; larger ones are in a temporary file. None: all in memory.
        scratch: folder of that file; None: that of `TMPDIR`.

    The sets are opened once; between measurements their files are closed.

    Raises:
        ValueError: if a set has no labels, the two sets have different classes, or class names
            are known for one of them alone.
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
        memory_bytes: Callable[[], int | None] | None = None,
        scratch: Path | None = None,
    ) -> None:
        super().__init__(
            world, every_epochs=config.knn.every_epochs, max_share=config.knn.max_share
        )
        self.config = config
        self.threads = threads
        self.device = device
        self.precision = precision
        self.quarantine_list = quarantine_list
        self.memory_bytes = memory_bytes
        self.scratch = scratch
        bank = config.knn.train_shards or config.data.shards
        self._bank, self._queries = open_comparable(bank, config.knn.test_shards, config.data)
        self._judge()

    def evaluate(self, encoder: nn.Module) -> Mapping[str, float]:
        """Share of held-out images that kNN on the class-token features classifies correctly."""
        knn = self.config.knn
        with ExitStack() as stack:
            stack.enter_context(eval_mode(encoder))
            parts = []
            # An error of one rank is raised at once: the others may embed for much longer than a
            # collective waits.
            for opened, limit in (
                (self._bank, knn.max_train_images),
                (self._queries, knn.max_test_images),
            ):
                parts.append(self._embed(encoder, opened, limit))
                stack.callback(parts[-1].rows.close)
            accuracy = shared_knn_accuracy(
                *parts, device=self.world.device, k=knn.k, temperature=knn.temperature
            )
        return {"knn": accuracy}

    def _judge(self) -> None:
        """What an accuracy between these sets can mean, by labels and checksums in the indexes."""
        knn = self.config.knn
        found = judge(
            self._bank.shards,
            self._queries.shards,
            k=knn.k,
            max_bank=knn.max_train_images,
            max_queries=knn.max_test_images,
        )
        if found is None:
            return
        self.idle = found.says_nothing
        self.notes = tuple(f"kNN: {note}" for note in found.notes)
        self.chance = {} if self.idle else {"knn": found.chance}

    @property
    def images(self) -> int:
        """Images of the bank and of the queries."""
        knn = self.config.knn
        sets = ((self._bank, knn.max_train_images), (self._queries, knn.max_test_images))
        return sum(min(len(each.shards), limit or len(each.shards)) for each, limit in sets)

    def close(self) -> None:
        """Close the files of both sets."""
        self._bank.shards.close()
        self._queries.shards.close()

    def _embed(self, encoder: nn.Module, opened: OpenSet, limit: int) -> LabelledRows:
        """Features and labels of this rank's part of a set, in its order."""
        spec = self.config.eval_loader_spec(
            opened.pattern, device=self.device, threads=self.threads, limit=limit
        )
        with part_of_rank(self, spec, opened.shards, self.quarantine_list) as loader:
            encode = encoder_function(encoder, self.world.device, self.precision)
            limit_bytes = self.memory_bytes() if self.memory_bytes is not None else None
            return embed_part(encode, loader, memory_bytes=limit_bytes, folder=self.scratch)


def part_of_rank(
    monitor: Monitor, spec: EvalLoaderSpec, shards: ShardSet, quarantine_list: Path | None
) -> EvalLoader:
    """The loader of this rank's part of a set; what it leaves out is reported by the monitor."""
    world = monitor.world
    loader = build_eval_loader(
        spec,
        rank=world.rank,
        world_size=world.world_size,
        device_id=world.device.index if spec.device == "gpu" else None,
        quarantine_list=quarantine_list,
        shards=shards,
    )
    if (report := monitor.report) is not None:
        loader.report = lambda text: report(f"warning: {text}")
    return loader


@dataclass(frozen=True, slots=True)
class OpenSet:
    """A set that stays open from one measurement to the next."""

    pattern: str
    shards: ShardSet


def evenly(length: int, limit: int) -> NDArray[np.int64]:
    """The samples of a set that an evaluation uses: all, or `limit` spread over it."""
    count = min(limit, length) if limit else length
    return np.arange(count, dtype=np.int64) * length // max(count, 1)


def judge(
    bank: ShardSet, queries: ShardSet, *, k: int, max_bank: int = 0, max_queries: int = 0
) -> Meaning | None:
    """What an accuracy between two sets can mean, by labels and checksums in their indexes.

    Args:
        bank: images that vote.
        queries: images that are classified.
        k: neighbours that vote.
        max_bank: largest number of images that vote; 0: all.
        max_queries: largest number of images that are classified; 0: all.

    Returns:
        None if a set has no image.
    """
    voting, asked = evenly(len(bank), max_bank), evenly(len(queries), max_queries)
    if not len(voting) or not len(asked):
        return None
    return meaning(
        bank.labels_of(voting),
        queries.labels_of(asked),
        k=k,
        shared=shared_images(bank.checksums_of(voting), queries.checksums_of(asked)),
        classes=tuple(queries.classes),
    )


def shared_images(bank: NDArray[np.int64], queries: NDArray[np.int64]) -> int:
    """Queries whose checksum and size (`ShardSet.checksums_of`) occur in the bank."""
    keys = [table[:, 0] * 2**31 + table[:, 1] % 2**31 for table in (bank, queries)]
    return int(np.isin(keys[1], keys[0]).sum())


def open_comparable(
    bank: str, queries: str, cache: CacheSpec, *, needed_by: str = "kNN"
) -> tuple[OpenSet, OpenSet]:
    """Open both sets of an evaluation, which errors name; refuse sets with different classes before
    the first step, instead of hours later.

    Raises:
        ValueError, ShardError: as of `KnnMonitor`.
    """
    opened: list[OpenSet] = []
    with ExitStack() as undo:
        for pattern in (bank, queries):
            shards = ShardSet.open(pattern, cache=cache)
            undo.callback(shards.close)
            if shards.unlabelled:
                raise ValueError(
                    f"{redact(pattern)!r} has images without a label, which {needed_by} needs: "
                    f"pack it from one folder per class"
                )
            opened.append(OpenSet(pattern, shards))
        classes = [each.shards.classes for each in opened]
        if all(classes) and classes[0] != classes[1]:
            raise ValueError(
                f"{redact(queries)!r} has {len(classes[1])} classes that are not the "
                f"{len(classes[0])} classes of {redact(bank)!r}; pack both "
                f"from folders with the same class names"
            )
        # Without names on one side, a number may mean another class there.
        if any(classes) and not all(classes):
            unnamed, named = (bank, queries) if classes[1] else (queries, bank)
            raise ValueError(
                f"{redact(unnamed)!r} has numbers as labels, without the names of their classes, "
                f"and {redact(named)!r} has names, so that one number may mean two classes: copy "
                f"the manifest.json of {redact(unnamed)!r} beside its shards, or pack or index "
                "both alike"
            )
        undo.pop_all()
    return opened[0], opened[1]
