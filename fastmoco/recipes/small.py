"""Small images: minutes on a CPU."""

from __future__ import annotations

from dataclasses import replace

from fastmoco.config import Config, DataConfig, KnnConfig, MoCoV3Config, ModelConfig, OptimConfig
from fastmoco_pipelines.spec import ViewSpec

GREY_MEAN, GREY_STD = (0.3, 0.3, 0.3), (0.35, 0.35, 0.35)


def _small(recipe: str, model: ModelConfig, view: ViewSpec, *, epochs: float) -> Config:
    """Common settings of the recipes for small images on a CPU; both views have
    the same distribution.
    """
    return Config(
        recipe=recipe,
        epochs=epochs,
        global_batch_size=256,
        model=model,
        objective=MoCoV3Config(temperature=0.2),
        optim=OptimConfig(
            lr=1.5e-3, weight_decay=0.05, betas=(0.9, 0.98), warmup_epochs=min(1.0, epochs / 10)
        ),
        data=DataConfig(view1=view, view2=view),
        knn=KnnConfig(every_epochs=max(1.0, epochs / 10), max_train_images=0, max_test_images=0),
    )


def _grey_view(size: int, *, flip: float) -> ViewSpec:
    """A view of small grey images: crop, brightness and contrast, without color jitter and blur."""
    return ViewSpec(
        size=size,
        crop_scale=(0.5, 1.0),
        flip_probability=flip,
        saturation=0.0,
        hue=0.0,
        grayscale_probability=0.0,
        blur_probability=0.0,
        mean=GREY_MEAN,
        std=GREY_STD,
        color="exact",
    )


def quickstart_digits() -> Config:
    """A tiny ViT on 8x8 handwritten digits: a few minutes on two cores, no download."""
    model = ModelConfig(
        architecture="vit_nano", image_size=8, patch_size=2, projection_dim=64, hidden_dim=256
    )
    # Contrast jitter about the mean did not help here.
    view = replace(_grey_view(8, flip=0.0), contrast=0.0)
    config = _small("quickstart_digits", model, view, epochs=130)
    objective = MoCoV3Config(temperature=0.2, ema_momentum=0.97)
    return replace(config, objective=objective, knn=replace(config.knn, every_epochs=13))


def unstable_digits() -> Config:
    """MoCo v3 made unstable on purpose, on handwritten digits scaled to 32 pixels: a trained patch
    projection, large batches, and a rate that rises all the time. With
    --model.freeze-patch-embed the instability begins later.
    """
    base = quickstart_digits()
    view = replace(base.data.view1, size=32)
    return replace(
        base,
        recipe="unstable_digits",
        epochs=200,
        global_batch_size=1024,  # of 1437 images, so that an epoch is one step
        log_every_steps=5,
        model=replace(base.model, image_size=32, patch_size=16, freeze_patch_embed=False),
        # For this batch 0.4 at the last step. beta2 is that of the paper.
        optim=replace(base.optim, lr=0.1, betas=(0.9, 0.999), warmup_epochs=200),
        data=replace(base.data, view1=view, view2=view),
        knn=replace(base.knn, every_epochs=5, max_share=1.0),
    )


def vit_nano7_e12_b256() -> Config:
    """ViT-nano/7 on 28-pixel grey images such as Fashion-MNIST: ten minutes on two cores."""
    model = ModelConfig(
        architecture="vit_nano", image_size=28, patch_size=7, projection_dim=128, hidden_dim=512
    )
    config = _small("vit_nano7_e12_b256", model, _grey_view(28, flip=0.5), epochs=12)
    return replace(config, knn=replace(config.knn, every_epochs=3))


def vit_nano8_e60_b256() -> Config:
    """ViT-nano/8 on 32-pixel color images such as patches of photographs: ten
    minutes on two cores.
    """
    model = ModelConfig(
        architecture="vit_nano", image_size=32, patch_size=8, projection_dim=128, hidden_dim=512
    )
    # Weaker than the jitter of MoCo v3: at 32 pixels color is much of the
    # difference between two photographs.
    view = ViewSpec(
        size=32,
        crop_scale=(0.4, 1.0),
        brightness=0.3,
        contrast=0.3,
        saturation=0.3,
        hue=0.05,
        grayscale_probability=0.05,
        blur_probability=0.0,
        color="exact",
    )
    config = _small("vit_nano8_e60_b256", model, view, epochs=60)
    return replace(config, knn=replace(config.knn, every_epochs=10))
