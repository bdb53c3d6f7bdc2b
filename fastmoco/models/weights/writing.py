"""Write an encoder in the format of another package.

Every tensor of the encoder has a name there, or the file is not written. What a format cannot
express is refused with the reason (`refusal`). `judging` then reads the file back by a loader of
its own.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from fastmoco.checkpoint import CheckpointError
from fastmoco.checkpoint.whole_file import storable, write_whole
from fastmoco.config.model import NAMES as TRUNK_NAMES
from fastmoco.models.blocks import Block
from fastmoco.models.encoder import Family, trunk_of
from fastmoco.models.encoder_file import (
    ConvNeXtV2Description,
    Description,
    EncoderDescription,
    SwinDescription,
    Trunk,
    build_with,
)
from fastmoco.models.resnet import RESNETS, BasicBlock
from fastmoco.models.vit import VisionTransformer
from fastmoco.models.weights.names import (
    HF_RESNET,
    HF_VIT,
    TORCHVISION_RESNET,
    TORCHVISION_VIT,
    Format,
    some,
    to_theirs,
)
from fastmoco.models.weights.reading import CONFIG, FOLDER_FILES, PREPROCESSOR
from fastmoco_pipelines.spec import EvalSpec

Target = Literal["timm", "torchvision", "hf", "moco-v3", "safetensors", "torch-export", "onnx"]
TARGETS: tuple[Target, ...] = get_args(Target)

_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")
_AFFINE = ("weight", "bias", *_BUFFERS)


def _norm(name: str, entries: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{name}.{entry}" for entry in entries)


OFFICIAL_HEADS: dict[Family, dict[str, tuple[str, ...]]] = {
    "vit": {
        "projector": (
            "0.weight",
            *_norm("1", _AFFINE),
            "3.weight",
            *_norm("4", _AFFINE),
            "6.weight",
            *_norm("7", _BUFFERS),
        ),
        "predictor": ("0.weight", *_norm("1", _AFFINE), "3.weight", *_norm("4", _BUFFERS)),
    },
    "resnet": {
        "projector": ("0.weight", *_norm("1", _AFFINE), "3.weight", *_norm("4", _BUFFERS)),
        "predictor": ("0.weight", *_norm("1", _AFFINE), "3.weight"),
    },
}
"""Names of the heads of the official release, in its order."""
OFFICIAL_HEAD_NAME: dict[Family, str] = {"vit": "head", "resnet": "fc"}
"""The attribute that is the projector in the official release."""
OFFICIAL_NETWORKS = {
    "encoder.": "module.base_encoder.",
    "momentum_encoder.": "module.momentum_encoder.",
    "predictor.": "module.predictor.",
}
MOST_ONNX_BYTES = 2**31 - 2**24
"""Size of a model in one file of ONNX, whose length has 31 bits."""


WITH_FUNCTION = ("safetensors", "torch-export", "onnx")
"""Formats that contain or describe every encoder of fastmoco."""


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """What some formats cannot express.

    Attributes:
        field: of `EncoderDescription`.
        values: of the field.
        targets: the formats.
        lacks: what they do not have, as a noun.
        instead: formats that can.
    """

    field: str
    values: tuple[str, ...]
    targets: tuple[Target, ...]
    lacks: str
    instead: tuple[str, ...] = WITH_FUNCTION


VIT_REFUSALS = (
    Refusal(
        field="stem",
        values=("conv",),
        targets=("timm", "torchvision", "hf"),
        lacks="no ViT with the convolutional stem of MoCo v3",
        instead=("moco-v3", *WITH_FUNCTION),
    ),
    Refusal(
        field="mlp_norm",
        values=("batch",),
        targets=("timm", "torchvision", "hf", "moco-v3"),
        lacks="no ViT with batch norms before its MLPs",
    ),
    Refusal(
        field="pooling",
        values=("mean", "norm_mean"),
        targets=("torchvision", "hf", "moco-v3"),
        lacks="no ViT without a class token",
        instead=("timm", *WITH_FUNCTION),
    ),
    Refusal(
        field="pooling",
        values=("class_attention",),
        targets=("timm", "torchvision", "hf", "moco-v3"),
        lacks="no ViT with class attention",
    ),
    Refusal(
        field="positions",
        values=("none",),
        targets=("moco-v3",),
        lacks="no ViT without positions",
        instead=("timm", "torchvision", "hf", *WITH_FUNCTION),
    ),
)


def refusal(to: Target, description: Description) -> str:
    """Why a format cannot express an encoder, with the cure; empty if it can."""
    if isinstance(description, EncoderDescription):
        for faults in VIT_REFUSALS:
            if to in faults.targets and getattr(description, faults.field) in faults.values:
                return f"--to {to} has {faults.lacks}; {', '.join(faults.instead)} can express it"
        return ""
    if isinstance(description, SwinDescription | ConvNeXtV2Description) and to not in WITH_FUNCTION:
        return (
            f"--to {to} has no {TRUNK_NAMES[description.family]} by the names of the published files; "
            f"{', '.join(WITH_FUNCTION)} can express it, safetensors by these names"
        )
    small = description.torchvision_name() is None
    if small and to in ("timm", "torchvision", "hf", "moco-v3"):
        return (
            f"{description.architecture} is a ResNet of fastmoco alone, with a stem of one small "
            f"convolution, and --to {to} has none such; {', '.join(WITH_FUNCTION)} can express it"
        )
    return ""


def plain_encoder(encoder: Trunk, description: Description) -> Trunk:
    """A copy in float32 on the host, in eval mode, of the plainest operations: for tracing, and to
    compare features with."""
    trunk = {
        name: tensor.detach().to("cpu", torch.float32 if tensor.is_floating_point() else None)
        for name, tensor in trunk_of(encoder.state_dict()).items()
    }
    copy = build_with("the encoder", description, trunk)
    if isinstance(copy, VisionTransformer):
        for block in copy.blocks:
            assert isinstance(block, Block)  # noqa: S101 - a type: all blocks are of this class
            block.attn.backend = "sdpa"
    return copy.eval().requires_grad_(False)


def write_encoder(
    to: Target,
    path: Path,
    encoder: Trunk,
    description: Description,
    header: Mapping[str, str],
) -> None:
    """Write an encoder to a new file, or for "hf" to a new folder; not for "moco-v3".

    Args:
        to: the format.
        path: must not exist.
        encoder: of `plain_encoder`.
        description: of it.
        header: where it comes from, for formats with metadata.

    Raises:
        CheckpointError: naming tensors without a name in the format.
        OSError: if the file system fails.
    """
    notes = {"format": "pt", **header}
    state = encoder.state_dict()
    if to in ("torchvision", "hf"):
        state = _with_positions(state, description)
    if to in ("timm", "safetensors"):
        write_whole(path, state, notes)
    elif to == "torchvision":
        known = TORCHVISION_VIT if description.family == "vit" else TORCHVISION_RESNET
        torch.save(storable(renamed(state, known)), path)
    elif to == "hf":
        _write_hf(path, state, encoder, description)
    elif to == "torch-export":
        program = traced(encoder, description)
        with path.open("wb") as file:  # torch warns about a path that does not end in .pt2
            torch.export.save(program, file, extra_files={"fastmoco.json": json.dumps(notes)})
    elif to == "onnx":
        _write_onnx(path, encoder, description, notes)
    else:
        raise ValueError(f"to={to!r}: is written by write_official")


def _with_positions(state: dict[str, Tensor], description: Description) -> dict[str, Tensor]:
    """Positions that add nothing, for formats whose ViTs always have some."""
    if not isinstance(description, EncoderDescription) or description.positions != "none":
        return state
    grid = description.image.size // description.patch_size
    zeros = torch.zeros(1, 1 + grid**2, description.width)
    return {"cls_token": state["cls_token"], "pos_embed": zeros, **state}


def renamed(state: Mapping[str, Tensor], known: Format) -> dict[str, Tensor]:
    """The tensors of an encoder by the names of a format.

    Raises:
        CheckpointError: naming those without one.
    """
    try:
        return to_theirs(state, known)
    except ValueError as error:
        raise CheckpointError(f"{error}, so an export would leave them out") from error


def official_checkpoint(
    networks: Mapping[str, Tensor], family: Family, *, arch: str, epoch: int
) -> dict[str, Any]:
    """A checkpoint of the official release: `epoch`, `arch`, and `state_dict` in its order.

    Args:
        networks: `encoder.*`, `momentum_encoder.*` and `predictor.*`, heads included.
        family: of the encoder.
        arch: its name.
        epoch: of the checkpoint.

    Raises:
        CheckpointError: naming tensors that the official format has no name for, or lacks.
    """
    heads = OFFICIAL_HEADS[family]
    expected = {f"predictor.{name}" for name in heads["predictor"]}
    expected |= {
        f"{network}head.{name}"
        for network in ("encoder.", "momentum_encoder.")
        for name in heads["projector"]
    }
    found = {
        name
        for name in networks
        if name.startswith("predictor.") or name.partition(".")[2].startswith("head.")
    }
    odd = sorted(found ^ expected)
    trunks = [
        {name.removeprefix(network) for name in networks if name.startswith(network)}
        for network in ("encoder.", "momentum_encoder.")
    ]
    odd += sorted(f"encoder.{name}" for name in trunks[0] ^ trunks[1])
    odd += [name for name in networks if not name.startswith(tuple(OFFICIAL_NETWORKS))]
    if odd:
        raise CheckpointError(
            "the official format has base encoder, momentum encoder and predictor of MoCo v3, and "
            f"this run has others: {some(odd)} in one of the two. Export the encoder alone: --to "
            "timm, torchvision or hf"
        )
    names = {}
    for ours, theirs in OFFICIAL_NETWORKS.items():
        for name in networks:
            if name.startswith(ours):
                rest = name.removeprefix(ours)
                if ours != "predictor." and rest.startswith("head."):
                    rest = OFFICIAL_HEAD_NAME[family] + rest.removeprefix("head")
                names[name] = theirs + rest
    ready = storable(networks)
    return {
        "epoch": epoch,
        "arch": arch,
        "state_dict": {theirs: ready[ours] for ours, theirs in names.items()},
    }


def traced(encoder: Trunk, description: Description) -> torch.export.ExportedProgram:
    """The encoder as a program of torch's own operations, for batches of any size.

    Raises:
        CheckpointError: if it has operations of other packages, which its users would need.
    """
    batch = torch.export.Dim("batch", min=1)
    with _quiet():
        program = torch.export.export(
            encoder, (_example(description),), dynamic_shapes=({0: batch},)
        )
    own = {
        str(node.target)
        for node in program.graph.nodes
        if node.op == "call_function"
        and isinstance(node.target, torch._ops.OpOverload)
        and node.target.namespace not in ("aten", "prims", "prim")
    }
    if own:
        raise CheckpointError(f"the program would need operations beyond torch: {sorted(own)[:4]}")
    return program


def hf_config(encoder: nn.Module, description: Description) -> dict[str, Any]:
    """`config.json` of `ViTModel` or `ResNetModel` of transformers."""
    common = {"num_channels": 3, "dtype": "float32", "torch_dtype": "float32"}
    if isinstance(description, EncoderDescription):
        return {
            "architectures": ["ViTModel"],
            "model_type": "vit",
            "image_size": description.image.size,
            "patch_size": description.patch_size,
            "hidden_size": description.width,
            "num_hidden_layers": description.depth,
            "num_attention_heads": description.heads,
            "intermediate_size": round(description.mlp_ratio * description.width),
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-6,
            "qkv_bias": True,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
            **common,
        }
    size = RESNETS[description.architecture]
    return {
        "architectures": ["ResNetModel"],
        "model_type": "resnet",
        "embedding_size": size.widths[0],
        "hidden_sizes": [width * size.block.expansion for width in size.widths],
        "depths": list(size.depths),
        "layer_type": "basic" if size.block is BasicBlock else "bottleneck",
        "hidden_act": "relu",
        "downsample_in_first_stage": False,
        "downsample_in_bottleneck": False,
        **common,
    }


def hf_preprocessor(image: EvalSpec) -> dict[str, Any]:
    """`preprocessor_config.json`: shorter side, central square, mean and standard deviation."""
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": image.resize},
        "resample": 2,  # bilinear
        "do_center_crop": True,
        "crop_size": {"height": image.size, "width": image.size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(image.mean),
        "image_std": list(image.std),
    }


def _write_hf(
    path: Path,
    state: Mapping[str, Tensor],
    encoder: Trunk,
    description: Description,
) -> None:
    tensors = renamed(state, HF_VIT if description.family == "vit" else HF_RESNET)
    path.mkdir()
    write_whole(path / FOLDER_FILES[0], tensors, {"format": "pt"})
    for name, content in (
        (CONFIG, hf_config(encoder, description)),
        (PREPROCESSOR, hf_preprocessor(description.image)),
    ):
        (path / name).write_text(json.dumps(content, indent=2) + "\n")


def _write_onnx(
    path: Path,
    encoder: Trunk,
    description: Description,
    notes: Mapping[str, str],
) -> None:
    size = sum(tensor.numel() * tensor.element_size() for tensor in encoder.state_dict().values())
    if size > MOST_ONNX_BYTES:
        raise CheckpointError(
            f"the encoder has {size / 1e9:.1f} GB, and a file of ONNX at most 2; use --to "
            "torch-export"
        )
    import onnx  # noqa: F401  (for its absence to be named: torch reports it in another way)
    import onnxscript  # noqa: F401

    with _quiet():
        program = torch.onnx.export(
            encoder,
            (_example(description),),
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
            input_names=["images"],
            output_names=["features"],
            verbose=False,
        )
    assert program is not None  # noqa: S101 - a type: torch returns one unless it raises
    program.model.metadata_props.update(notes)
    program.save(path, external_data=False)


def _example(description: Description) -> Tensor:
    """Images to trace with. Two, because a trace with one takes the size for fixed."""
    side = description.image.size
    return torch.zeros(2, 3, side, side)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch's exporters report of themselves."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
