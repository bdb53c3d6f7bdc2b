"""Config of the optimizer."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Literal, get_args

from fastmoco_pipelines.spec import Resume, require

FUSED_BACKENDS = {
    "adamw": ("auto", "torch", "fastmoco", "apex"),
    "lars": ("auto", "fastmoco"),
    "lamb": ("apex",),
    "sgd": ("auto", "torch"),
    "larc": ("auto", "fastmoco"),
}
"""Implementations of each optimizer. LAMB has no `auto`: apex is imported only if it is named."""

Scaling = Literal["linear", "sqrt", "none"]
Schedule = Literal[
    "cosine", "cosine_steps", "cosine_inclusive", "cosine_unshifted", "cosine_per_epoch", "steps"
]
WITH_ENDS = ("cosine", "cosine_inclusive", "cosine_unshifted")
"""Schedules that may start and end above 0."""
KINDS = {"lr_scaling": Scaling, "schedule": Schedule}
"""Values of the fields that name a rule."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimConfig:
    """The optimizer; docs/optimizers.md compares them."""

    name: Literal["adamw", "lars", "lamb", "sgd", "larc"] = "adamw"
    """`adamw` for ViT: its decay also applies to biases and norms, as in the official runs. `lars`
    for ResNet and very large batches. `lamb` needs NVIDIA apex. `sgd` is torch's, with momentum.
    `larc` is SGD with the rate adaptation of SwAV, which applies to all tensors."""
    fused_backend: Annotated[Literal["auto", "torch", "fastmoco", "apex"], Resume.FREE] = "auto"
    """Implementation of the optimizer: `torch`; `fastmoco`, which for AdamW updates weights and
    momentum encoder in one sweep; `apex` by NVIDIA, if installed. `auto`: `fastmoco` for LARS and
    on CUDA with Triton, else `torch`. All agree up to rounding."""
    lr: Annotated[float, Resume.WITH_ALLOW] = 1.5e-4
    """Base learning rate, to be scaled by `lr_scaling`."""
    lr_scaling: Annotated[Scaling, Resume.WITH_ALLOW] = "linear"
    """Peak learning rate: `lr * global_batch_size / 256` (`linear`), `lr * sqrt(global_batch_size)`
    (`sqrt`, SimCLR), or `lr` itself (`none`, SwAV)."""
    schedule: Annotated[Schedule, Resume.WITH_ALLOW] = "cosine"
    """Linear warm-up, then half a cosine. `cosine` follows the fractional epoch (MoCo v3, BYOL).
    `cosine_steps` counts whole steps of warm-up and run (SimCLR). `cosine_inclusive` reaches the
    peak in the last step of the warm-up and again after it (SwAV, DINO). `cosine_unshifted` begins
    its cosine with the run, and is one step late (MoBY). `cosine_per_epoch` is constant within an
    epoch (linear probes). `steps` stays at the peak after the warm-up, and is multiplied by
    `milestone_factor` at each of `milestones` (MoCo v1)."""
    milestones: Annotated[tuple[float, ...], Resume.WITH_ALLOW] = ()
    """Epochs at which the learning rate falls, ascending. Only for `steps`."""
    milestone_factor: Annotated[float, Resume.WITH_ALLOW] = 0.1
    """Factor of the learning rate at each of `milestones`."""
    warmup_lr: Annotated[float, Resume.WITH_ALLOW] = 0.0
    """Learning rate of the first step of the warm-up, not scaled. Only for `cosine`
    (MaskFeat, CMAE) and the two of SwAV and MoBY."""
    final_lr: Annotated[float, Resume.WITH_ALLOW] = 0.0
    """Learning rate to which the cosine falls, not scaled. Only for the same three."""
    lr_in_buffer: Annotated[bool, Resume.WITH_ALLOW] = False
    """LARS: multiply the learning rate into the momentum buffer, as SimCLR does, and not into the
    step, as MoCo v3 and BYOL do."""
    weight_decay: Annotated[float, Resume.WITH_ALLOW] = 0.1
    """Weight decay. It is decoupled in AdamW and LAMB. LARS adds it to the gradient, only for tensors
    of two or more dimensions; LARC and SGD add it to that of every tensor."""
    final_weight_decay: Annotated[float | None, Resume.WITH_ALLOW] = None
    """Weight decay at the end of the run, to which it goes from `weight_decay` by half a cosine;
    `none`: it is constant. 0.4 from 0.04 in DINO."""
    betas: Annotated[tuple[float, float], Resume.WITH_ALLOW] = (0.9, 0.999)
    """Averaging coefficients of AdamW and LAMB."""
    eps: Annotated[float, Resume.WITH_ALLOW] = 1e-8
    """Denominator floor of AdamW and LAMB."""
    sgd_momentum: Annotated[float, Resume.WITH_ALLOW] = 0.9
    """Momentum of the buffer of LARS, LARC and SGD."""
    nesterov: Annotated[bool, Resume.WITH_ALLOW] = False
    """SGD: Nesterov's momentum, a step of `gradient + sgd_momentum * buffer`."""
    trust_coefficient: Annotated[float, Resume.WITH_ALLOW] = 0.001
    """Norm of a step of LARS or LARC relative to that of the weights, before the learning rate."""
    warmup_epochs: Annotated[float, Resume.WITH_ALLOW] = 40
    """Epochs of the linear warm-up of the learning rate."""
    clip_norm: Annotated[float, Resume.WITH_ALLOW] = 0.0
    """Largest norm of all gradients as one vector; larger ones are scaled down to it. 0: no
    clipping, as in the paper."""
    clip_tensor_norm: Annotated[float, Resume.WITH_ALLOW] = 0.0
    """Largest norm of the gradient of each tensor on its own; larger ones are scaled down to it. 3
    in DINO; 0: no clipping."""

    def __post_init__(self) -> None:
        backends = FUSED_BACKENDS.get(self.name, ())
        require(bool(backends), "name", self.name, f"must be one of {tuple(FUSED_BACKENDS)}")
        rule = f"{self.name} is available as {backends}"
        require(self.fused_backend in backends, "fused_backend", self.fused_backend, rule)
        require(0 <= self.sgd_momentum < 1, "sgd_momentum", self.sgd_momentum, "must be in [0, 1)")
        require(
            self.trust_coefficient > 0,
            "trust_coefficient",
            self.trust_coefficient,
            "must be positive",
        )
        for name, kind in KINDS.items():
            values, value = get_args(kind), getattr(self, name)
            require(value in values, name, value, f"must be one of {values}")
        for name in ("warmup_lr", "final_lr"):
            value = getattr(self, name)
            require(value >= 0, name, value, "must not be negative")
            rule = f"needs schedule={' or '.join(WITH_ENDS)}; the others start and end at 0"
            require(value == 0 or self.schedule in WITH_ENDS, name, value, rule)
        marks = self.milestones
        rule = "needs schedule=steps; the others follow a cosine"
        require(not marks or self.schedule == "steps", "milestones", marks, rule)
        rule = "schedule=steps needs epochs above 0 in ascending order"
        ascending = bool(marks) and all(a < b for a, b in pairwise((0.0, *marks)))
        require(self.schedule != "steps" or ascending, "milestones", marks, rule)
        factor = self.milestone_factor
        require(0 < factor < 1, "milestone_factor", factor, "must be above 0 and below 1")
        rule = "is a choice of lars alone"
        in_buffer = self.lr_in_buffer
        require(not in_buffer or self.name == "lars", "lr_in_buffer", in_buffer, rule)
        rule = "is a choice of sgd alone, with sgd_momentum above 0"
        possible = self.name == "sgd" and self.sgd_momentum > 0
        require(not self.nesterov or possible, "nesterov", self.nesterov, rule)
        require(self.lr >= 0, "lr", self.lr, "must not be negative")
        require(self.weight_decay >= 0, "weight_decay", self.weight_decay, "must not be negative")
        require(all(0 <= b < 1 for b in self.betas), "betas", self.betas, "must be in [0, 1)")
        require(self.eps > 0, "eps", self.eps, "must be positive")
        require(
            self.warmup_epochs >= 0, "warmup_epochs", self.warmup_epochs, "must not be negative"
        )
        final_decay = self.final_weight_decay
        rule = "must not be negative; leave it out for a constant weight decay"
        require(final_decay is None or final_decay >= 0, "final_weight_decay", final_decay, rule)
        for name in ("clip_norm", "clip_tensor_norm"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "must not be negative")
        both = self.clip_norm > 0 and self.clip_tensor_norm > 0
        rule = "clips each tensor, and optim.clip_norm all together: set one of the two to 0"
        require(not both, "clip_tensor_norm", self.clip_tensor_norm, rule)
