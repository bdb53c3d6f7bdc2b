"""What a file of weights contains: its format, which encoder, how its images are prepared, and the
number of attention heads, which tensors do not show.

A ViT with 6 and one with 12 heads have tensors of the same shapes and other features. The number is
taken from what a file states, or from what only one known model can be; where two are possible the
file is refused with the cure.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import Tensor

from fastmoco.checkpoint import CheckpointError
from fastmoco.config.model import NAMES as TRUNK_NAMES
from fastmoco.config.model import Positions
from fastmoco.models.encoder import Family
from fastmoco.models.encoder_file import EVALUATED, TORCHVISION, stated_image, three
from fastmoco.models.positions import FIXED_POSITIONS
from fastmoco.models.weights.fcmae_file import dense, is_of_fcmae, start_norm
from fastmoco.models.weights.names import (
    FULL_STATE,
    NETWORKS,
    OF_DINO,
    OF_MOBY,
    SIGNS,
    class_rows,
    find_format,
    some,
    to_ours,
    unwrapped,
)
from fastmoco.models.weights.reading import RawWeights
from fastmoco_pipelines.files.small import json_of
from fastmoco_pipelines.spec import IMAGENET_MEAN, IMAGENET_STD, EvalSpec

Which = Literal["base", "momentum"]
"""Which encoder of a file or a run: the trained one, or its moving average."""
ENCODERS: dict[Which, str] = {"base": "encoder.", "momentum": "momentum_encoder."}
"""What the names of an encoder begin with."""


def which_of(network: str) -> Which:
    """Which encoder a network of an objective is, by its name."""
    return "momentum" if network == "momentum_encoder" else "base"


HEADS = {
    # (width, depth, stem): heads
    (192, 12, "patch"): 3,
    (768, 12, "patch"): 12,
    (1024, 24, "patch"): 16,
    (1280, 32, "patch"): 16,
    (384, 11, "conv"): 12,
    (768, 11, "conv"): 12,
}
"""Heads of sizes for which timm, DeiT, Hugging Face and MoCo v3 agree. They do not for ViT-S of 384
channels and 12 blocks: 6 heads in timm and DeiT, 12 in MoCo v3."""
MOCO_V3_HEADS = {**HEADS, (384, 12, "patch"): 12}
DEIT_HEADS = {**HEADS, (384, 12, "patch"): 6}
"""Of DINO and MoBY."""
TIMM_HEADS_BY_NAME = {"tiny": 3, "small": 6, "base": 12, "large": 16, "huge": 16}
"""Heads of timm's `vit_small_...`, where its config does not give them."""
IMAGE_SIZE = 224
"""Pixels per side of the images of a trunk whose weights do not depend on it: all but a ViT."""
FCMAE = "ConvNeXt V2 of FCMAE"
PROBE_KEYS = {"best_acc1", "optimizer"}
"""Keys of a linear-probe file of moco-v3 beside those of every checkpoint."""


@dataclass(frozen=True, kw_only=True)
class EncoderWeights:
    """The weights of an encoder from a file.

    Attributes:
        source: the file, as errors name it.
        format: of the file, as shown to the user.
        which: the encoder of the file that this is.
        family: kind of the encoder.
        trunk: tensors by our names, without head.
        beside: names of the file that are no part of the encoder, and what they are.
        heads: attention heads; None if the file does not show them, and for a trunk without.
        image: how images are resized, cropped and normalised.
        says_normalised: whether its mean and deviation are known, not those of ImageNet by default.
        networks: all tensors of a checkpoint of moco-v3 or of fastmoco by our names, head included.
        facts: what the file states: arch, epoch, header.
        notes: what a user should know, in sentences.
    """

    source: str
    format: str
    which: Which = "base"
    family: Family
    trunk: Mapping[str, Tensor]
    beside: Mapping[str, str] = field(default_factory=dict)
    heads: int | None = None
    image: EvalSpec
    says_normalised: bool = True
    networks: Mapping[str, Tensor] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def sizes(self) -> ViTSizes:
        """The sizes of a ViT."""
        return vit_sizes(self.trunk, self.source)


@dataclass(frozen=True, slots=True, kw_only=True)
class ViTSizes:
    """What the tensors of a ViT show of it; see `VisionTransformer`.

    Attributes:
        grid: tokens per side; None without positions.
    """

    width: int
    depth: int
    mlp_ratio: float
    stem: Literal["patch", "conv"]
    patch_size: int
    grid: int | None


Normalised = tuple[tuple[float, float, float], tuple[float, float, float]]
"""Mean and standard deviation of each channel, of values in [0, 1]."""


def find_encoder(
    raw: RawWeights,
    which: Which | None = None,
    *,
    heads: int | None = None,
    normalised: Normalised | None = None,
) -> EncoderWeights:
    """Find the encoder in what a file contains.

    Args:
        raw: the file.
        which: "base" or "momentum"; None: the one that the file has, of a full state of fastmoco
            the one that its run evaluates, of student and teacher the teacher, and else the base
            encoder.
        heads: attention heads of a ViT, if the caller knows them.
        normalised: how images were normalised, if the caller knows it.

    Raises:
        CheckpointError: naming the file, what in it has no place in an encoder, or which encoder is
            missing, with the cure.
    """
    source = str(raw.path)
    names = unwrapped(raw.tensors)
    notes: list[str] = []

    # One network of several, or the only one.
    kind, networks, others = _networks(names, source)
    tensors: Mapping[str, Tensor] = names
    if networks:
        evaluated = ENCODERS["momentum"][:-1] if kind == OF_DINO else raw.header.get(EVALUATED, "")
        which = which or which_of(evaluated)
        beginning = ENCODERS[which]
        tensors = {
            name.removeprefix(beginning): tensor
            for name, tensor in networks.items()
            if name.startswith(beginning)
        }
        if not tensors:
            raise CheckpointError(f"{source} ({kind}) has no {which} encoder")
    if not networks and is_of_fcmae(tensors):
        kind = FCMAE
        tensors, others = dense(tensors, source)
        if norm := start_norm(tensors):
            tensors |= norm
            notes.append(
                f"{source} has no final norm: its weights are 1 and 0, as before any training"
            )
    found = find_format(tensors)
    if found is None:
        raise CheckpointError(
            f"{source} contains no encoder that is known here: its first tensors are "
            f"{', '.join(list(raw.tensors)[:4])}. Known are ViTs of moco-v3, timm, torchvision and "
            "Hugging Face, ResNets of moco-v3, torchvision, timm and Hugging Face, published Swins "
            "and ConvNeXt V2, and checkpoints of DINO, EsViT, MoBY and FCMAE"
        )
    known, prefix = found
    stripped = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    if len(stripped) != len(tensors):
        raise CheckpointError(f"{source}: has two tensors of one name, with and without {prefix!r}")
    renamed = to_ours(stripped, known)
    if renamed.unknown:
        raise CheckpointError(
            f"{source} ({kind or known.name}): {some(renamed.unknown)}: no part of a "
            f"plain {TRUNK_NAMES[known.family]}: it is another architecture, "
            "which fastmoco does not have"
        )

    # What it is called, and what else is in the file.
    format_name = kind or _named(known.name, raw, renamed.beside)
    if which == "momentum" and not networks:
        raise CheckpointError(
            f"{source} ({format_name}) has one encoder, and does not say that it is the momentum "
            "encoder: leave out --which momentum, or give the checkpoint of the pre-training"
        )
    beside = renamed.beside | others
    if networks:
        ours = ENCODERS[which or "base"]
        beside |= {name: _what(name) for name in networks if not name.startswith(ours)}
    weights = EncoderWeights(
        source=source,
        format=format_name,
        which=which or "base",
        family=known.family,
        trunk=renamed.trunk,
        beside=beside,
        image=EvalSpec(),
        networks={} if kind in (OF_DINO, OF_MOBY) else networks,
        facts=_facts(raw),
        notes=(*notes, *_notes(format_name, raw, known.family)),
    )
    return _described(weights, raw, heads, normalised)


def vit_sizes(trunk: Mapping[str, Tensor], source: str) -> ViTSizes:
    """Read the sizes of a ViT off its tensors.

    Raises:
        CheckpointError: naming the file and the tensor that is missing or has no possible shape.
    """
    numbers = {int(n[1]) for name in trunk if (n := re.match(r"blocks\.(\d+)\.", name))}
    if numbers != set(range(len(numbers))):
        raise CheckpointError(f"{source}: its blocks are not numbered from 0 to {len(numbers) - 1}")
    stem: Literal["patch", "conv"] = "conv" if "patch_embed.proj.0.weight" in trunk else "patch"
    last = "patch_embed.proj.12.weight" if stem == "conv" else "patch_embed.proj.weight"
    wanted = {last: 4, "blocks.0.mlp.fc1.weight": 2}
    for name, dimensions in wanted.items():
        if name not in trunk or trunk[name].dim() != dimensions or 0 in trunk[name].shape:
            raise CheckpointError(f"{source}: has no {name} of {dimensions} dimensions")
    width = trunk[last].shape[0]
    positions = trunk.get("pos_embed")
    grid = None
    if positions is not None:
        tokens = positions.shape[1] if positions.dim() == 3 else 0
        grid = math.isqrt(max(0, tokens - class_rows(trunk)))
        if positions.dim() != 3 or not grid or grid**2 != tokens - class_rows(trunk):
            raise CheckpointError(
                f"{source}: pos_embed of shape {tuple(positions.shape)} is not that of a square "
                "image with at most one token more"
            )
    return ViTSizes(
        width=width,
        depth=len(numbers),
        mlp_ratio=trunk["blocks.0.mlp.fc1.weight"].shape[0] / width,
        stem=stem,
        patch_size=16 if stem == "conv" else trunk[last].shape[2],
        grid=grid,
    )


def fixed_positions(positions: Tensor, grid: int) -> Positions | None:
    """Which fixed table a table of positions is to rounding, with or without a class token's row:
    "sincos" of MoCo v3, "sincos_columns" of MAE; None: neither."""
    width, rows = positions.shape[-1], positions.shape[-2]
    if width % 4 or rows not in (grid**2, grid**2 + 1):
        return None
    for kind, table in FIXED_POSITIONS.items():
        if bool((positions.detach().float() - table(grid, width)[-rows:]).abs().max() < 1e-3):
            return kind
    return None


def _networks(
    names: Mapping[str, Tensor], source: str
) -> tuple[str, dict[str, Tensor], dict[str, str]]:
    """The networks of a checkpoint by our names; empty for a file of one network.

    Returns:
        What kind of file it is, its networks, and the names that belong to none.

    Raises:
        CheckpointError: if two tensors have one name.
    """
    for kind, beginnings in NETWORKS.items():
        signs = SIGNS.get(kind, (tuple(beginnings),))
        if not all(any(name.startswith(sign) for name in names) for sign in signs):
            continue
        found, others = {}, {}
        for name, tensor in names.items():
            theirs = next((b for b in beginnings if name.startswith(b)), None)
            if theirs is None:
                others[name] = "no part of a network"
            else:
                ours = beginnings[theirs] + name.removeprefix(theirs)
                if ours in found:
                    raise CheckpointError(
                        f"{source} ({kind}): has two tensors of one name, with and without "
                        f"{theirs!r} in front: {name}; save one network"
                    )
                found[ours] = tensor
        return kind, found, others
    return "", {}, {}


def _named(name: str, raw: RawWeights, beside: Mapping[str, str]) -> str:
    """The format of a file of one network, with what its header or container shows."""
    if "architecture" in raw.header and "image_size" in raw.header:
        return "encoder of fastmoco"
    classifier = "classifier" in beside.values()
    of_moco_v3 = raw.wrapped_in == "state_dict" and "arch" in raw.container
    if of_moco_v3 and classifier and set(raw.container.get("keys", ())) >= PROBE_KEYS:
        return "linear probe of moco-v3"
    return name


def _notes(format_name: str, raw: RawWeights, family: Family) -> list[str]:
    if format_name == OF_DINO and family == "swin":
        return [
            "layer norms add 1e-6 to the variance, as in EsViT: a run that starts from this file "
            "needs --model.norm-eps 1e-6"
        ]
    if format_name != "linear probe of moco-v3":
        return []
    return [
        f"{raw.path} is a linear-probe file: a classifier on a frozen encoder. Its encoder is used, "
        "which is the base encoder of the pre-training in eval mode; it has no momentum encoder, no "
        "projector and no predictor. The pre-trained checkpoint is another file"
    ]


def _facts(raw: RawWeights) -> dict[str, Any]:
    facts: dict[str, Any] = {
        key: raw.container[key] for key in ("arch", "epoch") if key in raw.container
    }
    return facts | ({"header": dict(raw.header)} if raw.header else {})


def _what(name: str) -> str:
    """What a tensor of another network is."""
    heads = (head for head in ("predictor", "projector") if name.startswith(head))
    return next(heads, "the other encoder")


def _described(
    weights: EncoderWeights, raw: RawWeights, heads: int | None, normalised: Normalised | None
) -> EncoderWeights:
    """Add heads, the preparation of images, and notes about both."""
    stated = _stated(raw)
    notes = [*weights.notes, *stated.notes]
    sizes = weights.sizes() if weights.family == "vit" else None

    # Images: by the file, else as ImageNet models have them.
    size = IMAGE_SIZE if sizes is None else (sizes.grid or 0) * sizes.patch_size
    size = max(stated.image_size or size, 0)
    resize = stated.resize or (round(size * 256 / 224) if size > 64 else size)
    mean, std = normalised or (IMAGENET_MEAN, IMAGENET_STD)
    said = normalised is not None or weights.format == "moco-v3"
    if stated.mean and stated.std and normalised is None:
        mean, std, said = stated.mean, stated.std, True
    try:
        image = stated_image(max(size, 1), max(resize, 1), mean, std)
    except ValueError as error:
        raise CheckpointError(
            f"{weights.source}: what it states cannot be used: {error}"
        ) from error
    if not said:
        notes.append(
            "the file does not say how its images were normalised: by mean and standard deviation "
            "of ImageNet"
        )
    weights = replace(weights, image=image, says_normalised=said)
    if sizes is None:
        return replace(weights, notes=tuple(notes))

    # Heads: by the file, by the caller, or where every known model of this size has the same.
    found = stated.heads
    if found is not None and heads is not None and found != heads:
        raise CheckpointError(
            f"{weights.source} states {found} attention heads, the caller {heads}; leave out heads"
        )
    found = found or heads
    if found is None:
        key = (sizes.width, sizes.depth, sizes.stem)
        positions = weights.trunk.get("pos_embed")
        of_moco_v3 = weights.format in ("moco-v3", "linear probe of moco-v3")
        # Not so in a full state of fastmoco, which has ViT-S of both numbers with that table.
        foreign = weights.format != FULL_STATE
        if not of_moco_v3 and foreign and positions is not None and sizes.grid:
            of_moco_v3 = fixed_positions(positions, sizes.grid) == "sincos"
        known = MOCO_V3_HEADS if of_moco_v3 else HEADS
        if weights.format in (OF_DINO, OF_MOBY):
            known = DEIT_HEADS
        found = known.get(key)
        if found is not None and key not in HEADS and known is MOCO_V3_HEADS:
            notes.append(f"{found} attention heads, as in MoCo v3 (timm and DeiT have 6)")
    if found is not None and (found < 1 or sizes.width % found):
        raise CheckpointError(
            f"{weights.source}: {found} heads do not divide its width of {sizes.width}"
        )
    return replace(weights, heads=found, notes=tuple(notes))


def heads_differ(weights: EncoderWeights) -> bool:
    """Whether known models of the size of a ViT have different numbers of heads."""
    sizes = weights.sizes()
    key = (sizes.width, sizes.depth, sizes.stem)
    return key in MOCO_V3_HEADS and key not in HEADS


def require_heads(weights: EncoderWeights) -> int:
    """The attention heads of a ViT.

    Raises:
        CheckpointError: if the file does not show them, with the cure.
    """
    if weights.heads is None:
        known = ""
        if heads_differ(weights):
            known = ", which are 12 for MoCo v3 and 6 for timm, DeiT and Hugging Face"
        raise CheckpointError(
            f"{weights.source} ({weights.format}) does not show its number of attention heads"
            f"{known}; another number gives other features without an error. Give it (--heads N), "
            "or write it into a file once: `fastmoco export FILE --to safetensors --heads N --out "
            "encoder.safetensors`, and use that"
        )
    return weights.heads


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stated:
    """What a file states in words: in its header, or in the files beside it."""

    heads: int | None = None
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    image_size: int | None = None
    resize: int | None = None
    notes: tuple[str, ...] = ()


def _stated(raw: RawWeights) -> _Stated:
    """Read the header of fastmoco, or `config.json` and `preprocessor_config.json` of transformers
    or of timm.

    Raises:
        CheckpointError: for a config of a model that has the same tensors and another function.
    """
    config, header = raw.config, raw.header
    try:
        if header.keys() & {"architecture", EVALUATED} and "image_size" in header:
            return _Stated(
                heads=int(header["heads"]) if "heads" in header else None,
                image_size=int(header["image_size"]),
                resize=int(header["resize"]) if "resize" in header else None,
                mean=_three(json_of(header.get("mean", "null").encode(), "mean")),
                std=_three(json_of(header.get("std", "null").encode(), "std")),
            )
        notes = _require_function(config)
        heads = config.get("num_attention_heads")
        if str(config.get("architecture", "")).startswith("vit_"):
            heads = dict(config.get("model_args") or {}).get("num_heads")
            named = re.match(r"vit_([a-z]+)_", str(config["architecture"]))
            if heads is None and named:
                heads = TIMM_HEADS_BY_NAME.get(named[1])
        images = raw.preprocessor or dict(config.get("pretrained_cfg") or {})
        return _Stated(
            heads=None if heads is None else int(heads),
            mean=_three(images.get("image_mean", images.get("mean"))),
            std=_three(images.get("image_std", images.get("std"))),
            notes=notes,
        )
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        raise CheckpointError(f"{raw.path}: what it states cannot be used: {error}") from error


FUNCTION: dict[str, dict[str, tuple[object, ...]]] = {
    "vit": {
        "hidden_act": ("gelu",),
        "layer_norm_eps": (1e-6, 1e-12),
        "qkv_bias": (True,),
        "num_channels": (3,),
    },
    "resnet": {
        "hidden_act": ("relu",),
        "downsample_in_bottleneck": (False,),
        "downsample_in_first_stage": (False,),
        "num_channels": (3,),
    },
}
"""What a config of transformers may state, by its `model_type`: tensors of these shapes with other
values are another function."""
OUR_EPS = 1e-6


def _require_function(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Compare a config of transformers with what our encoders compute; notes about it."""
    kind = config.get("model_type")
    named = str(config.get("architecture", ""))
    if named.startswith("resnet") and named.partition(".")[0] not in TORCHVISION:
        # Such as resnetblur50, whose blur has no tensors.
        raise ValueError(f"architecture={named!r}, and fastmoco has {', '.join(TORCHVISION)}")
    if kind is None:
        return ()
    if kind not in FUNCTION:
        raise ValueError(f"model_type={kind!r}, and fastmoco has {' and '.join(FUNCTION)}")
    for key, values in FUNCTION[kind].items():
        if key in config and config[key] not in values:
            known = " or ".join(map(str, values))
            raise ValueError(f"{key}={config[key]!r}, and fastmoco has {known}")
    eps = config.get("layer_norm_eps", OUR_EPS)
    if eps == OUR_EPS:
        return ()
    return (f"its layer norms add {eps:g} to the variance, ours {OUR_EPS:g}",)


def _three(values: Any) -> tuple[float, float, float] | None:
    return None if values is None else three(values)
