"""Recipes: functions that return a whole `Config`, named model_epochs_batch.

The ImageNet recipes carry the official numbers of MoCo v3 (temperature 0.2, base learning rate 1.5e-4, weight decay 0.1,
momentum 0.99 rising to 1, 40 epochs of warm-up, crops from 8 % of the area). The small ones train in minutes on a CPU.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import replace

from fastmoco.config import Config, DataConfig, KnnConfig, ModelConfig, ObjectiveConfig, OptimConfig
from fastmoco_pipelines.spec import ViewSpec

GREY_MEAN, GREY_STD = (0.3, 0.3, 0.3), (0.35, 0.35, 0.35)


def vit_s16_e300_b4096() -> Config:
    """ViT-S/16 on ImageNet, 300 epochs, batch 4096: 73.2 % linear top-1 in the official release."""
    return Config(recipe="vit_s16_e300_b4096")


def vit_s16_e300_b1024() -> Config:
    """ViT-S/16 on ImageNet, 300 epochs, batch 1024: the official single-node set-up."""
    return replace(vit_s16_e300_b4096(), recipe="vit_s16_e300_b1024", global_batch_size=1024)


def vit_b16_e300_b4096() -> Config:
    """ViT-B/16 on ImageNet, 300 epochs, batch 4096: 76.7 % linear top-1 in the official release."""
    return replace(vit_s16_e300_b4096(), recipe="vit_b16_e300_b4096", model=ModelConfig(architecture="vit_base"))


def _small(recipe: str, model: ModelConfig, view: ViewSpec, *, epochs: float) -> Config:
    """What the recipes for small images on a CPU share; both views are drawn by one rule."""
    return Config(
        recipe=recipe,
        epochs=epochs,
        global_batch_size=256,
        model=model,
        objective=ObjectiveConfig(temperature=0.2),
        optim=OptimConfig(lr=1.5e-3, weight_decay=0.05, betas=(0.9, 0.98), warmup_epochs=min(1.0, epochs / 10)),
        data=DataConfig(view1=view, view2=view),
        knn=KnnConfig(every_epochs=max(1.0, epochs / 10), max_train_images=0, max_test_images=0),
    )


def _grey_view(size: int, *, flip: float) -> ViewSpec:
    """A view of small grey pictures: crop, brightness and contrast; colour and blur have nothing to act on."""
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
    model = ModelConfig(architecture="vit_nano", image_size=8, patch_size=2, projection_dim=64, hidden_dim=256)
    # Contrast about the mean taught nothing here.
    view = replace(_grey_view(8, flip=0.0), contrast=0.0)
    config = _small("quickstart_digits", model, view, epochs=130)
    objective = replace(config.objective, ema_momentum=0.97)
    return replace(config, objective=objective, knn=replace(config.knn, every_epochs=13))


def vit_nano7_e12_b256() -> Config:
    """ViT-nano/7 on 28-pixel grey pictures such as Fashion-MNIST: ten minutes on two cores."""
    model = ModelConfig(architecture="vit_nano", image_size=28, patch_size=7, projection_dim=128, hidden_dim=512)
    config = _small("vit_nano7_e12_b256", model, _grey_view(28, flip=0.5), epochs=12)
    return replace(config, knn=replace(config.knn, every_epochs=3))


def vit_nano8_e60_b256() -> Config:
    """ViT-nano/8 on 32-pixel colour pictures such as patches of photographs: ten minutes on two cores."""
    model = ModelConfig(architecture="vit_nano", image_size=32, patch_size=8, projection_dim=128, hidden_dim=512)
    # Milder than MoCo v3's own jitter: at 32 pixels colour is much of what tells two photographs apart.
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


RECIPES: dict[str, Callable[[], Config]] = {
    recipe.__name__: recipe
    for recipe in (
        vit_s16_e300_b4096,
        vit_s16_e300_b1024,
        vit_b16_e300_b4096,
        vit_nano7_e12_b256,
        vit_nano8_e60_b256,
        quickstart_digits,
    )
}


def with_image_size(config: Config, image_size: int, *, patch_size: int | None = None) -> Config:
    """The same recipe at another image size: both views follow, and the blur, which is in pixels, scales along.

    Raises:
        ValueError: if ``image_size`` is no multiple of the patch size.
    """

    def resized(view: ViewSpec) -> ViewSpec:
        low, high = (sigma * image_size / view.size for sigma in view.blur_sigma)
        return replace(view, size=image_size, blur_sigma=(low, high))

    model = replace(config.model, image_size=image_size, patch_size=patch_size or config.model.patch_size)
    data = replace(config.data, view1=resized(config.data.view1), view2=resized(config.data.view2))
    return replace(config, model=model, data=data)


def get_recipe(name: str) -> Config:
    """The config of a recipe.

    Raises:
        ValueError: if there is none of that name, with the nearest ones.
    """
    if name in RECIPES:
        return RECIPES[name]()
    near = difflib.get_close_matches(name, RECIPES, n=2, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(RECIPES)}"
    raise ValueError(f"recipe {name!r} does not exist; {hint} `fastmoco recipes` lists them")
