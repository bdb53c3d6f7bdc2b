"""The interface of encoders for objectives, planner, sharding and telemetry."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal, Protocol

from torch import Tensor, nn

from fastmoco.config.model import Family as Family


class Coupling(StrEnum):
    """The part of a model in which the result of an image depends on the rest of the batch."""

    NONE = "none"
    """None: every image has its own loss, and losses of micro-batches add up (MAE, DINO)."""
    HEADS = "heads"
    """Heads and loss: they need the whole batch, the trunk runs on micro-batches (MoCo v3)."""
    TRUNK = "trunk"
    """The trunk, by its batch norms: it needs the whole batch at once (ResNet, conv stem)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """The modules of a network by role, for sharding, compilation, costs and telemetry."""

    stem: Mapping[str, nn.Module] = field(default_factory=dict)
    """Modules that turn pixels into tokens, by name in the network: "patch_embed"."""
    blocks: nn.ModuleList = field(default_factory=nn.ModuleList)
    """Blocks of the trunk, first to last."""
    heads: Mapping[str, nn.Module] = field(default_factory=dict)
    """Projector, predictor, decoder, by name in the network; "" is the network itself."""
    methods: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Methods other than `forward` through which a module is called, by the module's name in the
    network; "" is the network itself, whose methods run all blocks."""
    alike: bool = True
    """Whether all blocks have the same shapes and `blocks` is the network's own list. Then
    measurements shorten it temporarily."""


class Encoder(Protocol):
    """From images to features; an `nn.Module`."""

    family: Family
    """Kind of the trunk."""
    embed_dim: int
    """Width of the feature."""
    coupling: Coupling
    """`TRUNK` or `NONE`."""
    coupling_reason: str
    """The reason, as a clause for error messages; empty for `NONE`."""
    head: nn.Module
    """The projector, attached by an objective; the encoder does not apply it."""

    def __call__(
        self, images: Tensor, paths: Tensor | None = None, kept: Tensor | None = None
    ) -> Tensor:
        """[B, 3, H, W] images -> [B, E] features, without the head; `paths` and `kept` as for
        `encode`."""
        ...

    def plain(
        self, images: Tensor, paths: Tensor | None = None, kept: Tensor | None = None
    ) -> Tensor:
        """The reference of a call, without optimizations."""
        ...

    def recompute(self, what: Literal["none", "selective", "full"]) -> None:
        """Choose the activations that the backward recomputes."""
        ...

    def parts(self) -> Parts:
        """The modules by role."""
        ...

    def most_numbers(self, side: int | None = None) -> int:
        """Upper bound on the elements kept per view in training, at least twice the true value.

        `side`: pixels of the view in each direction; default the image size.
        """
        ...

    def forward_flops(self, side: int, keep: float = 1.0) -> float:
        """FLOPs of the forward of one view of `side` pixels in each direction, of whose patch
        tokens a ViT keeps a share."""
        ...


class RegionEncoder(Encoder, Protocol):
    """An encoder that also gives the tokens of its last map."""

    def regions(
        self, images: Tensor, paths: Tensor | None = None, kept: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """[B, 3, H, W] images -> [B, E] features as of a call, and [B, L, E] tokens; `paths` and
        `kept` as for `TokenEncoder.encode`."""
        ...

    def plain_regions(
        self, images: Tensor, paths: Tensor | None = None, kept: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The reference of `regions`, without optimizations."""
        ...


class TokenEncoder(Encoder, Protocol):
    """An encoder that turns images into tokens before its blocks, as a ViT does.

    Objectives use more than a call only where the trunk couples no images and has these methods.
    """

    tokens: int
    """Tokens of one view in a block, including the class token."""

    def stem_tensors(self) -> list[Tensor]:
        """All tensors that turn pixels into tokens.

        Two encoders whose stems are frozen and equal can share the tokens.
        """
        ...

    def patch_tokens(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] images -> [B, L, E] tokens."""
        ...

    def encode(
        self, patch_tokens: Tensor, paths: Tensor | None = None, kept: Tensor | None = None
    ) -> Tensor:
        """[B, L, E] tokens -> [B, E] features.

        `paths`: [B, depth, 2] factors of residual branches; given to encoders that have
        stochastic depth (`drop_path`). `kept`: [B, k] numbers of the patch tokens that the blocks
        see; given where some are left out (`token_drop`).
        """
        ...

    def encode_plain(
        self, patch_tokens: Tensor, paths: Tensor | None = None, kept: Tensor | None = None
    ) -> Tensor:
        """The reference of `encode`, without optimizations."""
        ...

    def encode_taps(
        self, patch_tokens: Tensor, paths: Tensor | None = None, kept: Tensor | None = None
    ) -> Tensor:
        """[B, L, E] tokens -> [B, depth, E] features after every block; the last is `encode`."""
        ...

    def taps(
        self, images: Tensor, paths: Tensor | None = None, kept: Tensor | None = None
    ) -> Tensor:
        """[B, 3, H, W] images -> [B, depth, E] features after every block."""
        ...

    def plain_taps(
        self, images: Tensor, paths: Tensor | None = None, kept: Tensor | None = None
    ) -> Tensor:
        """The reference of `taps`, without optimizations."""
        ...


def with_heads(encoder: Encoder) -> Coupling:
    """The coupling of an objective whose heads or loss couple images: that of its trunk, if the
    trunk does too."""
    return Coupling.TRUNK if encoder.coupling is Coupling.TRUNK else Coupling.HEADS


def family_of(encoder: Any) -> Family:
    """Kind of an encoder's trunk; one that names none counts as a ViT."""
    family: Family = getattr(encoder, "family", "vit")
    return family


def trunk_of(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of an encoder's state dict that make its features: without its head, and without
    the token that stands for masked patches in training."""
    return {
        name: tensor
        for name, tensor in state.items()
        if not name.startswith("head.") and name != "mask_token"
    }
