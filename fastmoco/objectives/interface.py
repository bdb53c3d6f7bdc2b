"""What a trainer, a chunked step, a planner, telemetry and sharding know of an objective, and of its encoders.

An objective is an `nn.Module`. Whatever must be saved, averaged over ranks or undone is a parameter
or a buffer of it. Its life in a step:

    features(inputs, at)   trunks, a chunk of images at a time where the coupling allows it
    compare(features, at)  heads, gathers and loss, on the whole batch where they couple images
    (backward, clipping, the optimizer, which also moves `averages()`)
    after_step(skipped, at)   queues, centres, prototypes

Nothing is counted inside an objective: every number that changes with time is a function of `Progress`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple, Protocol, runtime_checkable

from torch import Tensor, nn


class Coupling(StrEnum):
    """Which part of a model makes the result of one image depend on the other images of a batch."""

    NONE = "none"
    """None: every image has a loss of its own, and losses of chunks add up (MAE, MaskFeat; DINO)."""
    HEADS = "heads"
    """Heads and loss: the trunk goes in chunks, heads and loss see the whole batch (MoCo v3, BYOL, SimCLR)."""
    TRUNK = "trunk"
    """The trunk itself, as with batch norms in it: the whole batch goes at once (ResNet, conv stem)."""


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a run is. Schedules are pure functions of it."""

    step: int = 0
    """Optimizer steps done before this one."""
    total_steps: int = 1
    """Steps of the whole run."""
    steps_per_epoch: int = 1
    """Steps of one pass over the training set."""

    @property
    def epoch(self) -> float:
        """Passes over the training set done before this step."""
        return self.step / self.steps_per_epoch


class Inputs(NamedTuple):
    """What the trunks read of some images. Dimension 0 of every tensor counts images."""

    views: tuple[Tensor, ...]
    """Each [b, 3, H, W]; views of one size are neighbours."""
    masks: tuple[Tensor, ...] = ()
    """For masked objectives: one [b, ...] for each view that has one."""


class Features(NamedTuple):
    """All that outlives a chunk of images. Dimension 0 of every tensor counts images."""

    online: tuple[Tensor, ...]
    """With gradient, e.g. class features [b, V, E] of V views, or tokens [b, L, E]."""
    target: tuple[Tensor, ...] = ()
    """Constants, e.g. the momentum encoder's features, or pixels."""


class Output(NamedTuple):
    """The result of a forward."""

    loss: Tensor
    """Scalar, at least float32: a mean over the local batch."""
    watch: Mapping[str, Tensor] = {}
    """What telemetry may look at, on the device and without gradient, by name: "queries" and "keys" [B, D],
    "top1" and "top5" shares, ..."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """The modules of a network by role: what sharding wraps, compilers compile, costs and telemetry name."""

    stem: Mapping[str, nn.Module] = field(default_factory=dict)
    """From pixels to tokens, by attribute name: "patch_embed"."""
    blocks: Sequence[nn.Module] = ()
    """Blocks of the trunk, first to last; equal in kind."""
    heads: Mapping[str, nn.Module] = field(default_factory=dict)
    """Projector, predictor, decoder, by dotted name in the network: "encoder.head", "predictor"."""


@runtime_checkable
class Objective(Protocol):
    """What is learned; an `nn.Module`."""

    encoder: nn.Module
    """The encoder that is evaluated and exported."""
    coupling: Coupling
    coupling_reason: str
    """Why, for the text of a refusal; empty where nothing couples images in the trunk."""

    def features(self, inputs: Inputs, at: Progress) -> Features:
        """Trunks: which encoder sees which view, under which mask."""
        ...

    def compare(self, features: Features, at: Progress, *, accuracy: bool = False) -> Output:
        """Heads, gathers and loss, on the whole batch where they couple images.

        Args:
            features: of the whole local batch (`Coupling.HEADS`), or of a chunk of it (`Coupling.NONE`).
            at: the step.
            accuracy: whether `Output.watch` gets figures that cost a pass of their own.
        """
        ...

    def averages(self) -> Mapping[nn.Parameter, Tensor]:
        """Parameter -> its exponential moving average, which the optimizer moves; empty without one."""
        ...

    def ema_momentum(self, at: Progress) -> float | None:
        """Momentum of the move that ends the step `at`: m(t + 1) for MoCo v3, m(t) for BYOL and DINO.

        None where there is no such move, as after the last step of MoCo v3.
        """
        ...

    def after_step(self, skipped: Tensor | None, at: Progress) -> None:
        """Write queues, centres and prototypes; does nothing where `skipped` (one float32 on the device) is 1."""
        ...

    def frozen(self, at: Progress) -> frozenset[str]:
        """Names of parameters without an update in this step (DINO's last layer, SwAV's prototypes)."""
        ...

    def networks(self) -> Mapping[str, nn.Module]:
        """Networks by attribute name, each a tree of its own: "encoder", "momentum_encoder", "predictor"."""
        ...

    def parts(self) -> Mapping[str, Parts]:
        """The parts of each network."""
        ...
