"""How a step fits into memory: the chunk, the kept graphs, the costs, and the limit of each
setting. Pure arithmetic.

G, T, F, H are the measured bytes of `StepCosts` (graph, training, forward, heads). With B images in
this process, chunks of c images, and kept graphs of k images, a step needs, besides the state:

    whole:    B (views + features) + max(G(B) + max(F(B), H(B)), T(B))
    chunked:  B (views + features) + max(G(k) + F(c), G(k) + H(B), G(k) + T(c) - G(c), T(c))
    separate: B views + c features + max(G(c) + max(F(c), H(c)), T(c)), if nothing couples images

A chunked step computes the query forward of the other B - k images twice. If blocks can keep only
the residual stream (L, "lean"), the other images may keep that instead, and compute less than a
forward twice:

    lean:     B (views + features) + G(k) + L(B-k) + max(F(c), H(B), T(c) - G(c), T_L(c) - L(c))

Under FSDP2 a process also holds tensors that are temporarily unsharded: the current unit and its
gradient or the gradient's sum over ranks, the prefetched next block, and the sum of the previous
block's gradients; with chunks also the gradients of the trunk.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal

from fastmoco.planning.costs import Line, StepCosts
from fastmoco.planning.keys import gib, other_keys_bytes
from fastmoco_pipelines.text import counted

HEADROOM = 0.9
"""Share of the free memory that a plan uses; allocators round up, and libraries need workspaces."""
BUSY_ROWS = 2**15
"""Number of token rows in a chunk that keeps a large device busy."""
PARTS = 4
"""Parts of a chunk whose graphs can be kept separately: the graph of a whole chunk takes gigabytes,
which would otherwise be unused. Each size of a chunk is compiled separately."""
OPTIMIZER_COPIES = {"adamw": 2, "lamb": 2, "lars": 1, "sgd": 1, "larc": 1}
"""Elements that an optimizer keeps per trainable parameter."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StateBytes:
    """The bytes that one process holds between steps."""

    parameters: float
    gradients: float
    optimizer: float
    in_flight: float = 0.0
    """Tensors that are temporarily whole if the rest is sharded."""

    @property
    def total(self) -> float:
        """The sum of all parts."""
        return self.parameters + self.gradients + self.optimizer + self.in_flight


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """How one process passes its part of a batch through the encoder."""

    chunk: int
    """Images per pass through the trunk; 0: all of them, without a second forward."""
    kept: int
    """Whole chunks whose graphs are kept."""
    chunks: int
    """Chunks per step; 1 if all images pass together."""
    overhead: float
    """FLOPs of everything that chunks and checkpointing compute twice, relative to a step that
    computes nothing twice."""
    peak_bytes: float
    """Bytes of the step besides the state; 0 if they were not counted."""
    reason: str
    """The reason, as a clause."""
    kept_images: int = 0
    """Images whose graphs are kept: those of the kept chunks, and of one more part of a chunk."""
    lean: bool = False
    """Whether the other images keep the residual stream of their blocks instead of nothing."""
    fits: bool = True
    """Whether the step fits into the memory that the plan was made for."""
    activation_budget: float = 1.0
    """Of compiled blocks; see `fastmoco.models.compiled`."""
    keys: Literal["", "gathered", "ring"] = ""
    """How the keys of other processes come to the loss; empty where there are none."""
    keys_reason: str = ""
    """The reason, as a clause."""

    def __str__(self) -> str:
        keys = f"; keys {'in a ring' if self.keys == 'ring' else 'gathered'} ({self.keys_reason})"
        return self._chunks() + (keys if self.keys else "")

    def _chunks(self) -> str:
        within = (
            f", activations within {self.activation_budget:g} of the compiler's"
            if self.activation_budget < 1
            else ""
        )
        if not self.chunk:
            return f"whole batch at once{within} ({self.reason})"
        others = ", the others the residual stream" if self.lean else ""
        kept = (
            counted(self.kept_images, "image")
            + f" keep their graphs{others}, {self.overhead:+.1%} FLOPs"
        )
        return (
            f"{counted(self.chunks, 'chunk')} of {counted(self.chunk, 'image')}, {kept}{within} "
            f"({self.reason})"
        )

    def to_json(self) -> dict[str, int | float | str]:
        """As a dictionary."""
        return asdict(self)


def state_bytes(costs: StepCosts, optimizer: str, element: int, *, shards: int = 1) -> StateBytes:
    """The bytes of parameters, gradients and optimizer state in one process.

    Args:
        costs: of the model.
        optimizer: as `optim.name`.
        element: bytes per element: 4, or 8 in fp64.
        shards: processes that share one copy; 1: every process has its own.
    """
    units = costs.units
    whole = units.frozen if shards > 1 else 0
    wide = max(4, units.bytes)  # sums over ranks are at least float32
    in_flight = units.largest * (units.bytes + wide) + units.block * (units.bytes + wide)
    return StateBytes(
        parameters=((costs.parameters - whole) / shards + whole) * element,
        gradients=costs.trainable * element / shards,
        optimizer=costs.trainable * element * OPTIMIZER_COPIES[optimizer] / shards,
        in_flight=in_flight if shards > 1 else 0.0,
    )


def sharded(costs: StepCosts, element: int) -> StepCosts:
    """The costs of a step with sharded state.

    Weights are gathered in their compute dtype and kept while their unit runs, so autocast makes no
    copies.

    Args:
        costs: of a step with unsharded state.
        element: bytes per element of the state.
    """
    units = costs.units
    copies = units.bytes if units.bytes < element else 0

    def without(line: Line, parameters: int) -> Line:
        return Line(line.per_image, max(0.0, line.fixed - copies * parameters))

    return replace(
        costs,
        graph=without(costs.graph, units.trunk),
        train=without(costs.train, units.trunk),
        forward=without(costs.forward, units.trunk),
        heads=without(costs.heads, units.heads),
        piled_bytes=float(
            (units.trunk + (units.heads if costs.separate else 0)) * max(4, units.bytes)
        ),
    )


def whole_bytes(costs: StepCosts, images: int, world_size: int = 1) -> float:
    """Bytes of a step that takes all its images at once, besides the state."""
    heads = _heads(costs, images, world_size)
    besides = max(costs.forward.at(images), heads) if costs.averaged else heads
    return _resident(costs, images) + max(costs.graph.at(images) + besides, costs.train.at(images))


def chunked_bytes(
    costs: StepCosts, images: int, chunk: int, kept_images: int = 0, world_size: int = 1
) -> float:
    """Bytes of a step in chunks that keeps the graphs of some images, besides the state."""
    chunk = min(chunk, images)
    if costs.separate:  # each chunk is a whole step; only the views of the batch stay
        return (
            costs.piled_bytes
            + (images - chunk) * costs.view_bytes
            + whole_bytes(costs, chunk, world_size)
        )
    graphs = _graphs(costs, kept_images, chunk)
    backward = costs.train.at(chunk)
    return (
        costs.piled_bytes
        + _resident(costs, images)
        + max(
            graphs + costs.forward.at(chunk),
            graphs + _heads(costs, images, world_size),
            graphs + backward - costs.graph.at(chunk),
            backward,
        )
    )


def lean_bytes(
    costs: StepCosts, images: int, chunk: int, kept_images: int = 0, world_size: int = 1
) -> float:
    """Bytes of a step in chunks whose other images keep the residual stream, besides the state.

    Infinite if blocks cannot keep only the residual stream.
    """
    if costs.lean is None or costs.lean_train is None:
        return float("inf")
    chunk, others = min(chunk, images), images - kept_images
    graphs = _graphs(costs, kept_images, chunk) + (costs.lean.at(others) if others else 0.0)
    passing = max(
        costs.forward.at(chunk),
        _heads(costs, images, world_size),
        costs.train.at(chunk) - costs.graph.at(chunk),
        costs.lean_train.at(chunk) - costs.lean.at(chunk),
    )
    return costs.piled_bytes + _resident(costs, images) + graphs + passing


def parts_of(
    costs: StepCosts, plan: StepPlan, images: int, world_size: int = 1
) -> dict[str, float]:
    """Parts of the peak of a plan, in bytes: views, features, kept graphs, and temporary memory."""
    held = {"views": images * costs.view_bytes, "features": images * costs.feature_bytes}
    kept = _graphs(costs, plan.kept_images, plan.chunk or images)
    if plan.lean and costs.lean is not None:
        kept += costs.lean.at(images - plan.kept_images)
    peak = plan.peak_bytes or whole_bytes(costs, images, world_size)
    return held | {
        "kept activations": kept,
        "temporary": max(0.0, peak - sum(held.values()) - kept),
    }


def plan_step(
    costs: StepCosts,
    *,
    images: int,
    budget: float,
    tokens: int,
    chunk: Literal["auto", "none"] | int = "auto",
    kept: Literal["auto"] | int = "auto",
    world_size: int = 1,
) -> StepPlan:
    """Choose how a process passes its images through the encoder.

    Args:
        costs: of the model and its checkpointing.
        images: of this process.
        budget: bytes for a step, besides the state.
        tokens: half of the token rows of an image (`tokens_of_views`).
        chunk: as `BatchConfig.chunk`.
        kept: as `BatchConfig.kept`.
        world_size: processes whose keys are compared.
    """
    whole = whole_bytes(costs, images, world_size)
    free = f"{gib(budget)} free"
    if (
        chunk == "none"
        or (chunk == "auto" and (whole <= budget or costs.coupling_reason))
        or chunk == images
    ):
        reason = "requested" if chunk != "auto" else f"about {gib(whole)} of {free}"
        if chunk == "auto" and whole > budget:
            reason += f", too much; chunks would help, but {costs.coupling_reason}"
        again = costs.recompute_flops / costs.step_flops
        at_once = StepPlan(
            chunk=0, kept=0, chunks=1, overhead=again, peak_bytes=whole, reason=reason
        )
        return replace(at_once, kept_images=images, fits=whole <= budget)

    # In chunks: the other images keep nothing, or the residual stream.
    size = min(
        images,
        _largest_that_fits(costs, images, budget, tokens, world_size)
        if chunk == "auto"
        else int(chunk),
    )
    plans = [_in_chunks(costs, images, budget, size, kept, world_size, lean=False, whole=whole)]
    if costs.lean is not None and kept == "auto" and not costs.separate:
        plans.append(
            _in_chunks(costs, images, budget, size, kept, world_size, lean=True, whole=whole)
        )
    return best_plan(plans)


def _in_chunks(
    costs: StepCosts,
    images: int,
    budget: float,
    size: int,
    kept: Literal["auto"] | int,
    world_size: int,
    *,
    lean: bool,
    whole: float,
) -> StepPlan:
    """The plan with chunks of a given size that keeps as much as fits."""
    needs = lean_bytes if lean else chunked_bytes
    grain = max(1, size // PARTS)
    if costs.separate:
        # Each graph is kept until its own backward, and none is computed twice.
        kept_images = images
    elif kept == "auto":
        parts = -(-images // grain)
        while parts and needs(costs, images, size, min(images, parts * grain), world_size) > budget:
            parts -= 1
        kept_images = min(images, parts * grain)
    else:
        kept_images = min(images, int(kept) * size)

    peak = needs(costs, images, size, kept_images, world_size)
    short = "" if peak <= budget else ", which may not be enough"
    twice = costs.lean_flops if lean else costs.query_flops
    return StepPlan(
        chunk=size,
        kept=-(-kept_images // size) if kept_images == images else kept_images // size,
        chunks=-(-kept_images // size) + -(-(images - kept_images) // size),
        kept_images=kept_images,
        lean=lean,
        overhead=((1 - kept_images / images) * twice + costs.recompute_flops) / costs.step_flops,
        peak_bytes=peak,
        fits=peak <= budget,
        reason=f"about {gib(peak)} of {gib(budget)} free{short}; "
        f"all at once would take {gib(whole)}",
    )


def best_plan(plans: Iterable[StepPlan]) -> StepPlan:
    """The first plan that fits and computes nothing twice, else the one that computes least.

    Args:
        plans: at least one; each keeps less than the one before. Taken one by one, as far as
            needed.
    """
    seen: list[StepPlan] = []
    for plan in plans:
        seen.append(plan)
        if plan.fits and plan.overhead == 0:
            break
    # Of equal plans the first, whose blocks recompute least.
    return min(seen, key=lambda plan: (not plan.fits, plan.overhead))


def largest_batch(costs: StepCosts, budget: float, *, chunk: int = 0, world_size: int = 1) -> int:
    """Largest number of images per process with which a setting fits; 0 if it never fits.

    Args:
        costs: of the setting.
        budget: bytes for a step, besides the state.
        chunk: 0: all images at once; else images per chunk, with no graph kept.
        world_size: processes, each with that number of images.
    """

    def fits(images: int) -> bool:
        if chunk:
            return chunked_bytes(costs, images, chunk, 0, world_size) <= budget
        return whole_bytes(costs, images, world_size) <= budget

    if not fits(1):
        return 0

    # Double until the setting no longer fits, then bisect.
    low = 1
    while fits(2 * low) and low < 2**40:
        low *= 2
    high = 2 * low
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def tokens_of_views(sides: Sequence[int], patch_size: int) -> int:
    """Half of the token rows of all views of an image: the tokens of a view where there are two of
    one size. A single view counts like two.

    Args:
        sides: pixels of each view in each direction.
        patch_size: pixels of a patch in each direction.
    """
    tokens = [(side // patch_size) ** 2 + 1 for side in sides]
    return max(*tokens, -(-sum(tokens) // 2)) if len(tokens) > 1 else tokens[0]


def busy_chunk(tokens: int) -> int:
    """Images whose views have `BUSY_ROWS` token rows, as a power of two; `tokens` as
    `tokens_of_views`."""
    chunk = 1
    while 2 * chunk * tokens < BUSY_ROWS:
        chunk *= 2
    return chunk


def _largest_that_fits(
    costs: StepCosts, images: int, budget: float, tokens: int, world_size: int
) -> int:
    """Halve the chunk until it fits.

    Powers of two, because the free memory differs between runs and the chunk should not.
    """
    chunk = busy_chunk(tokens)
    while chunk > 1 and (
        chunk >= images or chunked_bytes(costs, images, chunk, 0, world_size) > budget
    ):
        chunk //= 2
    return chunk


def _graphs(costs: StepCosts, kept_images: int, chunk: int) -> float:
    """The bytes that the graphs of some images keep, in chunks."""
    if not kept_images:
        return 0.0
    again = -(-kept_images // chunk) - 1 if costs.apart else 0
    return costs.graph.at(kept_images) + again * costs.graph.fixed


def _resident(costs: StepCosts, images: int) -> float:
    return images * (costs.view_bytes + costs.feature_bytes)


def _heads(costs: StepCosts, images: int, world_size: int) -> float:
    """Heads and loss, with the keys of the other ranks, gathered or in a ring."""
    keys = other_keys_bytes(costs.key_bytes, images, world_size, costs.ring_above)
    return costs.heads.at(images) + keys
