"""What a run is: a tree of frozen dataclasses, checked where it is written down. No torch, no DALI.

Batch sizes are global unless the name says local. `resolve` computes once what depends on the world and the data set and
returns a new object; both are written as JSON beside every checkpoint (`serial.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Annotated, Literal

from fastmoco.config.data import DataConfig, KnnConfig
from fastmoco.config.faults import FaultConfig
from fastmoco.config.model import ModelConfig
from fastmoco.config.objective import MoCoV3Config, ObjectiveConfig
from fastmoco.config.optim import OptimConfig
from fastmoco.config.parallel import ParallelConfig
from fastmoco_pipelines.spec import Device, EvalSpec, LoaderOptions, LoaderSpec, Resume, require


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchConfig:
    """How a process takes its part of a batch through the encoder: at once or in chunks, with equal gradients."""

    chunk: Literal["auto", "none"] | int = "auto"
    """Images that pass the encoder together. ``none``: all; ``auto``: all where they fit into the memory that is free."""
    kept: Literal["auto"] | int = "auto"
    """Chunks that keep their activations and save the second forward; ``auto``: as many as fit, parts of chunks among them."""
    activation_budget: Literal["auto"] | float = "auto"
    """Share of its activations that a compiled block keeps for its backward: 1 all that products read, 0.9 what element-wise
    operations do not make again, less also drops products. ``auto``: the first of 1 and 0.9 that computes least twice."""
    cuda_graphs: bool = False
    """Replay the trunk's kernels for chunks that keep nothing, instead of launching them from Python. CUDA, one process or ddp,
    without ``model.checkpointing``. The same gradients, more memory."""

    def __post_init__(self) -> None:
        budget = self.activation_budget
        share = budget == "auto" or (isinstance(budget, int | float) and 0 <= budget <= 1)
        require(share, "activation_budget", budget, "must be auto, or a share in [0, 1]")
        for name, words, least in (("chunk", ("auto", "none"), 1), ("kept", ("auto",), 0)):
            value = getattr(self, name)
            fits = value >= least if type(value) is int else value in words
            require(fits, name, value, f"must be {' or '.join(words)}, or a whole number from {least} on")


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointConfig:
    """When the whole state is written, and how much of it is kept."""

    every_minutes: float = 10
    """Minutes between two checkpoints; one is also written after the last step and on SIGTERM or SIGINT."""
    every_steps: int = 0
    """Steps between two checkpoints; 0: by the clock alone."""
    keep: int = 2
    """Newest checkpoints kept."""
    async_save: bool = True
    """Copy the state to the host's memory and write the copy while training goes on: a run then waits for the copy alone,
    and the host holds the state once more. The last save of a run, and the one on a signal, are always waited for."""

    def __post_init__(self) -> None:
        require(self.every_minutes > 0, "every_minutes", self.every_minutes, "must be positive")
        require(self.every_steps >= 0, "every_steps", self.every_steps, "must not be negative")
        require(self.keep >= 1, "keep", self.keep, "keeps at least one")


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """One run of pre-training."""

    recipe: Annotated[str, Resume.FREE] = "custom"
    """Name of the recipe this started from."""
    epochs: Annotated[float, Resume.WITH_ALLOW] = 300
    """Passes over the training images; the schedules run over exactly this long."""
    global_batch_size: int = 4096
    """Images of one optimizer step, over all ranks."""
    seed: int = 0
    """Seed of initialisation, order and augmentation."""
    precision: Literal["auto", "bf16", "fp32", "fp64"] = "auto"
    """bf16: autocast over float32 weights; fp32: no autocast; fp64: everything, slow, to compare runs without rounding noise.
    ``auto``: bf16 where the device multiplies it natively, else fp32."""
    device: Literal["auto"] | Device = "auto"
    """`auto` takes a GPU where there is one."""
    threads: Annotated[int, Resume.FREE] = 0
    """CPU threads of torch in each process; 0 shares the machine's cores among its processes."""
    log_every_steps: Annotated[int, Resume.FREE] = 10
    """Steps between two lines of metrics; only these steps wait for the device."""
    batch: Annotated[BatchConfig, Resume.FREE] = field(default_factory=BatchConfig)
    parallel: Annotated[ParallelConfig, Resume.FREE] = field(default_factory=ParallelConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    objective: ObjectiveConfig = field(default_factory=MoCoV3Config)
    optim: OptimConfig = field(default_factory=OptimConfig)
    data: DataConfig = field(default_factory=DataConfig)
    knn: Annotated[KnnConfig, Resume.FREE] = field(default_factory=KnnConfig)
    checkpoint: Annotated[CheckpointConfig, Resume.FREE] = field(default_factory=CheckpointConfig)
    faults: Annotated[FaultConfig, Resume.FREE] = field(default_factory=FaultConfig)

    def __post_init__(self) -> None:
        require(self.epochs > 0, "epochs", self.epochs, "must be positive")
        require(self.global_batch_size >= 2, "global_batch_size", self.global_batch_size, "needs at least 2 images")
        require(0 <= self.seed < 2**63, "seed", self.seed, "needs a whole number from 0 to 2**63 - 1")
        precisions = ("auto", "bf16", "fp32", "fp64")
        require(self.precision in precisions, "precision", self.precision, f"must be one of {precisions}")
        require(self.device in ("auto", "cpu", "gpu"), "device", self.device, "must be auto, cpu or gpu")
        require(self.threads >= 0, "threads", self.threads, "must not be negative")
        require(self.log_every_steps >= 1, "log_every_steps", self.log_every_steps, "must be at least 1")
        warmup, epochs = self.optim.warmup_epochs, self.epochs
        require(warmup <= epochs, "optim.warmup_epochs", warmup, f"must be at most epochs={epochs}")
        size = self.model.image_size
        require(
            self.data.view1.size == size, "data.view1.size", self.data.view1.size, f"must be model.image_size={size}"
        )
        patch = self.model.patch_size
        rule = f"must be a multiple of model.patch_size={patch}, at most model.image_size={size}"
        for number, view in enumerate(self.data.more_views):
            fits = view.size <= size and view.size % patch == 0
            require(fits, f"data.more_views.{number}.size", view.size, rule)
        every = self.checkpoint.every_steps
        rule = "must be set for faults.rollback_spike: a run goes back only to what was saved by steps"
        require(self.faults.rollback_spike == 0 or every > 0, "checkpoint.every_steps", every, rule)
        small = self.knn.resize == 0 or self.knn.resize >= size
        require(small, "knn.resize", self.knn.resize, f"must be 0 or at least model.image_size={size}")

    @property
    def peak_lr(self) -> float:
        """Learning rate after the warm-up: ``optim.lr * global_batch_size / 256``."""
        return self.optim.lr * self.global_batch_size / 256

    def loader_spec(self, *, device: Device, threads: int) -> LoaderSpec:
        """What the training loader delivers.

        Raises:
            ValueError: if ``data.shards`` is not given, and the images are not synthetic.
        """
        data = self.data
        named = bool(data.shards) or data.synthetic
        require(named, "data.shards", data.shards, "must name the shards, e.g. --data.shards 'data/train-*.tar'")
        return LoaderSpec(
            shards=data.shards or "synthetic",
            views=data.views,
            global_batch_size=self.global_batch_size,
            seed=self.seed,
            device=device,
            threads=threads,
            **{option.name: getattr(data, option.name) for option in fields(LoaderOptions)},
        )

    def eval_spec(self) -> EvalSpec:
        """How an image is shown to the encoder in evaluation."""
        size = self.model.image_size
        resize = self.knn.resize or (round(size * 256 / 224) if size > 64 else size)
        return EvalSpec(size=size, resize=resize, mean=self.data.view1.mean, std=self.data.view1.std)
