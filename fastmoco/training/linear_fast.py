"""A linear classifier on cached features: all rates and decays in one pass, chosen on held-out
training images."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from fastmoco.config import Config
from fastmoco.config.labelled import labelled_batch
from fastmoco.distributed.first_rank import first_rank_does
from fastmoco.distributed.gather import gather_rows
from fastmoco.distributed.mesh import World
from fastmoco.evaluation import linear
from fastmoco.evaluation.embed import encoder_function, eval_mode
from fastmoco.evaluation.feature_cache import FeatureCache, embed_missing
from fastmoco.evaluation.linear import LinearSettings, LinearState, Pair, Scores
from fastmoco.evaluation.monitor import OpenSet
from fastmoco.planning.free_memory import free_bytes
from fastmoco.training import setup
from fastmoco.training.accuracies import accuracies
from fastmoco.training.embed_run import (
    Shown,
    acquired,
    batches_of_set,
    feature_key,
    precision_of,
)
from fastmoco.training.encoder_source import EncoderSource
from fastmoco.training.feature_table import FeatureTable, TablePart
from fastmoco.training.probe import official_lr, probe_sets, probe_view
from fastmoco_pipelines.files.small import UnfitFileError, read_small
from fastmoco_pipelines.files.whole import write_file
from fastmoco_pipelines.loading.eval_loader import Augmented
from fastmoco_pipelines.text import counted

LRS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
"""Rates of the sweep, for a batch of 256 images; those of the official protocol are among them."""
WEIGHT_DECAYS = (0.0, 1e-6, 1e-5, 1e-4)
COPIES = 10
"""Augmented copies with which the official pair agrees with the official protocol (docs/LOG.md)."""
SAVE_SECONDS = 60.0
"""Between two saves of classifiers in training."""


@dataclass(frozen=True, kw_only=True)
class FastOptions:
    """Options of `fast_linear`.

    Attributes:
        lrs: rates for a batch of 256 images.
        weight_decays: each is tried with each rate.
        epochs: passes over the training features.
        batch_size: 0: `labelled_batch`.
        copies: augmented copies of the training images whose features are cached; epoch e trains on
            copy e modulo this number. 0: the plain images.
        crop_min: smallest share of an image's area in an augmented copy; None: `probe_view`.
        holdout: share of the training images on which the pair is chosen.
        seed: of the classifiers, the order, the copies and the held-out images.
        protocol: "moco_v3", or "mae": features are normalised by mean and variance of the training
            images, and copies have its views.
        precision: of the encoder.
        cache: folder of cached features, which all processes must see.
    """

    lrs: Sequence[float] = LRS
    weight_decays: Sequence[float] = WEIGHT_DECAYS
    epochs: int = 90
    batch_size: int = 0
    copies: int = COPIES
    crop_min: float | None = None
    holdout: float = 0.1
    seed: int = 0
    protocol: Literal["moco_v3", "mae"] = "moco_v3"
    precision: Literal["fp32", "bf16"] = "fp32"
    cache: Path

    def __post_init__(self) -> None:
        for name, least in (("epochs", 1), ("batch_size", 0), ("copies", 0), ("seed", 0)):
            value = getattr(self, name)
            if value < least:
                raise ValueError(f"{name}={value}: must be at least {least}")
        for name, values in (("lr", self.lrs), ("weight_decay", self.weight_decays)):
            if not values or not all(0 <= value < float("inf") for value in values):
                raise ValueError(f"{name}={list(values)}: needs numbers of at least 0")
        if not 0 < self.holdout < 1:
            raise ValueError(f"holdout={self.holdout:g}: a share is in (0, 1)")

    @property
    def pairs(self) -> list[Pair]:
        """All pairs, each once."""
        every = [Pair(lr, decay) for lr in self.lrs for decay in self.weight_decays]
        return list(dict.fromkeys(every))


def _named(augmented: Augmented) -> dict[str, Any]:
    """What names the features of augmented copies: caches from before there was a choice of
    `crop_misfit` keep their names."""
    found = asdict(augmented)
    if found["view"]["crop_misfit"] == "retry":
        del found["view"]["crop_misfit"]
    return found


def fast_linear(
    source: EncoderSource,
    train: str,
    test: str,
    world: World,
    options: FastOptions,
    *,
    progress: Shown,
    tell: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Accuracy of a linear classifier on the features of an encoder.

    Features are computed once and kept (`feature_cache`). One classifier for each pair is trained
    on all but a share of the training set. The pair with the highest accuracy on this share (`best`)
    and that of the official protocol (`top1`) are trained again, on the whole training set, and
    these two classifiers are scored on the test set, once.

    Args:
        source: the encoder, on `world.device`.
        train: pattern of labelled shards.
        test: pattern of labelled shards with the same classes.
        world: this process among its peers; each embeds and trains its share.
        options: see there.
        progress: shows what is done on this process.
        tell: called with sentences for the user, on every rank.

    Returns:
        The result for JSON, on every rank.

    Raises:
        ValueError: if the sets or the options do not fit, or all pairs diverge.
        RunError, ShardError: if a set or the cache cannot be read.

    Numerics: with several processes a pair is trained beside other pairs, which changes its result
    by rounding of float32 only. Features do not depend on the number of processes.
    """
    config = source.config or Config()
    threads = setup.share_cores(config)
    with (
        ExitStack() as held,
        probe_sets(train, test, config.data) as sets,
        eval_mode(source.encoder),
    ):
        if world.rank == 0:
            for note in sets.notes:
                tell(f"warning: {note}")
        job = _Job(source, world, options, progress, tell, config, threads, held)
        return job.run(sets.train, sets.test, sets.classes)


@dataclass(frozen=True)
class _Job:
    """One call of `fast_linear`."""

    source: EncoderSource
    world: World
    options: FastOptions
    progress: Shown
    tell: Callable[[str], None]
    config: Config
    threads: int
    held: ExitStack
    """Closes the caches at the end."""

    def _require_memory(self, pairs: int, classes: int) -> None:
        """Refuse classifiers that do not fit: weights, gradients and momentum of all pairs."""
        needed = 3 * 4 * pairs * classes * self.source.encoder.embed_dim
        if needed > (free := free_bytes(self.world.device)):
            raise ValueError(
                f"{counted(pairs, 'classifier')} of {classes:,} classes, one more than the highest "
                f"label, need {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} are free: number the "
                "classes from 0 on, or give fewer --lr and --weight-decay"
            )

    def run(self, train: OpenSet, test: OpenSet, classes: int) -> dict[str, Any]:
        """Embed, sweep, fit and score."""
        options = self.options
        self._require_memory(len(options.pairs), classes)
        # Features: of the images as they are, and of augmented copies.
        source = self.source
        view = probe_view(source.image, source.config, options.crop_min, protocol=options.protocol)
        identity = feature_key(self.source, self._precision, self.world)
        plain = self._cached("training set", train, identity)
        test_cache = self._cached("test set", test, identity)
        copies = [
            self._cached(
                f"training set, copy {epoch + 1} of {options.copies}",
                train,
                identity,
                Augmented(view=view, seed=options.seed, epoch=epoch),
            )
            for epoch in range(options.copies)
        ]
        table = FeatureTable(plain, copies, self.world.device)
        test_table = FeatureTable(test_cache, [], self.world.device)
        if normalised := options.protocol == "mae":
            test_table.normalise(table)
            table.normalise(table)

        # The sweep, on all but a share of the training images.
        settings = LinearSettings(
            epochs=options.epochs,
            batch_size=options.batch_size or labelled_batch(len(table)),
            seed=options.seed,
        )
        chosen = linear.held_out(table.labels, options.holdout, options.seed)
        fitted, judged = table.part(~chosen), table.part(chosen)
        pairs = options.pairs
        scores = self._sweep(fitted, judged, pairs, settings, classes, table.key)
        best = linear.best_pair(scores)

        # The official pair and the chosen one, on all of them; the test set is used once.
        official = Pair(official_lr(self.source.encoder), 0.0)

        def final() -> str:
            both = [official, pairs[best]]
            state = self._fit(table, both, settings, classes, table.key, "the last two classifiers")
            found = linear.score_linear(test_table, state)
            return json.dumps([found.top1.tolist(), found.top5.tolist()])

        top1, top5 = json.loads(first_rank_does(self.world, "linear", final))
        return {
            **self.source.facts,
            "protocol": "fast",
            **accuracies(top1[0], top5[0], len(test_table)),
            "lr": official.lr,
            "weight_decay": official.weight_decay,
            "best": {
                **accuracies(top1[1], top5[1], len(test_table)),
                "lr": pairs[best].lr,
                "weight_decay": pairs[best].weight_decay,
                "holdout_top1": round(int(scores.top1[best]) / len(judged), 6),
            },
            "images": len(test_table),
            "train_images": len(table),
            "classes": classes,
            "settings": {
                **asdict(settings),
                "momentum": linear.SGD_MOMENTUM,
                "protocol": options.protocol,
                "feature_norm": normalised,
                "copies": options.copies,
                "crop_scale": view.crop_scale if options.copies else None,
                "crop_misfit": view.crop_misfit if options.copies else None,
                "interpolation": view.interpolation if options.copies else None,
                "flip_probability": view.flip_probability if options.copies else None,
                "holdout": options.holdout,
                "holdout_images": len(judged),
                "precision": self._precision,
                "image": asdict(self.source.image),
            },
            "sweep": [
                {"lr": lr, "weight_decay": decay, "holdout_top1": round(top / len(judged), 6)}
                for (lr, decay), top in zip(pairs, scores.top1.tolist(), strict=True)
            ],
            "versions": setup.versions(),
        }

    def _cached(
        self,
        what: str,
        opened: OpenSet,
        identity: Mapping[str, Any],
        augmented: Augmented | None = None,
    ) -> FeatureCache:
        """The features of a set, computed where they are missing."""
        cache = FeatureCache(
            self.options.cache,
            {
                **identity,
                "set": opened.shards.digest,
                "augmented": None if augmented is None else _named(augmented),
            },
            sample_ids=np.arange(len(opened.shards), dtype=np.int64),
            row_bytes=4 * self.source.encoder.embed_dim,
        )
        encoder, world = self.source.encoder, self.world

        # If another command holds the cache, all processes end.
        self.held.callback(cache.close)
        first_rank_does(world, f"features of the {what}", partial(acquired, cache))
        try:
            with self.progress(f"features of the {what}") as advance:
                embed_missing(
                    cache,
                    encoder_function(encoder, world.device, self._precision),
                    batches_of_set(
                        self.config,
                        world,
                        opened.pattern,
                        opened.shards,
                        self.source.image,
                        threads=self.threads,
                        report=self.tell,
                        augmented=augmented,
                    ),
                    rank=world.rank,
                    ranks=world.world_size,
                    device=world.device,
                    progress=advance,
                )
        finally:
            cache.release()
        return cache

    @property
    def _precision(self) -> str:
        return precision_of(self.source.encoder, self.options.precision)

    def _sweep(
        self,
        fitted: TablePart,
        judged: TablePart,
        pairs: Sequence[Pair],
        settings: LinearSettings,
        classes: int,
        key: str,
    ) -> Scores:
        """The scores of all pairs on the held-out images; each process trains some of them."""
        ranks = self.world.world_size
        order = [at for rank in range(ranks) for at in range(rank, len(pairs), ranks)]
        mine = list(pairs[self.world.rank :: ranks])
        rows = torch.empty(0, 3, dtype=torch.float64)
        if mine:
            state = self._fit(
                fitted, mine, settings, classes, key, f"{counted(len(pairs), 'classifier')}"
            )
            found = linear.score_linear(judged, state)
            rows = torch.stack([one.double() for one in found], dim=1)
        gathered = gather_rows(rows, self.world.device)
        rows = torch.empty_like(gathered)
        rows[order] = gathered
        return Scores(rows[:, 0].long(), rows[:, 1].long(), rows[:, 2])

    def _fit(
        self,
        table: linear.Table,
        pairs: Sequence[Pair],
        settings: LinearSettings,
        classes: int,
        key: str,
        what: str,
    ) -> LinearState:
        """Train the classifiers of some pairs, or continue where an earlier call was killed."""
        start = linear.initial_state(
            len(pairs), classes, self.source.encoder.embed_dim, settings, self.world.device
        )
        asked = json.dumps([key, len(table), pairs, asdict(settings), classes])
        saved = _SavedState(
            self.options.cache / f"classifiers-{hashlib.sha256(asked.encode()).hexdigest()[:16]}"
        )
        state = saved.read(start)
        with self.progress(f"training {what}") as advance:
            advance(state.epoch, settings.epochs)

            def after_epoch(reached: LinearState) -> None:
                advance(reached.epoch, settings.epochs)
                saved.write(reached)

            state = linear.train_linear(table, pairs, settings, state, after_epoch=after_epoch)
        saved.remove()
        return state


_HEADER_BYTES = 1 << 16


class _SavedState:
    """Classifiers in training, in a file that an interrupted command leaves."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._written = time.monotonic()

    def read(self, start: LinearState) -> LinearState:
        """The state of the file on the device of `start`; `start` without a file, and where the
        file is not of the same classifiers."""
        own = self._tensors(start)
        size = sum(tensor.nbytes for tensor in own.values())
        try:
            found = load(read_small(self._file, size + _HEADER_BYTES, follow=False))
        except (OSError, UnfitFileError, SafetensorError):
            return start
        kinds = [{name: (t.dtype, t.shape) for name, t in each.items()} for each in (own, found)]
        if kinds[0] != kinds[1]:
            return start
        epoch = max(0, int(found.pop("epoch")))
        device = start.weight.device
        return LinearState(**{name: value.to(device) for name, value in found.items()}, epoch=epoch)

    def write(self, state: LinearState) -> None:
        """Write a state, at most once a minute."""
        if time.monotonic() - self._written < SAVE_SECONDS:
            return
        write_file(self._file, save(self._tensors(state)))
        self._written = time.monotonic()

    @staticmethod
    def _tensors(state: LinearState) -> dict[str, Tensor]:
        """All of a state, as the file has it."""
        names = ("weight", "bias", "weight_buffer", "bias_buffer")
        tensors = {name: getattr(state, name).cpu().contiguous() for name in names}
        return {**tensors, "epoch": torch.tensor(state.epoch)}

    def remove(self) -> None:
        """The classifiers are trained."""
        self._file.unlink(missing_ok=True)
