"""MoCo v1 and v2 on ResNet-50 and small encoders: their numbers, and their recipes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

from fastmoco.config import Config, DataConfig, ModelConfig, ObjectiveConfig, OptimConfig
from fastmoco.config.objective import require_ema
from fastmoco.recipes.expected import RELEASE, Expected, expects
from fastmoco.recipes.small import quickstart_digits, vit_nano7_e12_b256
from fastmoco_pipelines.spec import Resume, ViewSpec, require

HARDWARE = "8 V100 GPUs, 53 hours per 200 epochs"


@dataclass(frozen=True, slots=True, kw_only=True)
class MoCoConfig(ObjectiveConfig):
    """The head, the queue and the batch norms of MoCo v2; `head`, `temperature` make v1 of it."""

    kind: ClassVar[str] = "moco"

    head: Literal["linear", "mlp"] = "mlp"
    """Projector: one linear layer (`linear`, v1), or two with a ReLU between them (`mlp`, v2)."""
    temperature: Annotated[float, Resume.WITH_ALLOW] = 0.2
    """Softmax temperature of the InfoNCE loss: 0.07 in v1, 0.2 in v2."""
    ema_momentum: Annotated[float, Resume.WITH_ALLOW] = 0.999
    """Momentum of the momentum encoder, the same in all steps."""
    queue: int = 65536
    """Keys of earlier batches, over all processes, that are the negatives of every query; a
    multiple of the global batch."""
    batch_norm_groups: int = 8
    """Groups of images of the global batch in which the batch norms of a ResNet take statistics, as
    on 8 GPUs in the official runs; a multiple of the number of processes. Results do not depend on
    the number of processes then. 0: one group per process. No effect without batch norms."""

    def __post_init__(self) -> None:
        require(self.head in ("linear", "mlp"), "head", self.head, "must be linear or mlp")
        require(self.temperature > 0, "temperature", self.temperature, "must be positive")
        require_ema(self.ema_momentum, "constant")
        require(self.queue >= 1, "queue", self.queue, "must be at least 1")
        groups = self.batch_norm_groups
        require(groups >= 0, "batch_norm_groups", groups, "must not be negative")


def _v1_view() -> ViewSpec:
    """Both views of v1 at 224 pixels: every image is jittered."""
    return ViewSpec(
        crop_scale=(0.2, 1.0),
        jitter_probability=1.0,
        brightness=0.4,
        contrast=0.4,
        saturation=0.4,
        hue=0.4,
        blur_probability=0.0,
    )


def _v2_view() -> ViewSpec:
    """Both views of v2 at 224 pixels: less jitter in hue, and blur in one of two."""
    return ViewSpec(
        crop_scale=(0.2, 1.0),
        brightness=0.4,
        contrast=0.4,
        saturation=0.4,
        hue=0.1,
        blur_probability=0.5,
    )


@expects(
    Expected(
        linear=60.6,
        source=f"{RELEASE} of MoCo",
        hardware=HARDWARE,
        note="Five runs reached 60.6 to 61.1 %. The official code makes images grey before it "
        "changes their colors, fastmoco after it.",
    )
)
def moco_v1_r50_e200_b256() -> Config:
    """MoCo v1 with ResNet-50 on ImageNet, 200 epochs, batch 256, queue of 65536."""
    config = _r50("moco_v1_r50_e200_b256", epochs=200, view=_v1_view())
    optim = replace(config.optim, schedule="steps", milestones=(120.0, 160.0))
    return replace(config, objective=MoCoConfig(head="linear", temperature=0.07), optim=optim)


@expects(
    Expected(
        linear=67.5,
        source=f"{RELEASE} of MoCo",
        hardware=HARDWARE,
        note="Several runs differ by 0.1 points; another implementation reports 67.5 % too.",
    )
)
def moco_v2_r50_e200_b256() -> Config:
    """MoCo v2 with ResNet-50 on ImageNet, 200 epochs, batch 256, queue of 65536."""
    return _r50("moco_v2_r50_e200_b256", epochs=200, view=_v2_view())


@expects(Expected(linear=71.1, source=f"{RELEASE} of MoCo", hardware=HARDWARE))
def moco_v2_r50_e800_b256() -> Config:
    """MoCo v2 with ResNet-50 on ImageNet, 800 epochs, batch 256, queue of 65536."""
    return _r50("moco_v2_r50_e800_b256", epochs=800, view=_v2_view())


def _r50(recipe: str, *, epochs: int, view: ViewSpec) -> Config:
    return Config(
        recipe=recipe,
        epochs=epochs,
        global_batch_size=256,
        model=ModelConfig(
            architecture="resnet50", projection_dim=128, hidden_dim=2048, zero_residual=False
        ),
        objective=MoCoConfig(),
        optim=OptimConfig(
            name="sgd",
            lr=0.03,
            weight_decay=1e-4,
            warmup_epochs=0,
            schedule="cosine_per_epoch",
        ),
        data=DataConfig(view1=view, view2=view),
    )


def moco_digits() -> Config:
    """MoCo v2 with a tiny ViT on 8x8 handwritten digits: a few minutes on two cores."""
    base = quickstart_digits()
    objective = MoCoConfig(ema_momentum=0.97, queue=1024)
    return replace(base, recipe="moco_digits", objective=objective)


def moco_nano7_e12_b256() -> Config:
    """MoCo v2 with ViT-nano/7 on 28-pixel grey images such as Fashion-MNIST: ten minutes on two
    cores."""
    base = vit_nano7_e12_b256()
    objective = MoCoConfig(ema_momentum=0.97, queue=4096)
    return replace(base, recipe="moco_nano7_e12_b256", objective=objective)
