"""The training step of the baseline: autocast, DDP, torch's AdamW, the schedules by step."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.baseline.model import (
    AttentionForm,
    MoCo,
    VisionTransformer,
    mlp_head,
    synchronised,
)
from benchmarks.baseline.optim import LARS, ema_momentum, learning_rate
from fastmoco.config import Config, MoCoV3Config
from fastmoco.models.precision import choose_precision
from fastmoco.models.vit import ARCHITECTURES
from fastmoco_pipelines.loading.step_parts import BACKWARD, LOG, OPTIMIZER, TRANSFER, part

LOGGER = logging.getLogger(__name__)
Precision = Literal["auto", "fp32", "fp64", "bf16", "fp16"]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
IMAGENET = 1_281_167
"""Images of ImageNet-1k: the length of an epoch where nothing else is given."""
WRITTEN = {
    "model.pooling": "class",
    "model.positions": "sincos",
    "model.mlp_norm": "layer",
    "model.drop_path": 0.0,
    "objective.predictor": True,
    "objective.head_norm": True,
    "optim.schedule": "cosine",
}
"""Fields of a config, and the only value with which the baseline is written."""


class Baseline:
    """A MoCo v3 and its optimizer.

    In a process group of several ranks it is wrapped in DDP, with synchronised batch norms.

    Args:
        config: of a run of MoCo v3 on a ViT with patches; its seed makes the weights.
        device: of the model.
        attention: torch's fused function, or written out.
        compiled: both encoders and the loss through torch.compile.
        precision: instead of the config's. bf16 and fp16 are autocast, fp16 with a gradient scaler.
        sample_count: images of the training set, which make the length of an epoch.

    Attributes:
        model: encoder, momentum encoder and predictor.
        steps: optimizer steps done.

    Raises:
        ValueError: naming a field of the config for which the baseline is not written.
    """

    def __init__(
        self,
        config: Config,
        device: torch.device,
        *,
        attention: AttentionForm = "sdpa",
        compiled: bool = False,
        precision: Precision | None = None,
        sample_count: int = IMAGENET,
    ) -> None:
        require_written(config)
        objective = config.objective
        assert isinstance(objective, MoCoV3Config)  # noqa: S101 - a type: the baseline trains MoCo v3 only
        chosen = precision or config.precision
        self.precision = chosen if chosen == "fp16" else choose_precision(chosen, device)
        self.config = config
        self.device = device
        self.steps = 0
        self.steps_per_epoch = max(1, sample_count // config.global_batch_size)

        # The model.
        torch.manual_seed(config.seed)
        self.model = build_model(config, attention)
        self.model.to(device, torch.float64 if self.precision == "fp64" else torch.float32)
        if compiled:
            self.model.compile_parts()
        self._forward: nn.Module = self.model
        if dist.is_initialized() and dist.get_world_size() > 1:
            synchronised(self.model, device)
            ids = [device.index] if device.type == "cuda" else None
            self._forward = DistributedDataParallel(self.model, device_ids=ids)

        # The optimizer.
        optim = config.optim
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer: torch.optim.Optimizer
        if optim.name == "adamw":
            self.optimizer = torch.optim.AdamW(
                trained, lr=0.0, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay
            )
        else:
            self.optimizer = LARS(
                trained,
                lr=0.0,
                weight_decay=optim.weight_decay,
                momentum=optim.sgd_momentum,
                trust_coefficient=optim.trust_coefficient,
            )
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.precision == "fp16")

    @property
    def encoder(self) -> VisionTransformer:
        """The query side, whose features are evaluated."""
        encoder = self.model.encoder
        assert isinstance(encoder, VisionTransformer)  # noqa: S101 - a type: the baseline trains ViTs only
        return encoder

    def load_from(self, objective: nn.Module) -> None:
        """Take weights and buffers of fastmoco's objective, which has the same names."""
        self.model.load_state_dict(objective.state_dict())

    def learning_rate(self, step: int) -> float:
        """The learning rate of a step."""
        config = self.config
        return learning_rate(
            step / self.steps_per_epoch,
            peak=config.peak_lr,
            epochs=config.epochs,
            warmup=config.optim.warmup_epochs,
        )

    def ema_momentum(self, step: int) -> float:
        """The momentum of the average that a step takes before its keys."""
        own = self.config.objective
        assert isinstance(own, MoCoV3Config)  # noqa: S101 - a type: the baseline trains MoCo v3 only
        return ema_momentum(
            step / self.steps_per_epoch,
            start=own.ema_momentum,
            epochs=self.config.epochs,
            cosine=own.ema_schedule == "cosine",
        )

    def step(self, view1: Tensor, view2: Tensor) -> Tensor:
        """One optimizer step on this rank's views; returns the loss, on the device."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(self.steps)
        with part(TRANSFER):
            dtype = torch.float64 if self.precision == "fp64" else torch.float32
            view1 = view1.to(self.device, dtype, non_blocking=True)
            view2 = view2.to(self.device, dtype, non_blocking=True)

        half = DTYPES.get(self.precision)
        context: Any = torch.autocast(self.device.type, dtype=half) if half else nullcontext()
        with context:
            loss: Tensor = self._forward(view1, view2, self.ema_momentum(self.steps))

        with part(BACKWARD):
            self.optimizer.zero_grad()
            self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        with part(OPTIMIZER):
            if self.config.optim.clip_norm > 0:
                self.scaler.unscale_(self.optimizer)
                nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optim.clip_norm)
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.steps += 1
        return loss.detach()

    def train(self, batches: Iterator[tuple[Tensor, Tensor, Tensor]], steps: int) -> None:
        """Some steps of the training loop, with a line in the log every `log_every_steps`."""
        for _ in range(steps):
            view1, view2, _ = next(batches)
            loss = self.step(view1, view2)
            if self.steps % self.config.log_every_steps == 0:
                with part(LOG):
                    lr = self.learning_rate(self.steps - 1)
                    LOGGER.info("step %d: loss %.4f, lr %.2e", self.steps, loss.item(), lr)


def build_model(config: Config, attention: AttentionForm) -> MoCo:
    """Encoders and heads of a config."""
    model, own = config.model, config.objective
    assert isinstance(own, MoCoV3Config)  # noqa: S101 - a type: the baseline trains MoCo v3 only
    size = ARCHITECTURES[model.architecture]

    def encoder() -> VisionTransformer:
        return VisionTransformer(
            image_size=model.image_size,
            patch_size=model.patch_size,
            dim=size.width,
            depth=size.depth,
            num_heads=size.heads,
            head=mlp_head(3, size.width, model.hidden_dim, model.projection_dim),
            freeze_patch_embed=model.freeze_patch_embed,
            attention=attention,
        )

    predictor = mlp_head(2, model.projection_dim, model.hidden_dim, model.projection_dim)
    return MoCo(encoder, predictor, own.temperature)


def require_written(config: Config) -> None:
    """Refuse a config of another method.

    Raises:
        ValueError: naming the field, its value and what the baseline has.
    """
    if not isinstance(config.objective, MoCoV3Config):
        raise ValueError(f"objective={config.objective.kind!r}: the baseline is MoCo v3")
    if ARCHITECTURES.get(config.model.architecture, None) is None or (
        ARCHITECTURES[config.model.architecture].stem != "patch"
    ):
        raise ValueError(
            f"model.architecture={config.model.architecture!r}: the baseline is a ViT with patches"
        )
    if config.optim.name not in ("adamw", "lars") or config.optim.lr_in_buffer:
        raise ValueError(
            f"optim.name={config.optim.name!r}, lr_in_buffer={config.optim.lr_in_buffer}: "
            "the baseline has adamw, and lars with the rate outside its buffer"
        )
    for path, value in WRITTEN.items():
        group, field = path.split(".")
        found = getattr(getattr(config, group), field)
        if found != value:
            raise ValueError(f"{path}={found!r}: the baseline has only {value!r}")
    views: Sequence[Any] = config.data.views
    if len(views) != 2 or any(view.copies != 1 for view in views):
        raise ValueError(f"data: {len(views)} groups of views; the baseline takes two single views")
