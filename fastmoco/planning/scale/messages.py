"""The collectives of one training step, with their bytes: those that the code really sends.

A test counts the collectives of real steps on two ranks and compares kind, bytes and number.

With n shards of a unit of P padded elements, e bytes per gathered element and w per reduced one,
FSDP2 sends for every pass of a network through

    forward:   all-gather of P e bytes for each unit
    backward:  the same again, and one reduce-scatter of P w bytes for each unit of a trained network

and HSDP also an all-reduce of P w / n bytes of every unit between the copies. DDP all-reduces the
gradients once, in buckets. A batch norm of C channels and V separate batches sends

    forward:   all-gather of ranks * (2 V C + 1) elements
    backward:  all-reduce of 2 V C elements

Gathered keys of two views are ranks * B * 2 D elements; in a ring each of ranks - 1 exchanges sends
B * 2 D. What else the loss of a method exchanges is in `_loss`.
Bytes are those of the whole: the result of an all-gather, the input of a reduce-scatter, the tensor
of an all-reduce or a broadcast, what a rank receives of an all-to-all.

In chunks FSDP2 may prefetch a unit once more or less than is counted: one gather in a step.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from fastmoco.config import Config
from fastmoco.distributed.gradient_average import BUCKET_BYTES
from fastmoco.planning.plan import StepPlan
from fastmoco.planning.scale.layout import Layout, Network, Unit
from fastmoco_pipelines.spec import each_view

Kind = Literal["all_gather", "reduce_scatter", "all_reduce", "broadcast", "all_to_all", "send"]
Group = Literal["all", "shard", "copies"]
Phase = Literal["forward", "heads", "backward", "end"]
HEADS_BY_VIEW = ("moco_v3", "byol", "simsiam", "projector_momentum", "moby")
"""Methods whose heads take the batch statistics of each view alone."""
DDP_BUCKETS = (2**20, 25 * 2**20)
"""Bytes at which torch's DDP closes its first bucket and every further one."""


class Message(NamedTuple):
    """Equal collectives of one step."""

    part: str
    """weights, gradients, keys (all that a loss exchanges), batch norms or agreement."""
    kind: Kind
    bytes: float
    number: float
    group: Group
    """Ranks: all, those that share a copy of the state, or those with the same shard."""
    phase: Phase


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """How processes share the state and a step.

    `shards` processes share a copy: 1 under `ddp`, all of them under `fsdp`.
    """

    total: int
    shards: int = 1
    on_cpu: bool = False
    ring: bool = False
    """Whether keys come in a ring, block by block from the neighbour, instead of gathered."""

    @property
    def copies(self) -> int:
        """Copies of the state."""
        return self.total // self.shards


def step_messages(
    config: Config, layout: Layout, ranks: Ranks, plan: StepPlan, precision: str
) -> list[Message]:
    """All collectives of a step that is not logged.

    Args:
        config: of the run; its batch is that of all ranks.
        layout: of its objective.
        ranks: how it is distributed.
        plan: chunks of a rank; its images are the batch divided by the ranks.
        precision: "bf16", "fp32" or "fp64".
    """
    if ranks.total == 1:
        return []
    images = config.global_batch_size // ranks.total
    sizes = _chunk_sizes(plan, images)
    gathered = 2 if precision == "bf16" else layout.element
    found: list[Message] = []
    if ranks.shards > 1:
        for network in layout.networks:
            found += _fsdp(
                network, ranks, sizes, gathered, layout.element, separate=layout.separate
            )
    else:
        found += _ddp(layout, chunked=bool(plan.chunk))
    for network in layout.networks:
        found += _batch_norms(config, network, ranks.total, layout.element)
    found += _loss(config, layout, ranks, gathered)
    found += _agreement(layout, ranks)
    return found


def _chunk_sizes(plan: StepPlan, images: int) -> tuple[int, int]:
    """Chunks whose graphs are kept, and the others."""
    if not plan.chunk:
        return 1, 0
    kept = images if plan.lean else min(plan.kept_images, images)  # lean ones keep a graph, too
    return -(-kept // plan.chunk), -(-(images - kept) // plan.chunk)


def _fsdp(
    network: Network,
    ranks: Ranks,
    sizes: tuple[int, int],
    gathered: int,
    state: int,
    *,
    separate: bool,
) -> Iterator[Message]:
    """Gathers and reductions of one network."""
    n = ranks.shards
    reduced = max(4, state)

    def gather(unit: Unit, count: int, phase: Phase) -> Iterator[Message]:
        element = state if unit.wide else gathered
        if count:
            size = unit.elements(n) * element
            yield Message("weights", "all_gather", size, count, "shard", phase)

    def reduce(unit: Unit, count: int) -> Iterator[Message]:
        size = unit.elements(n) * reduced
        yield Message("gradients", "reduce_scatter", size, count, "shard", "backward")
        if ranks.copies > 1:
            yield Message("gradients", "all_reduce", size / n, count, "copies", "backward")

    again = sizes[1]
    chunks = sum(sizes)

    def passed(unit: Unit, backwards: int, reductions: int) -> Iterator[Message]:
        """A forward for each chunk and size of crops; of a trained network backwards, and a second
        forward for chunks without a graph."""
        yield from gather(unit, chunks * network.passes, "forward")
        if network.trained:
            yield from gather(unit, again * network.passes, "backward")
            yield from gather(unit, backwards, "backward")
            yield from reduce(unit, reductions)

    # Blocks: a backward for each chunk and size. Sums of earlier chunks are reduced in the backward
    # of the last size, and those of the last chunk in that of the first one.
    for unit in network.trunk:
        twice = chunks > 1 and network.passes > 1
        yield from passed(unit, chunks * network.passes, 2 if twice else 1)

    # Stem and rest stay gathered until a backward has passed all sizes: nothing before them waits.
    rest = (network.rest,) if network.rest else ()
    for unit in (*network.stem, *rest):
        yield from passed(unit, chunks, 1)

    # Heads: once, on the whole batch, or for each chunk where nothing couples images. After a chunk
    # that is computed again FSDP2 prefetches the head of its network once more, because its record
    # of the forwards still has it.
    times = chunks if separate else 1
    for unit in network.heads:
        yield from gather(unit, times, "heads")
        if network.trained:
            yield from gather(unit, times + (again > 0 and bool(network.trunk)), "backward")
            yield from reduce(unit, 1)


def _ddp(layout: Layout, *, chunked: bool) -> Iterator[Message]:
    """Gradients in buckets, in the order in which a backward completes them."""
    sizes = [elements * layout.element for elements in layout.trained]
    buckets = _greedy(sizes) if chunked else _closing(reversed(sizes))
    phase: Phase = "end" if chunked else "backward"
    for size in buckets:
        yield Message("gradients", "all_reduce", size, 1, "all", phase)


def _greedy(sizes: Iterable[int]) -> Iterator[int]:
    """Buckets of `GradientAverage`: as many tensors as fit."""
    held = 0
    for size in sizes:
        if held and held + size > BUCKET_BYTES:
            yield held
            held = 0
        held += size
    if held:
        yield held


def _closing(sizes: Iterable[int]) -> Iterator[int]:
    """Buckets of DDP: a bucket is closed by the tensor with which it reaches its limit."""
    limits = iter(DDP_BUCKETS)
    limit = next(limits)
    held = 0
    for size in sizes:
        held += size
        if held >= limit:
            yield held
            held, limit = 0, next(limits, limit)
    if held:
        yield held


def _batch_norms(config: Config, network: Network, ranks: int, element: int) -> Iterator[Message]:
    views = len(each_view(config.data.views))
    separate = views if _method(config) in HEADS_BY_VIEW else 1
    if config.objective.kind == "sdssl" and network.name == "predictors":
        separate *= 2  # with the gradient of the projections and without

    def norm(channels: int, batches: int, count: int, forward: Phase) -> Iterator[Message]:
        part = "batch norms"
        size = ranks * (2 * batches * channels + 1) * element
        yield Message(part, "all_gather", size, count, "all", forward)
        if network.trained:
            back = 2 * batches * channels * element
            yield Message(part, "all_reduce", back, count, "all", "backward")

    for channels in network.head_norms:
        yield from norm(channels, separate, 1, "heads")
    for channels in network.trunk_norms:
        yield from norm(channels, 1, network.passes, "forward")


def _loss(config: Config, layout: Layout, ranks: Ranks, element: int) -> Iterator[Message]:
    """What the loss and the state of an objective exchange. A CPU also compares how many rows each
    rank has."""
    objective: Any = config.objective
    images = config.global_batch_size // ranks.total
    width = config.model.projection_dim
    wide = max(4, element)  # bytes of sums, of rows of a queue and of features of a ResNet

    def counts(phase: Phase = "heads") -> Iterator[Message]:
        if ranks.on_cpu:
            yield Message("keys", "all_gather", ranks.total * 8, 1, "all", phase)

    def gather(elements: int, size: int = element, phase: Phase = "heads") -> Iterator[Message]:
        yield from counts(phase)
        yield Message("keys", "all_gather", ranks.total * elements * size, 1, "all", phase)

    # Keys of both views, or of one.
    method = _method(config)
    if hasattr(objective, "keys") and ranks.ring:
        yield from counts()
        yield Message("keys", "send", 2 * images * width * element, ranks.total - 1, "all", "heads")
    elif hasattr(objective, "keys") or method in ("moco_v3", "simclr"):
        yield from gather(2 * images * width)
    if method == "simclr" and not getattr(objective, "local_gradient", False):
        yield from gather(2 * images * 2, wide)  # sums of both views' rows
    if objective.kind == "sdssl" and method == "simclr":  # of the intermediate blocks
        yield from gather(2 * images * width)
    if objective.kind == "cmae":
        yield from gather(images * width)

    # Scores of two crops: the largest, then column sums; and how many patches all ranks mask.
    if objective.kind == "swav":
        yield Message("keys", "all_reduce", 2 * wide, 1, "all", "heads")
        size = 2 * objective.prototypes * wide
        yield Message("keys", "all_reduce", size, objective.sinkhorn_iterations, "all", "heads")
    if objective.kind == "maskfeat":
        yield Message("keys", "all_reduce", 8, 1, "all", "forward")

    # Images in another order, their features back, and running averages of rank 0.
    if layout.per_rank:
        pixels = 3 * config.data.view2.size**2
        yield Message(
            "batch norms", "broadcast", layout.per_rank * layout.element, 1, "all", "forward"
        )
        for size in (pixels * element, layout.width * wide):
            yield Message("keys", "all_to_all", images * size, 1, "all", "forward")

    # At the end of a step: rows of a queue (of SwAV from `queue_start_epoch` on), and sums of outputs,
    # of which centres are made.
    queues = {"moco": 1, "moby": 2, "macrl": 1, "swav": 2 if getattr(objective, "queue", 0) else 0}
    if count := queues.get(objective.kind, 0):
        yield from gather(count * images * width, wide, "end")
    if objective.kind in ("dino", "esvit"):
        centres = 2 if getattr(objective, "region", False) else 1
        yield Message("keys", "all_reduce", objective.prototypes * wide, centres, "all", "end")


def _method(config: Config) -> str:
    """The kind of the objective, or of that which it extends."""
    objective: Any = config.objective
    return str(objective.on) if objective.kind == "sdssl" else objective.kind


def _agreement(layout: Layout, ranks: Ranks) -> Iterator[Message]:
    """Norms of sharded gradients, and the flag of a step that all ranks skip."""
    if ranks.shards > 1:
        norms = 8 * len(layout.trained)
        yield Message("agreement", "all_reduce", norms, 1, "shard", "end")
    yield Message("agreement", "all_reduce", 4, 1, "all", "end")
