"""DINO with small crops, on vision transformers: its numbers, and its recipes."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal, get_args

from fastmoco.config import Config, DataConfig, ModelConfig, ObjectiveConfig, OptimConfig
from fastmoco.config.objective import require_ema
from fastmoco.recipes.expected import RELEASE, Expected, expects
from fastmoco.recipes.small import quickstart_digits, vit_nano7_e12_b256
from fastmoco_pipelines.spec import Resume, dino_views, require

RELEASE_OF_DINO = f"{RELEASE} of DINO"
EVALUATED = "Both are of the momentum encoder, which fastmoco evaluates too."
InitialWeights = Literal["dino", "xavier"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DINOConfig(ObjectiveConfig):
    """DINO (Caron et al. 2021): its last layer, temperatures, centre and average."""

    kind: ClassVar[str] = "dino"
    evaluated: ClassVar[str] = "momentum_encoder"

    prototypes: int = 65536
    """Outputs of the last layer."""
    temperature: Annotated[float, Resume.WITH_ALLOW] = 0.1
    """Softmax temperature of the encoder's outputs."""
    teacher_temperature: Annotated[float, Resume.WITH_ALLOW] = 0.04
    """Softmax temperature of the momentum encoder's outputs, after its warm-up; above 0.07 training
    is unstable."""
    teacher_temperature_start: Annotated[float, Resume.WITH_ALLOW] = 0.04
    """The same in the first epoch."""
    teacher_warmup_epochs: Annotated[int, Resume.WITH_ALLOW] = 0
    """Whole epochs in which that temperature rises linearly; it changes between epochs alone."""
    center_momentum: Annotated[float, Resume.WITH_ALLOW] = 0.9
    """Momentum of the centre, which is subtracted from the momentum encoder's outputs."""
    head_norm: bool = False
    """Whether batch norms are before the GELUs of the head, over all crops of all ranks. They keep
    the features of images apart in a small encoder; micro-batches then run the trunk alone."""
    train_last_norm: bool = False
    """Whether the lengths of the last layer's rows are trained: better for ViT-S, less stable."""
    freeze_last_layer_epochs: Annotated[float, Resume.WITH_ALLOW] = 1.0
    """First epochs without an update of the last layer."""
    initial_weights: InitialWeights = "dino"
    """Initial weights of linear layers, in a ViT and in the head: `dino` is normal with deviation
    0.02, class token and learned positions too; `xavier` has the spread that a layer's width asks
    for, and leaves the ViT as MoCo v3 starts it: for widths far below 384, where 0.02 makes the
    outputs of all images alike."""
    ema_momentum: Annotated[float, Resume.WITH_ALLOW] = 0.996
    """Momentum of the momentum encoder's average at step 0; 0.9995 for batches of 256."""
    ema_schedule: Annotated[Literal["cosine", "constant"], Resume.WITH_ALLOW] = "cosine"
    """`cosine` lets the momentum rise to 1 over the run."""

    def __post_init__(self) -> None:
        require(self.prototypes >= 2, "prototypes", self.prototypes, "must be at least 2")
        for name in ("temperature", "teacher_temperature", "teacher_temperature_start"):
            require(getattr(self, name) > 0, name, getattr(self, name), "must be positive")
        for name in ("teacher_warmup_epochs", "freeze_last_layer_epochs"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "must not be negative")
        value, known = self.initial_weights, get_args(InitialWeights)
        require(value in known, "initial_weights", value, f"must be one of {known}")
        momentum = self.center_momentum
        require(0 <= momentum <= 1, "center_momentum", momentum, "must be in [0, 1]")
        require_ema(self.ema_momentum, self.ema_schedule)

    def schedule_notes(self, epochs: float, total_steps: int) -> list[str]:
        """That the last layer never trains, or that the teacher's temperature still rises."""
        notes = []
        if math.ceil(epochs) - 1 < self.freeze_last_layer_epochs:  # whole epochs are frozen
            notes.append(
                f"objective.freeze_last_layer_epochs={self.freeze_last_layer_epochs:g}: the run ends "
                f"after epoch {epochs:g}, so the last layer never trains"
            )
        if self.teacher_warmup_epochs > epochs:
            notes.append(
                f"objective.teacher_warmup_epochs={self.teacher_warmup_epochs}: the run ends after "
                f"epoch {epochs:g}, before objective.teacher_temperature is reached"
            )
        return notes


@expects(
    Expected(
        linear=74.0,
        source=RELEASE_OF_DINO,
        hardware="8 GPUs, 1.75 days",
        note=f"k-NN 69.3 %. {EVALUATED}",
    )
)
def dino_vit_s16_e100_b512() -> Config:
    """DINO with ViT-S/16 of 6 heads on ImageNet, 100 epochs, batch 512: two crops of 224 pixels and
    eight of 96."""
    return _vit_s16("dino_vit_s16_e100_b512", DINOConfig(), epochs=100, batch=512)


@expects(
    Expected(
        linear=76.0,
        source=RELEASE_OF_DINO,
        hardware="16 GPUs, 2.6 days",
        note=f"k-NN 73.3 %. {EVALUATED}",
    )
)
def dino_vit_s16_e300_b1024() -> Config:
    """DINO with ViT-S/16 of 6 heads on ImageNet, 300 epochs, batch 1024: with a warm-up of the
    targets' temperature to 0.07, and trained lengths in the last layer."""
    own = DINOConfig(teacher_temperature=0.07, teacher_warmup_epochs=30, train_last_norm=True)
    return _vit_s16("dino_vit_s16_e300_b1024", own, epochs=300, batch=1024)


def _vit_s16(recipe: str, objective: DINOConfig, *, epochs: float, batch: int) -> Config:
    """What the runs of the official code on ViT-S/16 share."""
    model = ModelConfig(
        architecture="deit_small",
        positions="learned",
        freeze_patch_embed=False,
        drop_path=0.1,
        hidden_dim=2048,
    )
    return official(recipe, objective, model, epochs=epochs, batch=batch)


def official(
    recipe: str, objective: DINOConfig, model: ModelConfig, *, epochs: float, batch: int
) -> Config:
    """What the runs of the official codes of DINO and EsViT share: views and optimizer."""
    view1, view2, *more = dino_views()
    return Config(
        recipe=recipe,
        epochs=epochs,
        global_batch_size=batch,
        model=model,
        objective=objective,
        optim=OptimConfig(
            lr=5e-4,
            schedule="cosine_inclusive",
            final_lr=1e-6,
            warmup_epochs=10,
            weight_decay=0.04,
            final_weight_decay=0.4,
            clip_tensor_norm=3.0,
        ),
        data=DataConfig(view1=view1, view2=view2, more_views=tuple(more)),
    )


def dino_digits() -> Config:
    """DINO with a tiny ViT on 8x8 handwritten digits: a few minutes on two cores."""
    base = quickstart_digits()
    return small(base, "dino_digits", DINOConfig, lr=base.optim.lr)


def dino_nano7_e12_b256() -> Config:
    """DINO with ViT-nano/7 on 28-pixel grey images such as Fashion-MNIST: ten minutes on two
    cores."""
    return small(vit_nano7_e12_b256(), "dino_nano7_e12_b256", DINOConfig, lr=4e-3)


def small(base: Config, recipe: str, kind: type[DINOConfig], *, lr: float) -> Config:
    """A recipe for small images with DINO or EsViT: trunk and views of the base, and batch norms in
    the head.

    Without them features of all images are so alike in a small encoder that targets become uniform
    and stay so. Small crops of such images show little of them, and cost more than they give.
    """
    return replace(
        base,
        recipe=recipe,
        objective=kind(
            prototypes=256,
            head_norm=True,
            initial_weights="xavier",
            freeze_last_layer_epochs=0,
            ema_momentum=0.97,
        ),
        optim=replace(base.optim, lr=lr),
    )
