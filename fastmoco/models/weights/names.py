"""The names of the tensors of an encoder in the formats of other packages, as tables.

Our names are those of timm for a ViT, of torchvision for a ResNet and of the published files for a
Swin and a ConvNeXt V2. A row of a table pairs one of our names with one or several of the other format;
several are the parts of ours along its first dimension (q, k and v of `qkv`). `{i}` and `{s}` stand
for a number, `{s-1}` for the number before it, `{p}` for weight or bias, `{b}` for any tensor of a
norm. The same table serves both directions.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from fastmoco.models.encoder import Family

Row: TypeAlias = tuple[str, ...]
"""Our name, then the names of the other format."""

_FIELD = re.compile(r"\{(\w)(-1)?\}")
_NORM = "weight|bias|running_mean|running_var|num_batches_tracked"
_NUMBER = "[0-9]{1,4}"
_VALUES = {"i": _NUMBER, "s": _NUMBER, "c": _NUMBER, "p": "weight|bias", "b": _NORM}

VIT = (
    "cls_token",
    "pos_embed",
    "patch_embed.proj.{p}",
    "patch_embed.proj.{i}.{b}",
    "blocks.{i}.norm1.{p}",
    "blocks.{i}.attn.qkv.{p}",
    "blocks.{i}.attn.proj.{p}",
    "blocks.{i}.norm2.{b}",
    "blocks.{i}.mlp.fc1.{p}",
    "blocks.{i}.mlp.fc2.{p}",
    "norm.{p}",
    "blocks_token.{i}.gamma_{c}",
    "blocks_token.{i}.norm{c}.{p}",
    "blocks_token.{i}.attn.qkv.{p}",
    "blocks_token.{i}.attn.proj.{p}",
    "blocks_token.{i}.mlp.fc{c}.{p}",
)
"""Our names of a ViT's trunk: those of timm, of moco-v3 and of DeiT too. The second name of the
patch projection is that of the convolutional stem. Blocks of class attention are called as in the
code of ExtreMA."""
CLASS_ATTENTION = "blocks_token."
"""Beginning of the names of blocks of class attention."""

RESNET = (
    "conv1.weight",
    "bn1.{b}",
    "layer{s}.{i}.conv{c}.weight",
    "layer{s}.{i}.bn{c}.{b}",
    "layer{s}.{i}.downsample.0.weight",
    "layer{s}.{i}.downsample.1.{b}",
)
"""Our names of a ResNet's trunk: those of torchvision, of timm and of moco-v3 too."""

SWIN = (
    "patch_embed.proj.{p}",
    "patch_embed.norm.{p}",
    "layers.{s}.blocks.{i}.norm{c}.{p}",
    "layers.{s}.blocks.{i}.attn.relative_position_bias_table",
    "layers.{s}.blocks.{i}.attn.qkv.{p}",
    "layers.{s}.blocks.{i}.attn.proj.{p}",
    "layers.{s}.blocks.{i}.mlp.fc{c}.{p}",
    "layers.{s}.downsample.norm.{p}",
    "layers.{s}.downsample.reduction.weight",
    "norm.{p}",
)
"""Our names of a Swin's trunk: those of the published files."""

CONVNEXTV2 = (
    "downsample_layers.{s}.{i}.{p}",
    "stages.{s}.{i}.dwconv.{p}",
    "stages.{s}.{i}.norm.{p}",
    "stages.{s}.{i}.pwconv{c}.{p}",
    "stages.{s}.{i}.grn.gamma",
    "stages.{s}.{i}.grn.beta",
    "norm.{p}",
)
"""Our names of a ConvNeXt V2's trunk: those of the published files."""


@dataclass(frozen=True, kw_only=True)
class Format:
    """How a package names the tensors of an encoder.

    Attributes:
        name: as shown to the user.
        family: of the encoder.
        rows: pairs of names of the trunk.
        beside: what else such files contain, by a pattern of names: it is no part of an encoder.
        signs: names that every file of the format has, and no file of another one.
        prefixes: what may be in front of all names of a file.
    """

    name: str
    family: Family
    rows: tuple[Row, ...]
    beside: Mapping[str, str]
    signs: tuple[str, ...]
    prefixes: tuple[str, ...] = ("",)

    def is_of(self, names: Iterable[str]) -> bool:
        """Whether these are names of this format."""
        return set(self.signs) <= set(names)


BESIDE_MAE = {
    "mask_token": "decoder",
    "decoder_pos_embed": "decoder",
    "decoder_embed.{p}": "decoder",
    **{
        f"decoder_blocks.{{i}}.{layer}.{{p}}": "decoder"
        for layer in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    },
    "decoder_norm.{p}": "decoder",
    "decoder_pred.{p}": "decoder",
    "cls_head.{i}.{b}": "class branch",
}
"""What is beside the encoder in a published checkpoint of MAE or SupMAE."""
HEAD_OF_DINO = {
    "head.mlp.{i}.{b}": "projector",
    "head.last_layer.weight_g": "last layer",
    "head.last_layer.weight_v": "last layer",
    "head.last_layer.parametrizations.weight.original{i}": "last layer",
    "head.mlp.{b}": "projector",
    "head_dense.mlp.{i}.{b}": "projector of regions",
    "head_dense.last_layer.weight_g": "last layer of regions",
    "head_dense.last_layer.weight_v": "last layer of regions",
    "head_dense.last_layer.parametrizations.weight.original{i}": "last layer of regions",
    "head_dense.mlp.{b}": "projector of regions",
}
"""The head of DINO, as a full state of fastmoco has it, and the second one of EsViT's code."""

TIMM_VIT = Format(
    name="timm ViT",
    family="vit",
    rows=(
        *((name, name) for name in VIT),
        # In the code of ExtreMA.
        (
            "blocks_token.{i}.attn.qkv.{p}",
            "blocks_token.{i}.attn.q.{p}",
            "blocks_token.{i}.attn.k.{p}",
            "blocks_token.{i}.attn.v.{p}",
        ),
    ),
    beside={
        "head.{p}": "classifier",
        "head_dist.{p}": "classifier",
        "pre_logits.fc.{p}": "layer before the classifier",
        "head.{i}.{b}": "projector",
        **HEAD_OF_DINO,
        **BESIDE_MAE,
    },
    signs=("blocks.0.norm1.weight", "blocks.0.attn.qkv.weight"),
)
TORCHVISION_VIT = Format(
    name="torchvision ViT",
    family="vit",
    rows=(
        ("cls_token", "class_token"),
        ("pos_embed", "encoder.pos_embedding"),
        ("patch_embed.proj.{p}", "conv_proj.{p}"),
        ("blocks.{i}.norm1.{p}", "encoder.layers.encoder_layer_{i}.ln_1.{p}"),
        (
            "blocks.{i}.attn.qkv.{p}",
            "encoder.layers.encoder_layer_{i}.self_attention.in_proj_{p}",
        ),
        (
            "blocks.{i}.attn.proj.{p}",
            "encoder.layers.encoder_layer_{i}.self_attention.out_proj.{p}",
        ),
        ("blocks.{i}.norm2.{p}", "encoder.layers.encoder_layer_{i}.ln_2.{p}"),
        ("blocks.{i}.mlp.fc1.{p}", "encoder.layers.encoder_layer_{i}.mlp.0.{p}"),
        ("blocks.{i}.mlp.fc2.{p}", "encoder.layers.encoder_layer_{i}.mlp.3.{p}"),
        ("norm.{p}", "encoder.ln.{p}"),
    ),
    beside={"heads.head.{p}": "classifier"},
    signs=("class_token", "conv_proj.weight"),
)
HF_VIT = Format(
    name="Hugging Face ViT",
    family="vit",
    rows=(
        ("cls_token", "embeddings.cls_token"),
        ("pos_embed", "embeddings.position_embeddings"),
        ("patch_embed.proj.{p}", "embeddings.patch_embeddings.projection.{p}"),
        ("blocks.{i}.norm1.{p}", "encoder.layer.{i}.layernorm_before.{p}"),
        (
            "blocks.{i}.attn.qkv.{p}",
            "encoder.layer.{i}.attention.attention.query.{p}",
            "encoder.layer.{i}.attention.attention.key.{p}",
            "encoder.layer.{i}.attention.attention.value.{p}",
        ),
        ("blocks.{i}.attn.proj.{p}", "encoder.layer.{i}.attention.output.dense.{p}"),
        ("blocks.{i}.norm2.{p}", "encoder.layer.{i}.layernorm_after.{p}"),
        ("blocks.{i}.mlp.fc1.{p}", "encoder.layer.{i}.intermediate.dense.{p}"),
        ("blocks.{i}.mlp.fc2.{p}", "encoder.layer.{i}.output.dense.{p}"),
        ("norm.{p}", "layernorm.{p}"),
    ),
    beside={
        "pooler.dense.{p}": "pooler",
        "embeddings.mask_token": "mask token",
        "classifier.{p}": "classifier",
    },
    signs=("embeddings.cls_token", "encoder.layer.0.attention.attention.query.weight"),
    prefixes=("vit.", ""),
)
HF_VIT_IN_MEMORY = Format(
    name="Hugging Face ViT (state_dict of transformers 5)",
    family="vit",
    rows=(
        *HF_VIT.rows[:3],
        ("blocks.{i}.norm1.{p}", "layers.{i}.layernorm_before.{p}"),
        (
            "blocks.{i}.attn.qkv.{p}",
            "layers.{i}.attention.q_proj.{p}",
            "layers.{i}.attention.k_proj.{p}",
            "layers.{i}.attention.v_proj.{p}",
        ),
        ("blocks.{i}.attn.proj.{p}", "layers.{i}.attention.o_proj.{p}"),
        ("blocks.{i}.norm2.{p}", "layers.{i}.layernorm_after.{p}"),
        ("blocks.{i}.mlp.fc1.{p}", "layers.{i}.mlp.fc1.{p}"),
        ("blocks.{i}.mlp.fc2.{p}", "layers.{i}.mlp.fc2.{p}"),
        ("norm.{p}", "layernorm.{p}"),
    ),
    beside=HF_VIT.beside,
    signs=("embeddings.cls_token", "layers.0.attention.q_proj.weight"),
    prefixes=("vit.", ""),
)
TORCHVISION_RESNET = Format(
    name="torchvision ResNet",
    family="resnet",
    rows=tuple((name, name) for name in RESNET),
    beside={
        "fc.{p}": "classifier",
        "fc.{i}.{b}": "projector",
        "head.{i}.{b}": "projector",
        **HEAD_OF_DINO,
    },
    signs=("conv1.weight", "layer1.0.conv1.weight"),
)
HF_RESNET = Format(
    name="Hugging Face ResNet",
    family="resnet",
    rows=(
        ("conv1.weight", "embedder.embedder.convolution.weight"),
        ("bn1.{b}", "embedder.embedder.normalization.{b}"),
        (
            "layer{s}.{i}.conv{c}.weight",
            "encoder.stages.{s-1}.layers.{i}.layer.{c-1}.convolution.weight",
        ),
        (
            "layer{s}.{i}.bn{c}.{b}",
            "encoder.stages.{s-1}.layers.{i}.layer.{c-1}.normalization.{b}",
        ),
        (
            "layer{s}.{i}.downsample.0.weight",
            "encoder.stages.{s-1}.layers.{i}.shortcut.convolution.weight",
        ),
        (
            "layer{s}.{i}.downsample.1.{b}",
            "encoder.stages.{s-1}.layers.{i}.shortcut.normalization.{b}",
        ),
    ),
    beside={"classifier.{i}.{p}": "classifier"},
    signs=("embedder.embedder.convolution.weight",),
    prefixes=("resnet.", ""),
)
PUBLISHED_SWIN = Format(
    name="Swin",
    family="swin",
    rows=tuple((name, name) for name in SWIN),
    beside={
        "head.{p}": "classifier",
        "head.{i}.{b}": "projector",
        **HEAD_OF_DINO,
        "layers.{s}.blocks.{i}.attn.relative_position_index": "table that follows from the sizes",
        "layers.{s}.blocks.{i}.attn_mask": "table that follows from the sizes",
    },
    signs=("patch_embed.norm.weight", "layers.0.blocks.0.attn.relative_position_bias_table"),
)
PUBLISHED_CONVNEXTV2 = Format(
    name="ConvNeXt V2",
    family="convnextv2",
    rows=tuple((name, name) for name in CONVNEXTV2),
    beside={"head.{p}": "classifier", "head.{i}.{b}": "projector", **HEAD_OF_DINO},
    signs=("downsample_layers.0.0.weight", "stages.0.0.grn.gamma"),
)
FORMATS = (
    TIMM_VIT,
    TORCHVISION_VIT,
    HF_VIT,
    HF_VIT_IN_MEMORY,
    TORCHVISION_RESNET,
    HF_RESNET,
    PUBLISHED_SWIN,
    PUBLISHED_CONVNEXTV2,
)

FULL_STATE = "full state of fastmoco"
"""How the file of all tensors of a checkpoint is called."""
OF_DINO = "student and teacher"
"""How a checkpoint of DINO or of EsViT is called."""
OF_MOBY = "MoBY"
"""How one of MoBY is."""
NETWORKS = {
    OF_DINO: {
        "student.backbone.": "encoder.",
        "teacher.backbone.": "momentum_encoder.",
        "student.": "encoder.",
        "teacher.": "momentum_encoder.",
    },
    OF_MOBY: {
        "encoder_k.": "momentum_encoder.",
        "encoder.": "encoder.",
        "projector_k.": "projector_k.",
        "projector.": "projector.",
        "predictor.": "predictor.",
    },
    "moco-v3": {
        "base_encoder.fc.": "encoder.head.",
        "momentum_encoder.fc.": "momentum_encoder.head.",
        "base_encoder.": "encoder.",
        "momentum_encoder.": "momentum_encoder.",
        "predictor.": "predictor.",
    },
    FULL_STATE: {
        "model.encoder.": "encoder.",
        "model.momentum_encoder.": "momentum_encoder.",
        "model.predictor.": "predictor.",
    },
}
"""Files of several networks: what their names begin with, and what ours begin with; the first that
fits counts. A name without one of these beginnings is no part of a network. The projector is called
as the classifier that it replaces: `fc` in a ResNet of moco-v3."""
SIGNS = {OF_MOBY: ("encoder.", "encoder_k.")}
"""What some names of a file must begin with, each of these, to be of that kind. Of other kinds any of
`NETWORKS` is enough."""

WRAPPERS = ("module.", "_orig_mod.")
"""What DistributedDataParallel and torch.compile put in front of all names."""


@dataclass(frozen=True)
class Renamed:
    """The tensors of a file by our names.

    Attributes:
        trunk: tensors of the encoder, by our names, in the order of the file.
        beside: what is no part of an encoder: names of the file, and what they are.
        unknown: names of the file that the format does not have.
    """

    trunk: dict[str, Tensor]
    beside: dict[str, str]
    unknown: list[str]


def to_ours(tensors: Mapping[str, Tensor], known: Format) -> Renamed:
    """Rename the tensors of a format to ours; parts of one tensor are joined.

    Every name of the input is in the result: as a tensor, beside the trunk, or as unknown.
    """
    trunk: dict[str, Tensor] = {}
    parts: dict[str, dict[int, tuple[str, Tensor]]] = {}
    wanted: dict[str, int] = {}
    beside: dict[str, str] = {}
    unknown: list[str] = []
    for name, tensor in tensors.items():
        found = _ours(name, known)
        if found is not None:
            ours, part, count = found
            if count == 1:
                trunk[ours] = tensor
            else:
                trunk.setdefault(ours, tensor)  # keeps its place in the order
                parts.setdefault(ours, {})[part] = (name, tensor)
                wanted[ours] = count
            continue
        what = next(
            (w for pattern, w in known.beside.items() if _match(pattern, name) is not None), None
        )
        if what is None:
            unknown.append(name)
        else:
            beside[name] = what
    for ours, found_parts in parts.items():
        shapes = {tuple(tensor.shape) for _, tensor in found_parts.values()}
        if len(found_parts) == wanted[ours] and len(shapes) == 1 and shapes != {()}:
            trunk[ours] = torch.cat([found_parts[part][1] for part in range(wanted[ours])])
        else:
            del trunk[ours]
            unknown.extend(name for name, _ in found_parts.values())
    return Renamed(trunk, beside, unknown)


def to_theirs(trunk: Mapping[str, Tensor], known: Format) -> dict[str, Tensor]:
    """Rename the tensors of an encoder from our names to those of a format, in our order.

    Raises:
        ValueError: naming the tensors that the format has no name for.
    """
    tensors: dict[str, Tensor] = {}
    nameless = []
    for name, tensor in trunk.items():
        theirs = _theirs(name, known)
        if not theirs:
            nameless.append(name)
        parts = tensor.chunk(len(theirs)) if len(theirs) > 1 else (tensor,)
        tensors.update(zip(theirs, parts, strict=bool(theirs)))
    if nameless:
        raise ValueError(f"{known.name} has no name for {some(nameless)}")
    return tensors


def class_rows(trunk: Iterable[str]) -> int:
    """Rows of a ViT's positions that are of a class token: 1 where it is among the tokens, 0 without
    one or with class attention, whose class token has no position."""
    names = set(trunk)
    return int("cls_token" in names and not reads_by_class_attention(names))


def reads_by_class_attention(trunk: Iterable[str]) -> bool:
    """Whether the class token of a ViT is behind the other blocks."""
    return any(name.startswith(CLASS_ATTENTION) for name in trunk)


def unwrapped(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names without the prefixes of torch's wrappers, where all names have them."""
    found = dict(tensors)
    while wrapper := next((w for w in WRAPPERS if found and _all_begin(found, w)), None):
        found = {name.removeprefix(wrapper): tensor for name, tensor in found.items()}
    return found


def find_format(names: Iterable[str]) -> tuple[Format, str] | None:
    """The format of some names, and the prefix in front of those of the trunk."""
    names = list(names)
    for known in FORMATS:
        for prefix in known.prefixes:
            if known.is_of(name.removeprefix(prefix) for name in names if name.startswith(prefix)):
                return known, prefix
    return None


def _all_begin(names: Iterable[str], beginning: str) -> bool:
    return all(name.startswith(beginning) for name in names)


def _ours(name: str, known: Format) -> tuple[str, int, int] | None:
    """Our name for one of a format: with its part, and of how many."""
    for ours, *theirs in known.rows:
        for part, pattern in enumerate(theirs):
            values = _match(pattern, name)
            if values is not None:
                return _filled(ours, values), part, len(theirs)
    return None


def _theirs(name: str, known: Format) -> list[str]:
    """The names of a format for one of ours."""
    for ours, *theirs in known.rows:
        values = _match(ours, name)
        if values is not None:
            return [_filled(pattern, values) for pattern in theirs]
    return []


def _match(pattern: str, name: str) -> dict[str, str] | None:
    """What the fields of a pattern are in a name; None if it is another name."""
    found = _compiled(pattern).fullmatch(name)
    if found is None:
        return None
    # A field `{s-1}` is a number one below `s`; so is one in the name of a group, `s_1`.
    return {
        field[0]: value if len(field) == 1 else str(int(value) + 1)
        for field, value in found.groupdict().items()
    }


def _filled(pattern: str, values: Mapping[str, str]) -> str:
    def one(field: re.Match[str]) -> str:
        value = values[field[1]]
        return str(int(value) - 1) if field[2] else value

    return _FIELD.sub(one, pattern)


@functools.cache
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile("".join(_pieces(pattern)))


def _pieces(pattern: str) -> Iterator[str]:
    end = 0
    for field in _FIELD.finditer(pattern):
        yield re.escape(pattern[end : field.start()])
        group = f"{field[1]}_1" if field[2] else field[1]
        yield f"(?P<{group}>{_VALUES[field[1]]})"
        end = field.end()
    yield re.escape(pattern[end:])


def some(names: Iterable[str], count: int = 4) -> str:
    """The first of some names, and the number of the others, for messages."""
    names = list(names)
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more
