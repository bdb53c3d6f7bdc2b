"""Seconds of one step: compute, messages, what overlaps, and what runs beside it.

Compute of a rank with B images, f FLOPs and a kept bytes of activations per image, P trained
parameters on s shards, and a share x computed twice:

    images   B (1 + x) (f / rate + a / activation rate)
    state    P / s * seconds per parameter
    launches the step takes at least this long, whatever its size
    step     slowdown * (fixed + max(images + state, launches)) + messages that are not hidden

FSDP2 gathers the weights of the next unit while the current one computes, and reduces gradients
during the backward, so of a phase with compute c and messages m

    max(0, m - c) + the first gather of the forward, or the last reduction of the backward

is not hidden. DDP hides buckets in the backward, but for its last one; in chunks it averages after
the last backward, where nothing hides them. Messages of batch norms, keys and agreement wait for
their result and hide nothing. If ranks share the cores with their communication (`overlaps` False:
gloo on a CPU), no message is hidden. `slowdown` is the time of compute while all ranks compute,
relative to one alone: at least ranks / cores.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from fastmoco.planning.chips import Chip
from fastmoco.planning.scale.messages import Message, Phase, Ranks
from fastmoco.planning.scale.network import Network

REACHED = 0.8
"""Speed of a real step relative to the bound that `benchmarks.roofline` counts, which expects 0.75
to 0.85."""
TOUCHES = 5.65
"""Bytes that all but products and attention move in a step, relative to the kept activations:
5.6, 5.6 and 5.8 for ViT-S, B and L, counted by `benchmarks.roofline`."""
ATTENTION_SHARE = 0.35
"""Rate of attention relative to products, as there."""
SWEEP_BYTES = 40
"""Bytes per trained parameter that the update of weights and averages moves."""
LAUNCH_S = 5e-6
"""Seconds in which a host launches one kernel."""


class Work(NamedTuple):
    """What one rank computes in a step."""

    images: int
    flops: float
    """Per image, everything once."""
    activation_bytes: float
    """Kept per image if nothing is computed twice."""
    again: float
    """Share of the FLOPs that is computed twice."""
    forward_share: float
    """Of the FLOPs, in the forwards of the trunks."""
    parameters: float
    """Trained ones that this rank updates."""
    launches: int = 0
    """Kernels; 0: not counted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Rates of compute of one rank."""

    s_per_flop: float
    s_per_activation_byte: float
    s_per_parameter: float
    fixed_s: float = 0.0
    launch_s: float = 0.0
    slowdown: float = 1.0
    overlaps: bool = True

    def compute_s(self, work: Work) -> float:
        """Seconds of the compute of a step."""
        image = work.flops * self.s_per_flop + work.activation_bytes * self.s_per_activation_byte
        seconds = work.images * (1 + work.again) * image + work.parameters * self.s_per_parameter
        return self.slowdown * (self.fixed_s + max(seconds, work.launches * self.launch_s))


def gpu(chip: Chip, attention: float) -> Machine:
    """A GPU, whose rates are those of its table times `REACHED`: a model, not measured.

    Args:
        chip: of the table.
        attention: share of attention in the FLOPs.
    """
    products = 1 - attention + attention / ATTENTION_SHARE
    return Machine(
        s_per_flop=products / (chip.step_flops_per_s * REACHED),
        s_per_activation_byte=TOUCHES / (chip.step_bytes_per_s * REACHED),
        s_per_parameter=SWEEP_BYTES / (chip.step_bytes_per_s * REACHED),
        launch_s=LAUNCH_S,
    )


class Part(NamedTuple):
    """One part of a step."""

    seconds: float
    """Of its messages or of its compute."""
    exposed_s: float
    """Not hidden: what it adds to the step."""
    bytes: float = 0.0
    """Of the whole, summed over messages."""
    messages: float = 0.0
    """Messages."""


class StepTime(NamedTuple):
    """The time of one step."""

    parts: dict[str, Part]

    @property
    def seconds(self) -> float:
        """Of the step."""
        return sum(part.exposed_s for part in self.parts.values())

    @property
    def communication_share(self) -> float:
        """Share of the step that waits for messages."""
        return 1 - self.parts["compute"].exposed_s / self.seconds


def step_time(
    work: Work, machine: Machine, messages: Sequence[Message], network: Network, ranks: Ranks
) -> StepTime:
    """The time of a step from its work and its messages."""
    compute = machine.compute_s(work)
    took = [network.seconds(message, ranks) for message in messages]

    def total(
        part: str, phases: Iterable[Phase] = ("forward", "heads", "backward", "end")
    ) -> float:
        return sum(
            message.number * one
            for message, one in zip(messages, took, strict=True)
            if message.part == part and message.phase in phases
        )

    def largest(part: str, phase: Phase) -> float:
        return max(
            (
                one
                for message, one in zip(messages, took, strict=True)
                if message.part == part and message.phase == phase
            ),
            default=0.0,
        )

    exposed = {part: total(part) for part in ("weights", "gradients", *BLOCKING)}
    if machine.overlaps:
        forward = work.forward_share * compute
        gathers = total("weights", ("forward",))
        ahead = max(0.0, gathers - forward) + largest("weights", "forward")
        ahead += total("weights", ("heads",))

        # In the backward gathers and reductions share the network.
        back = {part: total(part, ("backward",)) for part in ("weights", "gradients")}
        left = max(0.0, sum(back.values()) - (compute - forward))
        of_gathers = back["weights"] / (sum(back.values()) or 1.0)
        exposed["weights"] = min(exposed["weights"], ahead + left * of_gathers)
        exposed["gradients"] = min(
            back["gradients"],
            max(left * (1 - of_gathers), largest("gradients", "backward")),
        ) + total("gradients", ("end",))

    parts = {"compute": Part(compute, compute)}
    for part, alone in exposed.items():
        own = [message for message in messages if message.part == part]
        parts[part] = Part(
            seconds=total(part),
            exposed_s=alone,
            bytes=sum(message.bytes * message.number for message in own),
            messages=sum(message.number for message in own),
        )
    return StepTime(parts)


BLOCKING = ("batch norms", "keys", "agreement")
"""Parts whose messages the step waits for."""
