"""MoCo v1 and v2 on ResNet-50 and small encoders: their numbers, and their recipes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

from fastmoco.config import Config, DataConfig, ModelConfig, ObjectiveConfig, OptimConfig
from fastmoco.config.objective import require_ema
from fastmoco.recipes.expected import RELEASE, Expected, expects
from fastmoco.recipes.small import quickstart_digits, vit_nano7_e12_b256
from fastmoco_pipelines.spec import Resume, ViewSpec, moco_v1_views, moco_v2_views, require

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
    on 8 GPUs in the official runs; a multiple of the number of processes. Losses and weights do
    not depend on their number then. 0: one group per process. No effect without batch norms."""

    def __post_init__(self) -> None:
        require(self.head in ("linear", "mlp"), "head", self.head, "must be linear or mlp")
        require(self.temperature > 0, "temperature", self.temperature, "must be positive")
        require_ema(self.ema_momentum, "constant")
        require(self.queue >= 1, "queue", self.queue, "must be at least 1")
        groups = self.batch_norm_groups
        require(groups >= 0, "batch_norm_groups", groups, "must not be negative")


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
    config = _r50("moco_v1_r50_e200_b256", epochs=200, views=moco_v1_views())
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
    return _r50("moco_v2_r50_e200_b256", epochs=200, views=moco_v2_views())


@expects(Expected(linear=71.1, source=f"{RELEASE} of MoCo", hardware=HARDWARE))
def moco_v2_r50_e800_b256() -> Config:
    """MoCo v2 with ResNet-50 on ImageNet, 800 epochs, batch 256, queue of 65536."""
    return _r50("moco_v2_r50_e800_b256", epochs=800, views=moco_v2_views())


def _r50(recipe: str, *, epochs: int, views: tuple[ViewSpec, ViewSpec]) -> Config:
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
        data=DataConfig(view1=views[0], view2=views[1]),
    )


def moco_digits() -> Config:
    """MoCo v2 with a tiny ResNet on 8x8 handwritten digits: a few minutes on two cores."""
    base = quickstart_digits()
    model = ModelConfig(
        architecture="resnet_nano",
        image_size=8,
        projection_dim=64,
        hidden_dim=256,
        zero_residual=False,
    )
    # A queue of 512 is a third of the set: of a longer one many keys are of the same images.
    return replace(
        base,
        recipe="moco_digits",
        model=model,
        objective=MoCoConfig(ema_momentum=0.99, queue=512),
        optim=replace(base.optim, name="sgd", lr=0.06, weight_decay=1e-4),
    )


def moco_nano7_e12_b256() -> Config:
    """MoCo v2 with ViT-nano/7 on 28-pixel grey images such as Fashion-MNIST: ten minutes on two
    cores."""
    base = vit_nano7_e12_b256()
    # Keys of a fast encoder are told by their age: slower weights than with MoCo v3.
    return replace(
        base,
        recipe="moco_nano7_e12_b256",
        objective=MoCoConfig(ema_momentum=0.99, queue=4096),
        optim=replace(base.optim, lr=5e-4),
    )
