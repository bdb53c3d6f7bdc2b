"""The file of an encoder that leaves a run: what its header says, and reading it back.

Weights do not say everything. An encoder with 6 and one with 12 attention heads have tensors of
the same names and shapes and different features, and nothing in them tells how pixels were scaled.
The header of the safetensors file contains both (docs/encoder.md lists the keys).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self, TypeAlias, get_args

import torch
from torch import Tensor

import fastmoco
from fastmoco.checkpoint import Checkpoint, CheckpointError, score_in
from fastmoco.checkpoint.folder import MARKER
from fastmoco.checkpoint.safetensors_file import read_safetensors
from fastmoco.config import Config, ObjectiveConfig
from fastmoco.config.model import MlpNorm, Pooling, Positions
from fastmoco.config.serial import from_json
from fastmoco.models.convnextv2 import CONVNEXTS, ConvNeXtV2, ConvNeXtV2Architecture
from fastmoco.models.encoder import Family
from fastmoco.models.resnet import RESNETS, ResNet, ResNetArchitecture
from fastmoco.models.swin import SWINS, SwinArchitecture, SwinTransformer
from fastmoco.models.vit import ARCHITECTURES, VisionTransformer
from fastmoco_pipelines.files.small import json_of
from fastmoco_pipelines.files.whole import hash_file
from fastmoco_pipelines.spec import MOST_SIDE, EvalSpec

Trunk: TypeAlias = VisionTransformer | ResNet | SwinTransformer | ConvNeXtV2
"""The encoders of fastmoco."""
CHANNELS = 3
EVALUATED = "evaluated"
"""In the header of a full state of fastmoco: the network that its run evaluates."""
UNSEEN = ("heads", "image_size", "resize", "mean", "std", "pooling", "norm_eps")
"""What tensors of an encoder do not show, in the header of a full state."""
CUSTOM = "custom"
"""Architecture of a ViT of sizes that no architecture here has, as one of 5 heads."""
TIMM = {
    ("vit_tiny", 16),
    ("deit_small", 16),
    ("vit_small", 8),
    ("vit_small", 16),
    ("vit_small", 32),
    ("vit_base", 8),
    ("vit_base", 16),
    ("vit_base", 32),
    ("vit_large", 14),
    ("vit_large", 16),
    ("vit_large", 32),
    ("vit_huge", 14),
}
"""Architectures and patch sizes that timm has under a name, for images of 224 pixels."""
TORCHVISION = ("resnet18", "resnet34", "resnet50")
"""ResNets that torchvision and timm have under the same name, with the same names of tensors."""
IN_HEADER = {
    "class": "class_token",
    "mean": "patch_mean",
    "norm_mean": "patch_mean_after_norm",
    "mean_norm": "patch_mean_before_norm",
    "class_attention": "class_attention",
    "sincos": "sincos_2d_fixed_stored",
    "sincos_columns": "sincos_2d_columns_first_fixed_stored",
    "learned": "learned",
    "none": "none",
}
"""Values of `pooling` and `positions` -> how the header spells them."""
CONFIG_VALUES = {spelled: value for value, spelled in IN_HEADER.items()}
"""The other way round."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderDescription:
    """What the weights of a ViT do not say, and what they must fit.

    Attributes:
        architecture: a name of `fastmoco.models.ARCHITECTURES`, or `CUSTOM`.
        width: channels E of a token.
        depth: number of blocks.
        heads: attention heads.
        mlp_ratio: hidden width of an MLP over E.
        stem: "patch" or "conv".
        patch_size: pixels per side of a patch.
        image: how an image is resized, cropped and normalised.
        patch_embed_frozen: whether the patch projection has its random start values.
        pooling: one of `Pooling`, see `VisionTransformer`.
        positions: "sincos", "sincos_columns", "learned" or "none".
        mlp_norm: "layer" or "batch".
    """

    architecture: str
    width: int
    depth: int
    heads: int
    mlp_ratio: float = 4.0
    stem: str = "patch"
    patch_size: int
    image: EvalSpec
    patch_embed_frozen: bool = True
    pooling: Pooling = "class"
    positions: Positions = "sincos"
    mlp_norm: MlpNorm = "layer"

    family: ClassVar[Family] = "vit"

    @classmethod
    def of(cls, config: Config) -> Self:
        """That of the ViT of a run."""
        size = ARCHITECTURES[config.model.architecture]
        return cls(
            architecture=config.model.architecture,
            width=size.width,
            depth=size.depth,
            heads=size.heads,
            stem=size.stem,
            patch_size=config.model.patch_size,
            image=config.eval_spec(),
            patch_embed_frozen=size.stem == "patch" and config.model.freeze_patch_embed,
            pooling=config.model.pooling,
            positions=config.model.positions,
            mlp_norm=config.model.mlp_norm,
        )

    def timm_name(self) -> str | None:
        """The name of the model in timm, of the same width, depth and patches; None without one.

        timm's ViT-S has 6 heads, so the number of heads must be given to it too.
        """
        known = (self.architecture, self.patch_size) in TIMM and self.image.size == 224
        known = known and (self.pooling, self.mlp_norm) == ("class", "layer")
        known = known and self.positions != "none"
        return f"{self.architecture}_patch{self.patch_size}_224" if known else None

    def timm_arguments(self) -> dict[str, Any]:
        """Arguments of `timm.models.vision_transformer.VisionTransformer`."""
        found: dict[str, Any] = {
            "img_size": self.image.size,
            "patch_size": self.patch_size,
            "embed_dim": self.width,
            "depth": self.depth,
            "num_heads": self.heads,
            "mlp_ratio": self.mlp_ratio,
            "num_classes": 0,
        }
        if self.pooling != "class":
            found |= {"class_token": False, "global_pool": "avg", "fc_norm": False}
            found |= {"final_norm": self.pooling == "norm_mean"}
        return found | ({"pos_embed": "none"} if self.positions == "none" else {})

    def to_metadata(self) -> dict[str, str]:
        """As the header of a file; values are strings."""
        found = {
            "architecture": self.architecture,
            "width": str(self.width),
            "depth": str(self.depth),
            "heads": str(self.heads),
            "mlp_ratio": str(self.mlp_ratio),
            "stem": self.stem,
            "patch_size": str(self.patch_size),
            **_image_metadata(self.image),
            "pooling": IN_HEADER[self.pooling],
            "position_embedding": IN_HEADER[self.positions],
            "mlp_norm": self.mlp_norm,
            "patch_embed_frozen": json.dumps(self.patch_embed_frozen),
        }
        # timm's ViT has no convolutional stem, no batch norms in blocks and no class attention, and
        # another name of the norm of a mean.
        plain = self.stem == "patch" and self.mlp_norm == "layer"
        if plain and self.pooling not in ("class_attention", "mean_norm"):
            name = self.timm_name()
            found |= {"timm_model": name} if name is not None else {}
            found["timm_arguments"] = json.dumps(self.timm_arguments())
            found["timm_pretrained_cfg"] = _timm_image(self.image)
        return found

    @classmethod
    def from_metadata(cls, header: Mapping[str, str]) -> Self:
        """Read a header, and check it against itself.

        Raises:
            ValueError: naming the key that is missing, or contradicts another one.
        """
        _require_keys(header, "heads", "patch_size")
        architecture = header["architecture"]
        if architecture != CUSTOM and architecture not in ARCHITECTURES:
            raise ValueError(f"its architecture={architecture!r} is unknown to this version")
        size = ARCHITECTURES.get(architecture)
        names = ("width", "depth", "heads", "stem")
        known: dict[str, Any] = {} if size is None else {n: getattr(size, n) for n in names}
        try:
            found = cls(
                architecture=architecture,
                width=int(header.get("width", known.get("width", 0))),
                depth=int(header.get("depth", known.get("depth", 0))),
                heads=int(header["heads"]),
                mlp_ratio=float(header.get("mlp_ratio", 4.0)),
                stem=header.get("stem", known.get("stem", "patch")),
                patch_size=int(header["patch_size"]),
                image=_image_of(header),
                patch_embed_frozen=header.get("patch_embed_frozen", "true") == "true",
                pooling=_from_header(header, "pooling", Pooling),
                positions=_from_header(header, "position_embedding", Positions),
                mlp_norm=_from_header(header, "mlp_norm", MlpNorm),
            )
            timm = json_of(header.get("timm_arguments", "{}").encode(), "timm_arguments")
        except (ValueError, TypeError, OverflowError) as error:
            raise ValueError(f"its header cannot be read ({error})") from error
        if not isinstance(timm, dict):
            raise ValueError("its header cannot be read (timm_arguments is no object of JSON)")

        if found.stem not in ("patch", "conv") or not 0 < found.mlp_ratio < math.inf:
            raise ValueError(
                f"its header has stem={found.stem!r} and mlp_ratio={found.mlp_ratio}: a stem is "
                "patch or conv, a ratio a positive number"
            )

        # The same facts are in the header more than once; a changed one is noticed.
        for name, value in known.items():
            if getattr(found, name) != value:
                raise ValueError(
                    f"its header has {name}={getattr(found, name)}, but {architecture} has {value}"
                )
        for name, value in found.timm_arguments().items():
            if name in timm and timm[name] != value:
                raise ValueError(
                    f"its header contradicts itself: timm_arguments has {name}={timm[name]}, "
                    f"other keys give {value}"
                )
        return found

    def build(self) -> VisionTransformer:
        """An encoder with random weights."""
        return VisionTransformer(
            image_size=self.image.size,
            patch_size=self.patch_size,
            embed_dim=self.width,
            depth=self.depth,
            num_heads=self.heads,
            mlp_ratio=self.mlp_ratio,
            stem="conv" if self.stem == "conv" else "patch",
            freeze_patch_embed=self.patch_embed_frozen,
            pooling=self.pooling,
            positions=self.positions,
            mlp_norm=self.mlp_norm,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedDescription:
    """What the weights of a trunk do not say whose architecture says all its sizes.

    Attributes:
        architecture: a name of `known`.
        image: how an image is resized, cropped and normalised.
    """

    architecture: str
    image: EvalSpec

    family: ClassVar[Family]
    known: ClassVar[Mapping[str, ResNetArchitecture | SwinArchitecture | ConvNeXtV2Architecture]]
    """Architectures of the family, by name."""
    pooling: ClassVar[str] = "mean"
    heads: ClassVar[int | None] = None

    @classmethod
    def of(cls, config: Config) -> Self:
        """That of the encoder of a run."""
        return cls(architecture=config.model.architecture, image=config.eval_spec())

    @property
    def width(self) -> int:
        """Channels of the feature."""
        return self.known[self.architecture].width

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return sum(self.known[self.architecture].depths)

    def torchvision_name(self) -> str | None:
        """The name of the model in torchvision and in timm; None without one."""
        return self.architecture if self.architecture in TORCHVISION else None

    def to_metadata(self) -> dict[str, str]:
        """As the header of a file; values are strings."""
        name = self.torchvision_name()
        elsewhere = {}
        if name is not None:
            cfg = _timm_image(self.image)
            elsewhere = {"torchvision_model": name, "timm_model": name, "timm_pretrained_cfg": cfg}
        return {
            "architecture": self.architecture,
            "width": str(self.width),
            "depth": str(self.depth),
            **_image_metadata(self.image),
            "pooling": self.pooling,
            **elsewhere,
        }

    @classmethod
    def from_metadata(cls, header: Mapping[str, str]) -> Self:
        """Read a header, and check it against itself.

        Raises:
            ValueError: naming the key that is missing, or contradicts another one.
        """
        _require_keys(header)
        try:
            found = cls(architecture=header["architecture"], image=_image_of(header))
        except (ValueError, TypeError, OverflowError) as error:
            raise ValueError(f"its header cannot be read ({error})") from error
        for name in ("width", "depth"):
            value, known = header.get(name), str(getattr(found, name))
            if value not in (None, known):
                raise ValueError(
                    f"its header has {name}={value}, but {found.architecture} has {known}"
                )
        return found

    def build(self) -> ResNet | SwinTransformer | ConvNeXtV2:
        """An encoder with random weights."""
        return self.known[self.architecture](image_size=self.image.size)


class ResNetDescription(NamedDescription):
    """That of a ResNet."""

    __slots__ = ()
    family = "resnet"
    known = RESNETS


@dataclass(frozen=True, slots=True, kw_only=True)
class SwinDescription(NamedDescription):
    """That of a Swin.

    Attributes:
        window: tokens per side of its windows, where its map is larger.
        norm_eps: what its layer norms add to the variance.
    """

    window: int = 7
    norm_eps: float = 1e-5

    family = "swin"
    known = SWINS
    pooling = "mean_after_norm"

    @classmethod
    def of(cls, config: Config) -> Self:
        """That of the encoder of a run."""
        model = config.model
        return cls(
            architecture=model.architecture,
            image=config.eval_spec(),
            window=model.window,
            norm_eps=model.norm_eps,
        )

    def to_metadata(self) -> dict[str, str]:
        """As the header of a file; values are strings."""
        own = {"window": str(self.window), "norm_eps": str(self.norm_eps)}
        return {**NamedDescription.to_metadata(self), **own}

    @classmethod
    def from_metadata(cls, header: Mapping[str, str]) -> Self:
        """Read a header, and check it against itself.

        Raises:
            ValueError: naming the key that is missing, or contradicts another one.
        """
        found = super(SwinDescription, cls).from_metadata(header)
        try:
            return replace(
                found,
                window=int(header.get("window", found.window)),
                norm_eps=float(header.get("norm_eps", found.norm_eps)),
            )
        except ValueError as error:
            raise ValueError(f"its header cannot be read ({error})") from error

    def build(self) -> SwinTransformer:
        """An encoder with random weights."""
        return SWINS[self.architecture](
            image_size=self.image.size, window=self.window, eps=self.norm_eps
        )


class ConvNeXtV2Description(NamedDescription):
    """That of a ConvNeXt V2."""

    __slots__ = ()
    family = "convnextv2"
    known = CONVNEXTS
    pooling = "mean_before_norm"


NAMED: tuple[type[NamedDescription], ...] = (
    ResNetDescription,
    SwinDescription,
    ConvNeXtV2Description,
)
"""Descriptions of trunks whose architecture says all."""
Description: TypeAlias = EncoderDescription | NamedDescription


def describe_run(config: Config) -> Description:
    """The description of the encoder of a run."""
    kinds = {kind.family: kind for kind in NAMED}
    if config.model.family in kinds:
        return kinds[config.model.family].of(config)
    return EncoderDescription.of(config)


def description_of(header: Mapping[str, str]) -> Description:
    """Read the description in a header.

    Raises:
        ValueError: naming the key that is missing, or contradicts another one.
    """
    for kind in NAMED:
        if header.get("architecture") in kind.known:
            return kind.from_metadata(header)
    return EncoderDescription.from_metadata(header)


def _image_metadata(image: EvalSpec) -> dict[str, str]:
    return {
        "image_size": str(image.size),
        "channels": str(CHANNELS),
        "resize": str(image.resize),
        "mean": json.dumps(list(image.mean)),
        "std": json.dumps(list(image.std)),
    }


def _timm_image(image: EvalSpec) -> str:
    """The same as timm's `pretrained_cfg` says it, which has a resized side as a share of the crop."""
    share = image.size / image.resize
    if math.floor(image.size / share) != image.resize:  # as timm computes the side
        share = math.nextafter(share, 0)
    config = {
        "input_size": [CHANNELS, image.size, image.size],
        "mean": list(image.mean),
        "std": list(image.std),
        "interpolation": "bilinear",
        "crop_pct": share,
    }
    return json.dumps(config)


def _image_of(header: Mapping[str, str]) -> EvalSpec:
    size = int(header["image_size"])
    return stated_image(
        size,
        int(header.get("resize", size)),
        three(json_of(header["mean"].encode(), "mean", strict=True)),
        three(json_of(header["std"].encode(), "std", strict=True)),
    )


def stated_image(
    size: int,
    resize: int,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
) -> EvalSpec:
    """The preparation of images that a file states.

    Args:
        size: pixels per side of what the encoder sees.
        resize: pixels of the shorter side before the crop.
        mean: of each channel, of values in [0, 1].
        std: the standard deviation of each channel.

    Raises:
        ValueError: naming the value that no preparation has.
    """
    if resize > MOST_SIDE:
        raise ValueError(f"resize={resize}: at most {MOST_SIDE} pixels")
    if not all(map(math.isfinite, (*mean, *std))):
        raise ValueError(f"mean={mean}, std={std}: must be finite numbers")
    return EvalSpec(size=size, resize=resize, mean=mean, std=std)


def three(values: Any) -> tuple[float, float, float]:
    """A number for each channel.

    Raises:
        ValueError: if it is anything else.
    """
    if not isinstance(values, list) or len(values) != CHANNELS:
        raise ValueError(f"it has no {CHANNELS} numbers, one for each channel")
    if not all(type(value) in (int, float) for value in values):
        raise ValueError("a channel has no number")
    red, green, blue = map(float, values)
    return red, green, blue


def _require_keys(header: Mapping[str, str], *more: str) -> None:
    needed = ("architecture", *more, "image_size", "mean", "std")
    missing = [key for key in needed if key not in header]
    if missing:
        raise ValueError(f"its header has no {', '.join(missing)}")


def encoder_header(checkpoint: Checkpoint) -> dict[str, str]:
    """The header of the file of a checkpoint's encoder: its description, and where it comes from.

    Returns:
        Nothing for a checkpoint that no run has written.
    """
    state = checkpoint.state
    if "config" not in state:
        return {}
    config = from_json(state["config"])
    steps_per_epoch = state.get("resolved", {}).get("steps_per_epoch", 0)
    momentum = config.objective.evaluated == "momentum_encoder"
    header = {
        **describe_run(config).to_metadata(),
        **({"encoder": "momentum"} if momentum else {}),
        "method": config.objective.kind,
        "recipe": config.recipe,
        "epochs": f"{config.epochs:g}",
        "run_id": checkpoint.run_id,
        "checkpoint_sha256": hash_file(checkpoint.path / MARKER),
        "fastmoco": fastmoco.__version__,
    }
    if steps_per_epoch:
        header["epochs_done"] = f"{checkpoint.step / steps_per_epoch:.6g}"
    score = score_in(state)
    return header | ({score.name: f"{score.value:.6f}"} if score is not None else {})


def evaluated_network(checkpoint: Checkpoint) -> str:
    """The network of a checkpoint that is evaluated and exported, by name; "encoder" for a
    checkpoint that no run has written."""
    if "config" not in checkpoint.state:
        return ObjectiveConfig.evaluated
    return from_json(checkpoint.state["config"]).objective.evaluated


def state_header(checkpoint: Checkpoint) -> dict[str, str]:
    """The header of the file of a checkpoint's full state: the network that its run evaluates, and
    what the tensors of an encoder do not show. `architecture` is not in it: that is the mark of the
    file of an encoder."""
    header = {EVALUATED: evaluated_network(checkpoint)}
    if "config" not in checkpoint.state:
        return header
    described = describe_run(from_json(checkpoint.state["config"])).to_metadata()
    return header | {key: described[key] for key in UNSEEN if key in described}


class LoadedEncoder(NamedTuple):
    """An encoder from a file."""

    encoder: Trunk
    """In eval mode; maps [B, 3, H, W] images to [B, E] features."""
    image: EvalSpec
    """How its images are resized, cropped and normalised."""
    header: dict[str, str]
    """The header of the file: method, recipe, step, ... (docs/encoder.md)."""


def load_encoder(
    path: Path | str,
    description: Description | None = None,
    *,
    device: torch.device | str = "cpu",
) -> LoadedEncoder:
    """Load the file of `fastmoco checkpoint consolidate --encoder`.

    Args:
        path: the safetensors file.
        description: what the caller expects; needed for a file without a header of fastmoco, whose
            number of heads cannot be known. If the file has one, both must agree.
        device: of the encoder.

    Returns:
        The encoder, the transform of its images, and the header.

    Raises:
        CheckpointError: naming the file, if it cannot be read, if its header is missing or
            contradicts itself, the description or the tensors.
    """
    try:
        header, tensors = read_safetensors(path)
    except (OSError, ValueError, MemoryError) as error:
        raise CheckpointError(
            f"{path} cannot be read as safetensors: {str(error) or type(error).__name__}"
        ) from error

    # The description by the header, by the caller, or by both.
    if "architecture" in header:
        try:
            found = description_of(header)
        except ValueError as error:
            raise CheckpointError(
                f"{path}: {error}. Export it again with `fastmoco checkpoint consolidate "
                "RUN --encoder`"
            ) from error
        if description is not None:
            _require_same(path, found, description)
    elif description is None:
        raise CheckpointError(
            f"{path} has no metadata of fastmoco. 6 and 12 heads have weights of the same shapes, "
            "so give load_encoder an EncoderDescription, or export the file again with "
            "`fastmoco checkpoint consolidate RUN --encoder`"
        )
    else:
        found = description

    encoder = build_with(path, found, tensors)
    return LoadedEncoder(encoder.to(device).eval(), found.image, header)


def build_with(path: Path | str, description: Description, tensors: Mapping[str, Tensor]) -> Trunk:
    """An encoder with these weights, which must be its own: no more and no fewer.

    Args:
        path: where they come from, for errors.
        description: of the encoder.
        tensors: by our names, without head.

    Raises:
        CheckpointError: naming the path, and the tensors or the field that do not fit.
    """
    # Shapes are compared before memory is allocated, because a header may claim any size.
    if description.depth > len(tensors):
        raise CheckpointError(
            f"{path}: depth={description.depth}, and it has {len(tensors)} tensors in all"
        )
    try:
        with torch.device("meta"):
            blank = description.build().state_dict()
    except (ValueError, RuntimeError, OverflowError, TypeError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    _require_shapes(path, blank, tensors)
    encoder = description.build()
    encoder.load_state_dict(tensors)
    if any(tensor.dtype == torch.float64 for tensor in tensors.values()):
        encoder.double().load_state_dict(tensors)
    return encoder


def _require_same(path: Path | str, found: Description, wanted: Description) -> None:
    """Refuse a header that differs from what the caller expects."""
    if found.family != wanted.family:
        raise CheckpointError(
            f"{path} is {found.architecture}, the caller wants {wanted.architecture}"
        )
    ignored = {"patch_embed_frozen"}  # changes no feature
    for field in fields(wanted):
        has, needs = getattr(found, field.name), getattr(wanted, field.name)
        if has != needs and field.name not in ignored:
            raise CheckpointError(
                f"{path}: its metadata has {field.name}={has}, the caller wants {needs}"
            )


def _require_shapes(
    path: Path | str, wanted: Mapping[str, Tensor], found: Mapping[str, Tensor]
) -> None:
    """Refuse tensors of other names, shapes or kinds than those of the encoder."""
    wrong = sorted(wanted.keys() ^ found.keys())
    if wrong:
        raise CheckpointError(
            f"{path}: {wrong[:5]} are only in the file or only in the encoder that its metadata "
            "describes"
        )
    for name, tensor in wanted.items():
        if tensor.shape != found[name].shape:
            raise CheckpointError(
                f"{path}: {name} has shape {tuple(found[name].shape)}, and the encoder that its "
                f"metadata describes {tuple(tensor.shape)}"
            )
        if tensor.is_floating_point() != found[name].is_floating_point():
            raise CheckpointError(
                f"{path}: {name} is {found[name].dtype}, and of the encoder {tensor.dtype}: export "
                "it again"
            )
        if found[name].is_floating_point() and not bool(torch.isfinite(found[name].float()).all()):
            raise CheckpointError(f"{path}: {name} is not finite; take another file")


def _from_header(header: Mapping[str, str], key: str, kind: Any) -> Any:
    """The config's value of a key, by default the first of its kind.

    Raises:
        ValueError: naming the key.
    """
    values = {IN_HEADER.get(value, value): value for value in get_args(kind)}
    spelled = header.get(key, next(iter(values)))
    if spelled not in values:
        raise ValueError(f"{key}={spelled} is not one of {', '.join(values)}")
    return values[spelled]
