"""Features of sets by the encoder of a run or of a file, on one or several processes, in parts that
survive a kill."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fastmoco.checkpoint import CheckpointError
from fastmoco.config import Config
from fastmoco.config.serial import to_json
from fastmoco.distributed.first_rank import first_rank_does
from fastmoco.distributed.gather import gather_rows
from fastmoco.distributed.mesh import World
from fastmoco.evaluation.embed import LabelledRows, encoder_function
from fastmoco.evaluation.embeddings import Embeddings, ImageNames
from fastmoco.evaluation.feature_cache import (
    FeatureCache,
    embed_missing,
    encoder_digest,
    no_progress,
    share_of,
)
from fastmoco.evaluation.knn import Progress
from fastmoco.evaluation.monitor import evenly
from fastmoco.models.precision import choose_precision
from fastmoco.models.weights.foreign import Normalised
from fastmoco.training import setup
from fastmoco.training.encoder_source import EncoderSource, Which, load_source
from fastmoco.training.images import max_side_for
from fastmoco_pipelines import ShardSet, build_eval_loader
from fastmoco_pipelines.files.whole import user_cache
from fastmoco_pipelines.loading.batch import EvalBatch
from fastmoco_pipelines.loading.eval_loader import Augmented
from fastmoco_pipelines.spec import EvalSpec
from fastmoco_pipelines.text import redact

Tokens = Literal["class", "mean", "patch"]
"""The feature of the encoder; the mean of its patch tokens; or all of these."""
Shown = Callable[[str], AbstractContextManager[Progress]]
"""Shows the progress of a named work, in a context."""


def shows_nothing(what: str) -> AbstractContextManager[Progress]:
    """No progress."""
    del what
    return nullcontext(no_progress)


@dataclass(frozen=True, kw_only=True)
class StoredFeatures:
    """The features of a set, on disk until the context of `Embedder.features` ends.

    Attributes:
        cache: all its parts are there.
        shards: the set, open.
        pattern: of the shards.
        step: of the run whose encoder it is.
        world: this process among its peers.
    """

    cache: FeatureCache
    shards: ShardSet
    pattern: str
    step: int
    world: World

    @property
    def share(self) -> range:
        """The parts of this rank."""
        return share_of(self.cache.parts, self.world.rank, self.world.world_size)

    def rows(self, *, memory_bytes: int | None = None) -> LabelledRows:
        """Features and labels of this rank's share. Close the rows."""
        return self.cache.rows(self.share, memory_bytes=memory_bytes)

    def names(self) -> ImageNames:
        """Labels and numbers of all images, and on the first rank their paths. Collective.

        Raises:
            ValueError: on all ranks, if no image decodes.
        """
        none = torch.empty(0, dtype=torch.int64)
        parts = list(self.cache.labels(self.share))
        labels = gather_rows(torch.cat([none, *(part[0] for part in parts)]), self.world.device)
        samples = gather_rows(torch.cat([none, *(part[1] for part in parts)]), self.world.device)
        if not len(labels):
            raise ValueError(f"{self.pattern}: has no image that decodes")
        sample_ids = samples.numpy()
        return ImageNames(
            labels=labels,
            sample_ids=sample_ids,
            paths=self.shards.paths_of(sample_ids) if self.world.rank == 0 else [],
            classes=self.shards.classes,
            digest=self.shards.digest,
            step=self.step,
            pattern=self.pattern,
        )

    def embeddings(self) -> Embeddings:
        """Names, and the features of this rank's share in memory. Collective."""
        names = self.names()
        found = self.rows()
        size = torch.tensor([[len(found.rows), found.rows.width]])
        counts, widths = gather_rows(size, self.world.device).T.tolist()
        features = found.rows.block(0, len(found.rows))
        if not len(features):
            features = features.new_empty(0, max(widths))
        return Embeddings(
            **vars(names),
            features=features,
            first=sum(counts[: self.world.rank]),
        )


class Embedder:
    """An encoder with what it needs on this machine to embed sets.

    Args:
        source: of the encoder, on the device of `world`; it is put into eval mode.
        world: this process among its peers.
        tokens: what is kept of an image.
        report: called with each image that is left out, in a sentence.

    Attributes:
        config: of the run; for a file the default one, of which only the options of reading apply.
        step: of the run.
        max_side: pixels to which the images of a folder are shrunk when it is packed.

    Raises:
        CheckpointError: if the encoder has no such tokens.
    """

    def __init__(
        self,
        source: EncoderSource,
        world: World,
        *,
        tokens: Tokens = "class",
        report: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.config = replace(source.config or Config(), device="auto")
        self.step = source.step
        self.max_side = max_side_for(source.image.size, source.config)
        self._image = source.image
        self._world = world
        self._report = report
        self._threads = setup.share_cores(self.config)
        encoder = source.encoder.eval()
        self._precision = precision_of(
            encoder, choose_precision(self.config.precision, world.device)
        )
        function = encoder if tokens == "class" else _token_function(encoder, tokens, source)
        self._encode = encoder_function(function, world.device, self._precision)
        self._row_bytes = 4 * encoder.embed_dim * (encoder.tokens if tokens == "patch" else 1)
        self._key = {**feature_key(source, self._precision, world), "tokens": tokens}

    @contextmanager
    def features(
        self,
        sets: Sequence[tuple[str, ShardSet, int]],
        root: Path,
        *,
        shown: Shown = shows_nothing,
    ) -> Iterator[list[StoredFeatures]]:
        """The features of some sets. Collective, once in a start.

        They are computed in parts below a folder. If this process is killed, or the context ends
        with an error, the parts stay and the next call does not compute them again. If it ends
        without one, they are removed.

        Args:
            sets: for each its pattern, itself, and its largest number of images, spread over it;
                0: all.
            root: folder of the parts; that of rank 0 counts.
            shown: shows the progress, on rank 0.
        """
        world = self._world
        place = Path(first_rank_does(world, "features", lambda: str(root)))
        caches: dict[Path, FeatureCache] = {}
        found = []
        with ExitStack() as stack:
            for number, (pattern, shards, limit) in enumerate(sets):
                cache = FeatureCache(
                    place,
                    {**self._key, "set": shards.digest},
                    sample_ids=evenly(len(shards), limit),
                    row_bytes=self._row_bytes,
                )
                if cache.path in caches:  # the same set again
                    cache = caches[cache.path]
                else:
                    caches[cache.path] = cache
                    first_rank_does(world, f"features {number}", partial(acquired, cache))
                    if world.rank == 0:
                        stack.callback(cache.close)
                    show = shown if world.rank == 0 else shows_nothing
                    with show(f"embedding {redact(pattern)}") as progress:
                        self._embed(pattern, shards, cache, progress)
                found.append(
                    StoredFeatures(
                        cache=cache, shards=shards, pattern=pattern, step=self.step, world=world
                    )
                )
            yield found
            first_rank_does(world, "features used", partial(_removed, caches.values()))

    def _embed(
        self, pattern: str, shards: ShardSet, cache: FeatureCache, progress: Progress
    ) -> None:
        """Compute the parts that are missing."""
        embed_missing(
            cache,
            self._encode,
            batches_of_set(
                self.config,
                self._world,
                pattern,
                shards,
                self._image,
                threads=self._threads,
                report=self._report,
            ),
            rank=self._world.rank,
            ranks=self._world.world_size,
            device=self._world.device,
            progress=progress,
        )


def feature_key(source: EncoderSource, precision: str, world: World) -> dict[str, Any]:
    """Everything that features depend on beside the set and the view of its images, as the key of a
    `FeatureCache`: weights, what they do not show (heads), arithmetic, and what decodes images."""
    config = source.config
    return {
        "encoder": encoder_digest(source.encoder),
        "description": {} if source.description is None else asdict(source.description),
        "model": {} if config is None else to_json(config)["model"],
        "image": asdict(source.image),
        "precision": precision,
        "device": world.device.type,
        "decoder": setup.data_device(config or Config(), world),
        # An encoder that is evaluated has no layer of torchao, which another part may have imported.
        "versions": {k: v for k, v in setup.versions().items() if k != "torchao"},
    }


def precision_of(encoder: nn.Module, asked: str) -> str:
    """The precision of an evaluation: that of the weights, if these are of float64."""
    return "fp64" if next(encoder.parameters()).dtype == torch.float64 else asked


def batches_of_set(
    config: Config,
    world: World,
    pattern: str,
    shards: ShardSet,
    image: EvalSpec,
    *,
    threads: int,
    report: Callable[[str], None],
    augmented: Augmented | None = None,
) -> Callable[[NDArray[np.int64]], Iterable[EvalBatch]]:
    """A function from numbers in a set to these images, in batches, as `embed_missing` needs it.

    Args:
        config: its options of reading apply.
        world: this process among its peers.
        pattern: of the shards.
        shards: the set, open.
        image: how an image is shown.
        threads: of decoding, where the config does not give their number.
        report: called with each image that is left out, in a sentence.
        augmented: the view of each image, in place of `image`.
    """
    device = setup.data_device(config, world)
    spec = config.eval_loader_spec(
        pattern, device=device, threads=config.data.threads or threads, image=image
    )

    def batches(sample_ids: NDArray[np.int64]) -> Iterable[EvalBatch]:
        loader = build_eval_loader(
            spec,
            device_id=world.device.index if device == "gpu" else None,
            shards=shards,
            sample_ids=sample_ids,
            augmented=augmented,
        )
        loader.report = report
        with loader:
            yield from loader

    return batches


def _token_function(
    encoder: Any, tokens: Tokens, source: EncoderSource
) -> Callable[[Tensor], Tensor]:
    """From images to the mean of the patch tokens, or to all of them."""
    all_tokens: Callable[[Tensor], Tensor] | None = getattr(encoder, "token_features", None)
    if all_tokens is None:
        raise CheckpointError(
            f"--tokens {tokens}: {source.facts['source']} is a {type(encoder).__name__}, and only "
            "vision transformers have patch tokens; take --tokens class, its feature"
        )
    if tokens == "patch":
        return all_tokens
    return lambda images: all_tokens(images).mean(1)


def acquired(cache: FeatureCache) -> str:
    """Acquire a cache, as work of `first_rank_does`."""
    cache.acquire()
    return ""


def _removed(caches: Iterable[FeatureCache]) -> str:
    for cache in caches:
        cache.remove()
    return ""


def parts_folder(run: Path, source: EncoderSource) -> Path:
    """Where the parts of features by an encoder are kept: in its run, if that can be written,
    otherwise in the user's cache.

    Args:
        run: as given to `load_source`.
        source: that it returned.

    Raises:
        OSError: if this user has no home folder.
    """
    if source.config is not None:
        folder = run if (run / "checkpoints").is_dir() else run.resolve().parents[1]
        if os.access(folder, os.W_OK):
            return folder / "features"
    return user_cache() / "features"


@contextmanager
def embed_run(
    run: Path,
    sets: Sequence[tuple[str, int]],
    world: World,
    *,
    which: Which | None = None,
    best: bool = False,
    heads: int | None = None,
    normalised: Normalised | None = None,
    tokens: Tokens = "class",
    root: Path | None = None,
    locate: Callable[[str, int], str] = lambda pattern, max_side: pattern,
    report: Callable[[str], None] = lambda text: None,
    shown: Shown = shows_nothing,
) -> Iterator[tuple[EncoderSource, list[StoredFeatures]]]:
    """Features of some sets by the encoder of a run or of a file. Collective.

    Args:
        run: folder of the run, or of one checkpoint, or a file of weights.
        sets: for each its pattern and its largest number of images, spread over it; 0: all.
        world: this process among its peers.
        which: the encoder of a run.
        best: the checkpoint with the highest kNN accuracy, in place of the newest.
        heads: attention heads, for a file of a ViT that does not show them.
        normalised: how images were normalised, for a file that does not say it.
        tokens: what is kept of an image.
        root: folder of the parts of features; None: that of `parts_folder`.
        locate: returns the shards of a pattern, which may be a folder of images, whose images are
            shrunk to so many pixels; called on rank 0.
        report: called with each image or checkpoint that is left out, in a sentence.
        shown: shows the progress.

    Returns:
        The source of the encoder, and the features, which are on disk until the context ends.

    Raises:
        RunError, CheckpointError: as of `load_source` and `Embedder`.
        ShardError, ValueError: if a set cannot be opened.
    """
    source = load_source(
        run, world.device, which=which, best=best, heads=heads, normalised=normalised
    )
    if world.rank == 0:
        for note in source.notes:
            report(note)
    embedder = Embedder(source, world, tokens=tokens, report=report)
    with ExitStack() as stack:
        opened = []
        for number, (given, limit) in enumerate(sets):
            pattern = first_rank_does(
                world, f"set {number}", partial(locate, given, embedder.max_side)
            )
            shards = ShardSet.open(pattern, cache=embedder.config.data)
            stack.callback(shards.close)
            opened.append((pattern, shards, limit))
        place = root if root is not None else parts_folder(Path(run), source)
        yield source, stack.enter_context(embedder.features(opened, place, shown=shown))
