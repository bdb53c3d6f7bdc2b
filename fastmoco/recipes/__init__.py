"""Recipes: functions that return a complete `Config`, named model_epochs_batch.

The ImageNet recipes have the official numbers of MoCo v3; for ViT: temperature 0.2, base learning
rate 1.5e-4, weight decay 0.1, momentum 0.99 rising to 1, 40 epochs of warm-up, crops from 8 % of
the area. `EXPECTED` has their published results. The small ones train in minutes on a CPU.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from dataclasses import replace

from fastmoco.config import Config
from fastmoco.recipes.byol import (
    byol_digits,
    byol_nano7_e12_b256,
    byol_r50_e1000_b4096,
    byol_vit_b16_e300_b4096,
    byol_vit_s16_e300_b4096,
)
from fastmoco.recipes.cmae import (
    cmae_digits,
    cmae_nano7_e12_b256,
    cmae_vit_b16_e300_b4096,
    cmae_vit_b16_e800_b4096,
    cmae_vit_b16_e1600_b4096,
)
from fastmoco.recipes.dino import (
    dino_digits,
    dino_nano7_e12_b256,
    dino_vit_s16_e100_b512,
    dino_vit_s16_e300_b1024,
)
from fastmoco.recipes.esvit import (
    esvit_digits,
    esvit_nano7_e12_b256,
    esvit_swin_t4_e300_b512,
    esvit_view_swin_t4_e300_b512,
)
from fastmoco.recipes.expected import EXPECTED, Expected
from fastmoco.recipes.extrema import (
    extrema_digits,
    extrema_nano7_e12_b256,
    extrema_vit_b16_e300_b2048,
    extrema_vit_b16_e300_b2048_m90,
)
from fastmoco.recipes.fcmae import (
    fcmae_convnextv2_base_e800_b4096,
    fcmae_convnextv2_tiny_e800_b4096,
    fcmae_micro_e60_b256,
)
from fastmoco.recipes.macrl import (
    macrl_digits,
    macrl_nano7_e12_b256,
    macrl_vit_s16_e300_b1024,
)
from fastmoco.recipes.mae import (
    mae_digits,
    mae_nano7_e12_b256,
    mae_vit_b16_e800_b4096,
    mae_vit_l16_e800_b4096,
)
from fastmoco.recipes.maskfeat import (
    maskfeat_digits,
    maskfeat_nano7_e12_b256,
    maskfeat_vit_b16_e1600_b2048,
    maskfeat_vit_l16_e1600_b2048,
)
from fastmoco.recipes.moby import (
    moby_deit_s16_e300_b512,
    moby_digits,
    moby_nano7_e12_b256,
    moby_swin_t4_e300_b512,
)
from fastmoco.recipes.moco import (
    moco_digits,
    moco_nano7_e12_b256,
    moco_v1_r50_e200_b256,
    moco_v2_r50_e200_b256,
    moco_v2_r50_e800_b256,
)
from fastmoco.recipes.moco_v3 import (
    resnet50_e100_b4096,
    resnet50_e300_b4096,
    resnet50_e1000_b4096,
    vit_b16_e300_b4096,
    vit_conv_b16_e300_b4096,
    vit_conv_s16_e300_b4096,
    vit_h14_e300_b4096,
    vit_l16_e300_b4096,
    vit_s16_e300_b1024,
    vit_s16_e300_b4096,
)
from fastmoco.recipes.mp3 import mp3_digits, mp3_nano7_e12_b256, mp3_vit_b16_e300_b4096
from fastmoco.recipes.projector_momentum import (
    projector_momentum_digits,
    projector_momentum_nano7_e12_b256,
    projector_momentum_vit_b16_e300_b4096,
    projector_momentum_vit_s16_e300_b4096,
)
from fastmoco.recipes.sdssl import (
    sdssl_byol_digits,
    sdssl_byol_nano7_e12_b256,
    sdssl_byol_vit_s16_e300_b1024,
    sdssl_digits,
    sdssl_nano7_e12_b256,
    sdssl_simclr_digits,
    sdssl_simclr_nano7_e12_b256,
    sdssl_simclr_vit_s16_e300_b1024,
    sdssl_vit_b16_e300_b1024,
    sdssl_vit_s16_e300_b1024,
)
from fastmoco.recipes.simclr import (
    simclr_digits,
    simclr_nano7_e12_b256,
    simclr_r50_e100_b4096,
    simclr_vit_b16_e300_b4096,
    simclr_vit_s16_e300_b4096,
)
from fastmoco.recipes.simsiam import (
    simsiam_digits,
    simsiam_nano7_e12_b256,
    simsiam_r50_e100_b512,
    simsiam_vit_b16_e300_b4096,
    simsiam_vit_s16_e300_b4096,
)
from fastmoco.recipes.small import (
    quickstart_digits,
    unstable_digits,
    vit_nano7_e12_b256,
    vit_nano8_e60_b256,
)
from fastmoco.recipes.supervised import (
    supervised_digits,
    supervised_nano7_e12_b256,
    supervised_vit_b16,
    supervised_vit_s16,
)
from fastmoco.recipes.supmae import (
    supmae_digits,
    supmae_nano7_e12_b256,
    supmae_vit_b16_e400_b2048,
)
from fastmoco.recipes.swav import (
    swav_crops_digits,
    swav_crops_nano7_e12_b256,
    swav_digits,
    swav_nano7_e12_b256,
    swav_r50_e400_b256,
    swav_r50_e400_b4096,
    swav_r50_e800_b4096,
    swav_vit_b16_e300_b4096,
    swav_vit_s16_e300_b4096,
    swav_vit_s16_e300_b4096_crops,
)
from fastmoco.recipes.token_dropping import (
    digits_drop50,
    vit_nano7_e12_b256_drop50,
    vit_s16_e300_b4096_drop50,
)
from fastmoco_pipelines.spec import ViewSpec, under

__all__ = [
    "EXPECTED",
    "RECIPES",
    "Expected",
    "get_recipe",
    "quickstart_digits",
    "resnet50_e100_b4096",
    "resnet50_e300_b4096",
    "resnet50_e1000_b4096",
    "unstable_digits",
    "vit_b16_e300_b4096",
    "vit_conv_b16_e300_b4096",
    "vit_conv_s16_e300_b4096",
    "vit_h14_e300_b4096",
    "vit_l16_e300_b4096",
    "vit_nano7_e12_b256",
    "vit_nano8_e60_b256",
    "vit_s16_e300_b1024",
    "vit_s16_e300_b4096",
    "with_image_size",
]

RECIPES: dict[str, Callable[[], Config]] = {
    recipe.__name__: recipe
    for recipe in (
        vit_s16_e300_b4096,
        vit_s16_e300_b1024,
        vit_b16_e300_b4096,
        vit_l16_e300_b4096,
        vit_h14_e300_b4096,
        vit_conv_s16_e300_b4096,
        vit_conv_b16_e300_b4096,
        resnet50_e100_b4096,
        resnet50_e300_b4096,
        resnet50_e1000_b4096,
        vit_nano7_e12_b256,
        vit_nano8_e60_b256,
        quickstart_digits,
        unstable_digits,
        vit_s16_e300_b4096_drop50,
        vit_nano7_e12_b256_drop50,
        digits_drop50,
        byol_vit_s16_e300_b4096,
        byol_vit_b16_e300_b4096,
        byol_r50_e1000_b4096,
        byol_nano7_e12_b256,
        byol_digits,
        simclr_vit_s16_e300_b4096,
        simclr_vit_b16_e300_b4096,
        simclr_r50_e100_b4096,
        simclr_nano7_e12_b256,
        simclr_digits,
        swav_vit_s16_e300_b4096,
        swav_vit_b16_e300_b4096,
        swav_vit_s16_e300_b4096_crops,
        swav_r50_e400_b4096,
        swav_r50_e800_b4096,
        swav_r50_e400_b256,
        swav_nano7_e12_b256,
        swav_digits,
        swav_crops_nano7_e12_b256,
        swav_crops_digits,
        dino_vit_s16_e100_b512,
        dino_vit_s16_e300_b1024,
        dino_nano7_e12_b256,
        dino_digits,
        esvit_swin_t4_e300_b512,
        esvit_view_swin_t4_e300_b512,
        esvit_nano7_e12_b256,
        esvit_digits,
        moco_v1_r50_e200_b256,
        moco_v2_r50_e200_b256,
        moco_v2_r50_e800_b256,
        moco_nano7_e12_b256,
        moco_digits,
        moby_deit_s16_e300_b512,
        moby_swin_t4_e300_b512,
        moby_nano7_e12_b256,
        moby_digits,
        simsiam_vit_s16_e300_b4096,
        simsiam_vit_b16_e300_b4096,
        simsiam_r50_e100_b512,
        simsiam_nano7_e12_b256,
        simsiam_digits,
        projector_momentum_vit_s16_e300_b4096,
        projector_momentum_vit_b16_e300_b4096,
        projector_momentum_nano7_e12_b256,
        projector_momentum_digits,
        sdssl_vit_s16_e300_b1024,
        sdssl_vit_b16_e300_b1024,
        sdssl_byol_vit_s16_e300_b1024,
        sdssl_simclr_vit_s16_e300_b1024,
        sdssl_nano7_e12_b256,
        sdssl_byol_nano7_e12_b256,
        sdssl_simclr_nano7_e12_b256,
        sdssl_digits,
        sdssl_byol_digits,
        sdssl_simclr_digits,
        mae_vit_b16_e800_b4096,
        mae_vit_l16_e800_b4096,
        mae_nano7_e12_b256,
        mae_digits,
        supmae_vit_b16_e400_b2048,
        supmae_nano7_e12_b256,
        supmae_digits,
        cmae_vit_b16_e300_b4096,
        cmae_vit_b16_e800_b4096,
        cmae_vit_b16_e1600_b4096,
        cmae_nano7_e12_b256,
        cmae_digits,
        macrl_vit_s16_e300_b1024,
        macrl_nano7_e12_b256,
        macrl_digits,
        maskfeat_vit_b16_e1600_b2048,
        maskfeat_vit_l16_e1600_b2048,
        maskfeat_nano7_e12_b256,
        maskfeat_digits,
        mp3_vit_b16_e300_b4096,
        mp3_nano7_e12_b256,
        mp3_digits,
        fcmae_convnextv2_tiny_e800_b4096,
        fcmae_convnextv2_base_e800_b4096,
        fcmae_micro_e60_b256,
        extrema_vit_b16_e300_b2048,
        extrema_vit_b16_e300_b2048_m90,
        extrema_nano7_e12_b256,
        extrema_digits,
        supervised_vit_s16,
        supervised_vit_b16,
        supervised_nano7_e12_b256,
        supervised_digits,
    )
}


def with_image_size(config: Config, image_size: int, *, patch_size: int | None = None) -> Config:
    """The same recipe at another image size: its views follow, and what is in pixels scales along,
    the blur and what a crop holds beside its view.

    Small crops keep their share of the image size, to whole patches; their blur in pixels changes
    as that of the large views.

    Raises:
        ValueError: if `image_size` is not a multiple of the patch size.
    """

    patch = patch_size or config.model.patch_size

    def resized(view: ViewSpec, size: int = image_size) -> ViewSpec:
        low, high = (sigma * image_size / config.model.image_size for sigma in view.blur_sigma)
        beside, shift = (
            round(pixels * image_size / config.model.image_size)
            for pixels in (view.base_size - view.size, view.shift)
        )
        return replace(
            view,
            size=size,
            base_size=size + beside if view.base_size else 0,
            shift=shift,
            blur_sigma=(low, high),
        )

    def small(view: ViewSpec) -> ViewSpec:
        patches = round(view.size * image_size / config.model.image_size / patch)
        return resized(view, patch * max(1, patches))

    with under("model"):
        model = replace(config.model, image_size=image_size, patch_size=patch)
    data = replace(
        config.data,
        view1=resized(config.data.view1),
        view2=resized(config.data.view2),
        more_views=tuple(map(small, config.data.more_views)),
    )
    return replace(config, model=model, data=data)


def get_recipe(name: str) -> Config:
    """The config of a recipe.

    Raises:
        ValueError: if there is no recipe of that name; the message suggests similar names.
    """
    if name in RECIPES:
        return RECIPES[name]()
    near = near_recipes(name)
    hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(RECIPES)};"
    raise ValueError(f"recipe {name!r} does not exist; {hint} `fastmoco recipes` lists them")


def near_recipes(name: str, *, most: int = 2) -> list[str]:
    """Recipes that a name may mean, the likeliest first: `ViT-S/16`, `moco_v3_vit_s`, `r50`."""

    def letters(text: str) -> str:
        found = re.sub(r"[^a-z0-9]", "", text.lower())
        found = re.sub("^(mocov3|moco)|(mocov3|moco|pretrain|imagenet)$", "", found)
        for word, short in SIZES.items():
            found = re.sub(f"vit(conv)?{word}", rf"vit\g<1>{short}", found)
        return re.sub(r"\br(?:n|es)?(?=\d)", "resnet", found)

    wanted = letters(name)
    alone = re.sub(r"[^a-z0-9]", "", name.lower())
    if alone in ALONE:
        return list(ALONE[alone])[:most]
    known = {recipe: letters(recipe) for recipe in RECIPES}
    found = [recipe for recipe, text in known.items() if wanted and text.startswith(wanted)]
    found += [recipe for recipe, text in known.items() if len(wanted) > 2 and wanted in text]
    if not found:
        found = difflib.get_close_matches(name.lower(), RECIPES, n=most, cutoff=0.5)
        texts = difflib.get_close_matches(wanted, known.values(), n=most, cutoff=0.5)
        found += [recipe for recipe, text in known.items() if text in texts]
    return list(dict.fromkeys(found))[:most]


ALONE = {
    "moco": ("vit_s16_e300_b4096", "moco_v2_r50_e200_b256"),
    "mocov3": ("vit_s16_e300_b4096", "vit_nano8_e60_b256"),
    "digits": ("quickstart_digits", "digits_drop50"),
}
"""Recipes for a word that names a method or a set and nothing else."""
SIZES = {"small": "s", "base": "b", "large": "l", "huge": "h"}
"""Sizes of ViT as other programs name them."""
