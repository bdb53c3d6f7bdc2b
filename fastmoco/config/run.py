"""The config of a run: a tree of frozen dataclasses that check their values when constructed.

Imports neither torch nor DALI. Batch sizes are global unless the name contains `local`. `resolve`
computes the numbers that depend on the world size and the data set once, and returns them as a new
object. Both are written as JSON beside every checkpoint (`serial.py`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Annotated, Literal

from fastmoco.config.data import AccuracyConfig, DataConfig, KnnConfig
from fastmoco.config.faults import FaultConfig
from fastmoco.config.limits import require_limits
from fastmoco.config.model import ModelConfig
from fastmoco.config.objective import MoCoV3Config, ObjectiveConfig
from fastmoco.config.optim import OptimConfig
from fastmoco.config.parallel import ParallelConfig
from fastmoco.config.trackers import TrackersConfig
from fastmoco_pipelines.spec import (
    Device,
    EvalLoaderSpec,
    EvalSpec,
    LoaderOptions,
    LoaderSpec,
    Resume,
    require,
)

SMALL_SIDE = 64
"""Pixels up to which an image is small: it is not resized for an evaluation."""
EVAL_BATCH = 256
"""Images that an evaluation passes through the encoder together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchConfig:
    """How a process passes its part of a batch through the encoder: whole or in chunks
    (micro-batches)."""

    chunk: Literal["auto", "none"] | int = "auto"
    """Images per pass through the encoder (a micro-batch); the gradients are those of the whole.
    `none`: all; `auto`: all if they fit into the free memory, else a chunk that fits."""
    kept: Literal["auto"] | int = "auto"
    """Chunks that keep their activations and need no second forward; `auto`: as many as fit,
    including parts of chunks."""
    activation_budget: Literal["auto"] | float = "auto"
    """Share of its activations that a compiled block keeps for its backward. 1: all inputs of
    products; 0.9: those that elementwise operations cannot recompute; below that, products are
    recomputed too. `auto`: 1 or 0.9, whichever fits with less recomputation."""
    cuda_graphs: bool = False
    """For chunks that keep nothing, replay the trunk's kernels instead of launching them from
    Python. Needs CUDA, one process or ddp, and no `model.checkpointing`. The gradients are the
    same; it takes more memory."""

    def __post_init__(self) -> None:
        budget = self.activation_budget
        share = budget == "auto" or (isinstance(budget, int | float) and 0 <= budget <= 1)
        require(share, "activation_budget", budget, "must be auto, or a share in [0, 1]")
        for name, words, least in (("chunk", ("auto", "none"), 1), ("kept", ("auto",), 0)):
            value = getattr(self, name)
            fits = value >= least if type(value) is int else value in words
            require(
                fits,
                name,
                value,
                f"must be {' or '.join(words)}, or an integer of at least {least}",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointConfig:
    """When the full state is saved, and how many checkpoints are kept."""

    every_minutes: float = 10
    """Minutes between two checkpoints. One is also saved after the last step and on a signal to
    stop."""
    every_steps: int = 0
    """Steps between two checkpoints; 0: by time only."""
    keep: int = 2
    """Number of newest checkpoints to keep."""
    keep_best: bool = True
    """Save when kNN is measured and higher than in every saved checkpoint, and keep this checkpoint
    beside the newest ones. Without `knn.test_shards` it has no effect."""
    async_save: bool = True
    """Copy the state to host memory and write the copy during training. The run then waits only for
    the copy, and the host holds the state a second time. The run always waits for its last save and
    for a save on a signal."""

    def __post_init__(self) -> None:
        require(self.every_minutes > 0, "every_minutes", self.every_minutes, "must be positive")
        require(self.every_steps >= 0, "every_steps", self.every_steps, "must not be negative")
        require(self.keep >= 1, "keep", self.keep, "must be at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """One run of pre-training."""

    recipe: Annotated[str, Resume.FREE] = "custom"
    """Name of the recipe that this config started from."""
    epochs: Annotated[float, Resume.WITH_ALLOW] = 300
    """Passes over the training images; the schedules span exactly this length."""
    global_batch_size: int = 4096
    """Images per optimizer step, over all ranks."""
    seed: int = 0
    """Seed of weights, order of images and augmentation."""
    precision: Literal["auto", "bf16", "fp32", "fp64"] = "auto"
    """bf16: autocast with float32 weights; fp32: no autocast; fp64: all in float64, slow. `auto`:
    bf16 if the device multiplies it natively, else fp32."""
    device: Literal["auto", "cuda"] | Device = "auto"
    """`auto` uses a GPU if there is one. `cuda`, as torch spells it, is stored as `gpu`."""
    threads: Annotated[int, Resume.FREE] = 0
    """CPU threads of torch per process. 0 divides the machine's cores among its processes, and is at
    most `OMP_NUM_THREADS` for a process alone."""
    log_every_steps: Annotated[int, Resume.FREE] = 10
    """Steps between two lines of metrics; only these steps wait for the device."""
    batch: Annotated[BatchConfig, Resume.FREE] = field(default_factory=BatchConfig)
    parallel: Annotated[ParallelConfig, Resume.FREE] = field(default_factory=ParallelConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    objective: ObjectiveConfig = field(default_factory=MoCoV3Config)
    optim: OptimConfig = field(default_factory=OptimConfig)
    data: DataConfig = field(default_factory=DataConfig)
    knn: Annotated[KnnConfig, Resume.FREE] = field(default_factory=KnnConfig)
    accuracy: Annotated[AccuracyConfig, Resume.FREE] = field(default_factory=AccuracyConfig)
    checkpoint: Annotated[CheckpointConfig, Resume.FREE] = field(default_factory=CheckpointConfig)
    faults: Annotated[FaultConfig, Resume.FREE] = field(default_factory=FaultConfig)
    trackers: Annotated[TrackersConfig, Resume.FREE] = field(default_factory=TrackersConfig)

    def __post_init__(self) -> None:
        require_limits(self)
        require(self.epochs > 0, "epochs", self.epochs, "must be positive")
        require(
            self.global_batch_size >= 2,
            "global_batch_size",
            self.global_batch_size,
            "must be at least 2",
        )
        require(0 <= self.seed < 2**63, "seed", self.seed, "must be an integer from 0 to 2**63 - 1")
        precisions = ("auto", "bf16", "fp32", "fp64")
        require(
            self.precision in precisions,
            "precision",
            self.precision,
            f"must be one of {precisions}",
        )
        if self.device == "cuda":
            object.__setattr__(self, "device", "gpu")
        require(
            self.device in ("auto", "cpu", "gpu"), "device", self.device, "must be auto, cpu or gpu"
        )
        require(self.threads >= 0, "threads", self.threads, "must not be negative")
        require(
            self.log_every_steps >= 1, "log_every_steps", self.log_every_steps, "must be at least 1"
        )

        # Rules across groups.
        warmup = self.optim.warmup_epochs
        epochs = self.epochs
        require(warmup <= epochs, "optim.warmup_epochs", warmup, f"must be at most epochs={epochs}")
        size = self.model.image_size
        require(
            self.data.view1.size == size,
            "data.view1.size",
            self.data.view1.size,
            f"must be model.image_size={size}",
        )
        patch = self.model.patch
        rule = f"must be at most model.image_size={size}"
        if patch > 1:
            field = "model.patch_size=" if self.model.family == "vit" else "the encoder's patches, "
            rule = f"must be a multiple of {field}{patch}, {rule.removeprefix('must be ')}"
        for number, view in enumerate(self.data.more_views):
            fits = view.size <= size and view.size % patch == 0
            require(fits, f"data.more_views.{number}.size", view.size, rule)
            least = self.model.least_side
            above = f"must be at least {least} for {self.model.architecture}"
            require(view.size >= least, f"data.more_views.{number}.size", view.size, above)
        self._require_phases()
        rule = "needs data.images, a folder that can be split; shards are packed already"
        splits = not self.knn.holdout_share or bool(self.data.images)
        require(splits, "knn.holdout", self.knn.holdout, rule)
        every = self.checkpoint.every_steps
        rule = (
            "must be set for faults.rollback_spike: "
            "a rollback uses only checkpoints that were saved by steps"
        )
        require(self.faults.rollback_spike == 0 or every > 0, "checkpoint.every_steps", every, rule)
        small = self.knn.resize == 0 or self.knn.resize >= size
        require(
            small, "knn.resize", self.knn.resize, f"must be 0 or at least model.image_size={size}"
        )

    def _require_phases(self) -> None:
        """Refuse views that do not fit the patches of a phase, or keep no token in one."""
        for phase in self.model.phases.items if self.model.family == "vit" else ():
            patch = phase.patch_size or self.model.patch_size
            for number, view in enumerate(self.data.more_views):
                name = f"data.more_views.{number}.size"
                rule = f"must be a multiple of every patch of model.patch_schedule, and {patch} is"
                require(view.size % patch == 0, name, view.size, f"{rule} one")
                tokens = (view.size // patch) ** 2
                rule = f"model.keep_tokens keeps none of the {tokens} patch tokens of this view"
                require(phase.kept(tokens) >= 1, name, view.size, f"{rule}: take a larger share")

    @property
    def peak_lr(self) -> float:
        """Learning rate after the warm-up: `optim.lr`, scaled by `optim.lr_scaling`."""
        if self.optim.lr_scaling == "none":
            return self.optim.lr
        if self.optim.lr_scaling == "sqrt":
            return self.optim.lr * math.sqrt(self.global_batch_size)
        return self.optim.lr * self.global_batch_size / 256

    def loader_spec(self, *, device: Device, threads: int) -> LoaderSpec:
        """The spec of the training loader.

        Raises:
            ValueError: if `data.shards` is empty and the images are not synthetic.
        """
        data = self.data
        rule = "must be packed first, as fastmoco train does (fastmoco/cli/images.py)"
        require(not data.images, "data.images", data.images, rule)
        named = bool(data.shards) or data.synthetic
        require(
            named,
            "data.shards",
            data.shards,
            "must name the shards, e.g. --data.shards 'data/train-*.tar'; or give a folder of "
            "images: --data.images FOLDER",
        )
        return LoaderSpec(
            shards=data.shards or "synthetic",
            views=data.views,
            global_batch_size=self.global_batch_size,
            seed=self.seed,
            device=device,
            threads=threads,
            classes=self.objective.label_count or 0,
            **{option.name: getattr(data, option.name) for option in fields(LoaderOptions)},
        )

    def eval_loader_spec(
        self,
        shards: str,
        *,
        device: Device,
        threads: int,
        limit: int = 0,
        image: EvalSpec | None = None,
    ) -> EvalLoaderSpec:
        """The spec of a loader of an evaluation.

        Args:
            shards: the set.
            device: where DALI decodes.
            threads: of DALI.
            limit: images of the set, spread over it; 0: all.
            image: how an image is shown; None: `eval_spec`.
        """
        return EvalLoaderSpec(
            shards=shards,
            image=image or self.eval_spec(),
            batch_size=EVAL_BATCH,
            device=device,
            threads=threads,
            limit=limit or None,
            max_bad_share=self.data.max_bad_share,
            cache_dir=self.data.cache_dir,
            cache_size_gb=self.data.cache_size_gb,
        )

    def eval_spec(self) -> EvalSpec:
        """How evaluation resizes, crops and normalises an image."""
        size = self.model.image_size
        resize = self.knn.resize or (round(size * 256 / 224) if size > SMALL_SIDE else size)
        return EvalSpec(
            size=size, resize=resize, mean=self.data.view1.mean, std=self.data.view1.std
        )
