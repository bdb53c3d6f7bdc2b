"""What a trainer, a chunked step, a planner, telemetry and sharding know of an objective.

An objective is an `nn.Module`. Whatever must be saved, averaged over ranks or undone is a parameter
or a buffer of it. Its life in a step:

    before_step(at)            what must be so before any forward (SwAV: prototypes of unit length)
    features(inputs, at)       trunks, a chunk of images at a time where the coupling allows it
    compare(features, at)      heads, gathers and loss, on the whole batch where they couple images
    (backward)
    after_backward(at)         gradients are complete and averaged over ranks (DINO: clip tensors)
    (clipping, the optimizer, which also moves `averages()` by `ema_momentum(at)`)
    after_step(skipped, at)    queues, centres, prototypes

Nothing is counted inside an objective: every number that changes with time is a function of
`Progress`. Whether batch norms see each view alone is a property of the call: heads take [V, B, E]
for statistics per view, [V * B, E] for joint ones.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastmoco.config import ObjectiveConfig
from fastmoco.config.phases import Phase, Phases
from fastmoco.models.drop_path import PathDraws
from fastmoco.models.encoder import Coupling, Encoder, Parts
from fastmoco.models.token_drop import TokenDraws, shrunk
from fastmoco.optim.groups import WHOLE, ParameterGroup
from fastmoco_kernels import ema_update_
from fastmoco_pipelines.loading.step_parts import EMA, part

__all__ = [
    "START",
    "Coupling",
    "Encoder",
    "Features",
    "Inputs",
    "Objective",
    "Output",
    "ParameterGroup",
    "Parts",
    "Progress",
]


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a run is. Schedules are pure functions of it."""

    step: int = 0
    """Optimizer steps done before this one."""
    total_steps: int = 1
    """Steps of the whole run."""
    steps_per_epoch: int = 1
    """Steps of one pass over the training set."""
    epochs: float = 0.0
    """Passes over the training set in the whole run; `total_steps` is this, rounded to a whole
    step. 0: by `total_steps`."""

    def __post_init__(self) -> None:
        if not self.epochs:
            object.__setattr__(self, "epochs", self.total_steps / self.steps_per_epoch)

    @property
    def epoch(self) -> float:
        """Passes over the training set done before this step."""
        return self.step / self.steps_per_epoch


START = Progress()
"""Before the first step of a run of one: for a forward on its own."""


class Inputs(NamedTuple):
    """What the trunks read of some images. Dimension 0 of every tensor counts images."""

    views: tuple[Tensor, ...]
    """Each [b, 3, H, W]; views of one size are neighbours."""
    masks: tuple[Tensor, ...] = ()
    """For masked objectives: one [b, ...] for each view that has one."""
    paths: tuple[Tensor, ...] = ()
    """With stochastic depth: one [b, passes, depth, 2], the factors of the trained encoder's
    residual branches in each pass (`Objective.passes`), as a rule one for each view; see
    `paths_of`."""
    labels: Tensor | None = None
    """[b] int64, the class of each image, for objectives that learn classes (`needs_labels`)."""
    kept: tuple[Tensor, ...] = ()
    """With token dropping or masked patches: one [b, k] int64 for each pass, the numbers of the patch
    tokens that the trained encoder sees in it; see `paths_of`."""

    def paths_of(self, *passes: int) -> tuple[Tensor | None, ...]:
        """The last arguments of a trained encoder for some passes by number, as a rule those of views
        of one size, concatenated in this order: factors of residual branches [passes * b, depth, 2],
        then the tokens that stay [passes * b, k]. Empty without stochastic depth and token dropping;
        the factors are None without stochastic depth alone."""
        paths = torch.cat([self.paths[0][:, number] for number in passes]) if self.paths else None
        if self.kept:
            return paths, torch.cat([self.kept[number] for number in passes])
        return () if paths is None else (paths,)


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
    """What telemetry may look at, on the device and without gradient, by name. "queries" and "keys"
    are [V, B, D], before they are normalised: row i of the first view's queries and of the last
    view's keys are of one image. "accuracy" is [2]: shares of queries whose positive ranks first,
    and among the first five. "features" [V, B, D] are those that no loss reads, where there are no
    queries: they are logged, and not judged. "target_entropy" is the mean entropy of targets that
    are distributions. Anything else is a scalar, and is logged."""


class Objective(nn.Module, ABC):
    """What is learned: networks, which of them sees which view, and the loss.

    A subclass defines `features`, `compare` and `reference`, and overrides those defaults that are
    not its own.

    Attributes:
        encoder: the encoder that trains.
        evaluated: name of the network that is evaluated and exported, as in its config
            (`ObjectiveConfig.evaluated`), which readers of checkpoints ask.
        view_count: views that it takes; None: any number.
        least_large: views of full size that there must be, before any small ones.
        coupling: which part couples images.
        coupling_reason: why the trunk does, as a clause; empty where it does not.
        per_rank: names of buffers that differ between ranks on purpose. Others must be equal on all
            ranks.
        path_draws: makes `Inputs.paths`; None: no stochastic depth.
        passes: times that the trained encoder sees an image, each with draws of its own; None: once
            for each view.
        token_draws: makes `Inputs.kept`; None: the trained encoder sees all tokens.
        phases: parts of the run with constant shapes, by which tokens and size of the patches
            follow from the step.
        needs_labels: whether `Inputs.labels` must be given.
        exact_views: whether views stay float32 in a run in bf16, because targets are made of them
            that rounding would change.
        trunk_trains: whether the trunk of `encoder` does, else its heads alone.
        images_together: neighbouring images of a batch that must pass `features` together, because
            they are mixed there: chunks are multiples of it.
        ring: whether keys of other ranks come to the loss in blocks from the neighbour, else they
            are gathered; a trainer sets it as its plan says. None: the objective has one way.
    """

    encoder: Any
    evaluated: str = ObjectiveConfig.evaluated
    view_count: int | None = None
    least_large: int = 1
    coupling: Coupling
    coupling_reason: str = ""
    per_rank: frozenset[str] = frozenset()
    path_draws: PathDraws | None = None
    passes: int | None = None
    token_draws: TokenDraws | None = None
    phases: Phases = Phases()
    needs_labels: bool = False
    trunk_trains: bool = True
    exact_views: bool = False
    images_together: int = 1
    ring: bool | None = None

    def inputs(
        self,
        views: tuple[Tensor, ...],
        masks: tuple[Tensor, ...] = (),
        at: Progress = START,
        *,
        labels: Tensor | None = None,
    ) -> Inputs:
        """What the trunks read of the local batch in this step: the same in every call.

        In training mode with stochastic depth it has `paths`, and with token dropping `kept`, which
        `features` gives to the encoder that trains. Views are as given: `resized` makes them
        smaller where a phase has larger patches.
        """
        paths: tuple[Tensor, ...] = ()
        if self.path_draws is not None and self.training:
            passes = self.passes or len(views)
            paths = (self.path_draws(len(views[0]), passes, at.step, views[0].device),)
        return Inputs(views, masks, paths, labels, self._kept(views, at))

    def _kept(self, views: tuple[Tensor, ...], at: Progress) -> tuple[Tensor, ...]:
        """The tokens of each view that the trained encoder sees; empty where it sees all.

        By token dropping; objectives that mask patches have their own rule.
        """
        phase = self.phase(at)
        if self.token_draws is None or phase.keep == 1:
            return ()
        found = []
        for number, view in enumerate(views):
            tokens = (view.shape[-1] // (phase.patch_size or self.encoder.patch_size)) ** 2
            kept = phase.kept(tokens)
            if kept < 1:
                raise ValueError(
                    f"model.keep_tokens={phase.keep:g}: keeps none of the {tokens} patch tokens of "
                    f"a view of {view.shape[-1]} pixels; take a larger share or larger views"
                )
            draws = self.token_draws(
                len(view), number, tokens=tokens, kept=kept, step=at.step, device=view.device
            )
            found.append(draws)
        return tuple(found)

    def phase(self, at: Progress) -> Phase:
        """The phase of a step, by which all shapes follow; in evaluation that of all tokens and the
        encoder's own patches."""
        return self.phases.at(at.step, at.total_steps) if self.training else Phase()

    def lengths(self, at: Progress) -> Mapping[str, float]:
        """What a log shows of the phase of a step: the share of tokens that stay, and pixels of a
        patch; empty where the run is one phase of all tokens."""
        if self.phases.plain:
            return {}
        phase = self.phase(at)
        patch = phase.patch_size or self.encoder.patch_size
        return {"keep_tokens": phase.keep, "patch_size": float(patch)}

    def resized(self, inputs: Inputs, at: Progress) -> Inputs:
        """The same inputs with the views as the trunks of this step read them: smaller where the
        phase has larger patches, otherwise as they are."""
        patch = self.phase(at).patch_size
        if not patch:
            return inputs
        return inputs._replace(views=shrunk(inputs.views, patch, self.encoder.patch_size))

    @abstractmethod
    def features(self, inputs: Inputs, at: Progress, *, target: bool = True) -> Features:
        """Trunks: which encoder sees which view, under which mask.

        Reads nothing back from the device, draws no random numbers that a second call cannot draw
        again, and writes no buffer where the trunk couples no images: a chunk may pass twice, and a
        pass may be replayed. What it decides on the host must follow from `choices`.

        Args:
            inputs: of a batch, or of a chunk of it.
            at: the step.
            target: whether `Features.target` is wanted; the second pass of a chunk needs
                `Features.online` alone.
        """

    @abstractmethod
    def compare(self, features: Features, at: Progress, *, accuracy: bool = False) -> Output:
        """Heads, gathers and loss.

        Args:
            features: of the whole local batch (`Coupling.HEADS`), or of a chunk of it
                (`Coupling.NONE`).
            at: the step.
            accuracy: whether `Output.watch` gets figures that cost a pass of their own.
        """

    @abstractmethod
    def reference(self, inputs: Inputs, at: Progress, *, accuracy: bool = False) -> Output:
        """The same loss by plain operations, with nothing shared, saved or fused, for tests.

        Like a forward, it moves the running averages of batch norms.
        """

    def forward(
        self,
        *views: Tensor,
        masks: tuple[Tensor, ...] = (),
        labels: Tensor | None = None,
        at: Progress = START,
        accuracy: bool = False,
    ) -> Output:
        """One whole forward.

        Where there are several processes, batch norms see all of them, and what is gathered comes
        in the order of ranks: the mean of the ranks' losses is the loss of the global batch.

        Args:
            views: [B, 3, H, W] each, the same B on every rank; row i of all is of one image.
            masks: of the views that have one.
            labels: of the images, where the objective needs them.
            at: the step.
            accuracy: as for `compare`.

        Returns:
            The loss, differentiable in all trained parameters, and what telemetry looks at.
        """
        inputs = self.resized(self.inputs(views, masks, at, labels=labels), at)
        return self.compare(self.features(inputs, at), at, accuracy=accuracy)

    @property
    def evaluation_encoder(self) -> Any:
        """The encoder that measurements, exports and embeddings take by default."""
        return getattr(self, self.evaluated)

    def classifier(self) -> nn.Module | None:
        """What maps images [B, 3, H, W] to logits [B, classes], for evaluations; None where the
        objective learns no classes."""
        return None

    def networks(self) -> Mapping[str, nn.Module]:
        """Networks by attribute name ("encoder", "predictor"), each a tree of its own."""
        return dict(self.named_children())

    def parts(self) -> Mapping[str, Parts]:
        """The parts of each network; one that does not know its own is a head."""
        return {
            name: network.parts() if hasattr(network, "parts") else Parts(heads={"": network})  # type: ignore[operator]
            for name, network in self.networks().items()
        }

    def parameter_group(self, name: str, parameter: nn.Parameter) -> ParameterGroup:
        """The group of a trainable parameter, whose learning rate and weight decay may differ.

        Asked once, when the optimizer is built; every rank must give the same answer.

        Args:
            name: of the parameter, as in `named_parameters()`.
            parameter: itself, sharded already where it will be; `shape` and `ndim` are those of the
                whole tensor.
        """
        return WHOLE

    def averages(self) -> Mapping[nn.Parameter, Tensor]:
        """Parameter -> its exponential moving average, which the optimizer moves.

        Frozen parameters are among them: foreign weights may differ there, and then they are
        averaged too.
        """
        return {}

    def averaged_norms(self) -> list[tuple[nn.Module, nn.Module]]:
        """Each batch norm with running statistics, beside the same one of the network of averages.

        Found by the names of weights and averages, which differ in the name of the network alone.
        """
        names = {parameter: name for name, parameter in self.named_parameters()}
        prefixes = {
            _prefixes(names[own], names[average]): None  # in the order of the network
            for own, average in self.averages().items()
            if isinstance(average, nn.Parameter) and own in names and average in names
        }
        found: dict[nn.Module, nn.Module] = {}
        for prefix, other in prefixes:
            counterparts = dict(self.get_submodule(other).named_modules())
            for name, module in self.get_submodule(prefix).named_modules():
                counterpart = counterparts.get(name)
                statistics = (
                    getattr(module, "running_mean", None),
                    getattr(counterpart, "running_mean", None),
                )
                if counterpart is not None and all(isinstance(s, Tensor) for s in statistics):
                    found.setdefault(module, counterpart)
        return list(found.items())

    def ema_momentum(self, at: Progress) -> float | None:
        """Momentum of the move that ends the step: m(t + 1) for MoCo v3, m(t) for BYOL and DINO.

        None where there is no such move, as after the last step of MoCo v3.
        """
        return None

    @torch.no_grad()
    def update_momentum_encoder(self, ema_momentum: float | Tensor) -> None:
        """Move every average: `average <- m * average + (1 - m) * parameter`.

        For users without our optimizers, which do it in their sweep.
        Frozen parameters that equal their average, as they do unless a checkpoint says otherwise,
        stay untouched.

        Args:
            ema_momentum: m in [0, 1]; a tensor of one element is read on the device, as
                `ema_update_` does.

        Raises:
            ValueError: if m is outside [0, 1].
        """
        pairs = [
            (average, own)
            for own, average in self.averages().items()
            if own.requires_grad or not torch.equal(own, average)
        ]
        with part(EMA):
            ema_update_([average for average, _ in pairs], [own for _, own in pairs], ema_momentum)

    def schedules(self, at: Progress) -> Mapping[str, float]:
        """Numbers of this step that a log shows, by name: "ema_momentum", "teacher_temperature"."""
        return {}

    def uninformed_loss(self, batch: int) -> float | None:
        """The loss of an encoder that knows nothing of an image; None if there is no such value.

        A run whose loss stays there learns nothing.

        Args:
            batch: images of a step, over all ranks.
        """
        return None

    def view_flops(self, number: int, side: int, keep: float = 1.0) -> float:
        """FLOPs of a step for one view of one image: the forward of the encoder that trains, its
        backward, which is twice as much, and the forward of the momentum encoder, if there is one.

        A method whose encoder sees less of a view, or more than once, or that has a decoder, counts
        for itself. Heads are left out.

        Args:
            number: of the view, from 0 on.
            side: pixels per side of the view.
            keep: share of the patch tokens that token dropping leaves to the encoder.
        """
        encoder = self.encoder
        averaged = encoder.forward_flops(side) if "momentum_encoder" in self.networks() else 0.0
        return float(3 * encoder.forward_flops(side, keep) + averaged)

    def choices(self, at: Progress) -> Hashable:
        """All that `features` decides on the host in this step. May wait for the device.

        Asked before passes are captured or replayed as CUDA graphs: another answer captures again.
        """
        return None

    def before_step(self, at: Progress) -> None:
        """Called before the forward of a step, once."""

    def after_backward(self, at: Progress) -> None:
        """Called when gradients are complete and averaged, before they are judged and clipped."""

    def after_step(self, skipped: Tensor | None, at: Progress) -> None:
        """Write queues, centres and prototypes, or nothing where `skipped` is 1.

        Args:
            skipped: one float32 on the device, equal on all ranks; None: this step was not judged.
            at: the step.
        """

    def frozen(self, at: Progress) -> frozenset[str]:
        """Names of parameters without an update in this step (DINO's last layer)."""
        return frozenset()

    def trunks(self) -> dict[str, Parts]:
        """The parts of the networks that have blocks and train, by name."""
        networks = self.networks()
        return {
            name: parts
            for name, parts in self.parts().items()
            if len(parts.blocks) and any(p.requires_grad for p in networks[name].parameters())
        }

    def places(self) -> dict[str, tuple[str, ...]]:
        """Where telemetry counts each trained parameter, by the parameter's name.

        The stem has the name of its module ("patch_embed"); "first_block" is the trained block
        nearest to the input, "last_block" the last one, "heads" is all that is a head. Other
        parameters (class token, norms) have no place.
        """
        networks = self.networks()
        blocks = [
            block
            for parts in self.trunks().values()
            for block in parts.blocks
            if any(p.requires_grad for p in block.parameters())
        ]
        found: dict[nn.Parameter, tuple[str, ...]] = {}

        def add(module: nn.Module, place: str) -> None:
            for parameter in module.parameters():
                found[parameter] = (*found.get(parameter, ()), place)

        for name, parts in self.parts().items():
            if not any(p.requires_grad for p in networks[name].parameters()):
                continue
            for place, module in parts.stem.items():
                add(module, place)
            for module in parts.heads.values():
                add(module, "heads")
        if blocks:
            add(blocks[0], "first_block")
            add(blocks[-1], "last_block")
        return {
            name: found[p] for name, p in self.named_parameters() if p in found and p.requires_grad
        }


def _prefixes(name: str, other: str) -> tuple[str, str]:
    """Two names without the parts that they share at the end."""
    parts, others = name.split("."), other.split(".")
    while parts and others and parts[-1] == others[-1]:
        parts.pop()
        others.pop()
    return ".".join(parts), ".".join(others)
