"""What an objective, a planner, sharding and telemetry know of an encoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal, Protocol

from torch import Tensor, nn


class Coupling(StrEnum):
    """Which part of a model makes the result of one image depend on the other images of a batch."""

    NONE = "none"
    """None: every image has a loss of its own, and losses of chunks add up (MAE, DINO)."""
    HEADS = "heads"
    """Heads and loss: the trunk goes in chunks, heads and loss see the whole batch (MoCo v3)."""
    TRUNK = "trunk"
    """The trunk itself, by batch norms in it: the whole batch goes at once (ResNet, conv stem)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """The modules of a network by role, for sharding, compilers, costs and telemetry."""

    stem: Mapping[str, nn.Module] = field(default_factory=dict)
    """From pixels to tokens, by name in the network: "patch_embed"."""
    blocks: nn.ModuleList = field(default_factory=nn.ModuleList)
    """Blocks of the trunk, first to last, equal in kind: the network's own list, which a
    measurement may shorten for a time."""
    heads: Mapping[str, nn.Module] = field(default_factory=dict)
    """Projector, predictor, decoder, by name in the network; "" is the network itself."""
    methods: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Methods other than `forward` through which a module is called, by the module's name in the
    network; "" is the network. The first of the network's own is the one that takes tokens through
    all blocks."""


class Encoder(Protocol):
    """From images to features; an `nn.Module`."""

    embed_dim: int
    """Width of the feature."""
    tokens: int
    """Tokens of one view in a block, the class token among them."""
    coupling: Coupling
    """`TRUNK` or `NONE`."""
    coupling_reason: str
    """Why, as a clause, for the text of a refusal; empty for `NONE`."""
    head: nn.Module
    """Where an objective attaches its projector; the encoder does not apply it."""

    def __call__(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] images -> [B, E] features, without the head."""
        ...

    def stem_tensors(self) -> list[Tensor]:
        """All that turns pixels into tokens: two encoders whose stems are frozen and equal may
        share their tokens."""
        ...

    def patch_tokens(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] images -> [B, L, E] tokens."""
        ...

    def encode(self, patch_tokens: Tensor) -> Tensor:
        """[B, L, E] tokens -> [B, E] features."""
        ...

    def encode_plain(self, patch_tokens: Tensor) -> Tensor:
        """The same without any saving: the reference."""
        ...

    def recompute(self, what: Literal["none", "selective", "full"]) -> None:
        """Choose what the backward computes again instead of keeping it."""
        ...

    def parts(self) -> Parts:
        """Its modules by role."""
        ...

    def most_numbers(self) -> int:
        """An upper bound of the numbers that training keeps of one view: at least twice them."""
        ...
