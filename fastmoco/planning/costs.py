"""Count the bytes and FLOPs of a training step on tensors without memory: without GPU or data, in
seconds.

Nothing here is a formula of the model. The parts of a step run on fake tensors, which have shapes
and storages but no values. A dispatch mode adds up the live storages, and torch's own counter the
FLOPs. Two batch sizes separate the bytes per image from those that do not grow with the batch.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastmoco.config import Config
from fastmoco.config.phases import Phase
from fastmoco.models.blocks import Attention, Recompute
from fastmoco.models.compiled import traced_blocks
from fastmoco.objectives.build import build_model
from fastmoco.objectives.interface import Coupling, Features, Inputs, Objective, Progress
from fastmoco.objectives.prepare import PrepareViews, view_preparation
from fastmoco.planning.live_bytes import LiveBytes
from fastmoco_kernels.info_nce import cost as loss_cost
from fastmoco_pipelines.loading.step_parts import (
    BACKWARD,
    QUERY_FORWARD,
    Collector,
    collecting,
    part,
)
from fastmoco_pipelines.spec import each_view

SIZES = (4096, 8192)
"""Batch sizes that are measured, large enough that activations, not weights, determine the peak."""
MANY_STEPS = 10**9
"""Steps of a run in which each phase has some."""
_FLOPS: dict[Hashable, Figures] = {}
"""Those of the last config and phase with everything kept, for `measure_costs`."""
_BYTES: dict[Hashable, Figures] = {}
"""Those of the last config and phase that do not depend on what is kept, for `measure_costs`."""
DEPTHS = (3, 4)
"""Numbers of blocks that are measured if there are more: the first, which has no branch yet, one or
two more, and the last."""


def _attention_flops(q: torch.Size, k: torch.Size, v: torch.Size, *_: Any, **__: Any) -> int:
    from torch.utils.flop_counter import sdpa_flop_count

    return int(sdpa_flop_count(q, k, v))  # type: ignore[no-untyped-call]


def _attention_backward_flops(
    grad: torch.Size, q: torch.Size, k: torch.Size, v: torch.Size, *_: Any, **__: Any
) -> int:
    from torch.utils.flop_counter import sdpa_backward_flop_count

    return int(sdpa_backward_flop_count(grad, q, k, v))  # type: ignore[no-untyped-call]


def _convolution_backward_flops(
    grad: torch.Size, _: torch.Size, weight: torch.Size, *rest: Any, **__: Any
) -> int:
    transposed, wanted = rest[4], rest[7][:2]
    if transposed:
        raise NotImplementedError("no encoder has a transposed convolution")
    return 2 * grad.numel() * math.prod(weight[1:]) * int(sum(wanted))


def _rows_flops(rows: torch.Size, weight: torch.Size, *rest: Any, **__: Any) -> int:
    wanted = sum(rest[4:6])  # gradients of rows and weight
    return 2 * rows.numel() * weight[0] * (1 + int(wanted))


def _pairs_flops(
    rows: torch.Size,
    weight: torch.Size,
    targets: torch.Size,
    _: torch.Size,
    pairs: torch.Size,
    *rest: Any,
    **__: Any,
) -> int:
    of_rows, of_weight = map(int, rest[3:5])
    outputs, width = weight
    scores = rows.numel() * (1 + of_rows + of_weight) + targets.numel()
    means = targets[:2].numel() * width * (1 + of_weight)
    return 2 * ((scores + means) * outputs + pairs.numel() * width * (1 + of_rows))


OWN_FLOPS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
    torch.ops.aten.convolution_backward: _convolution_backward_flops,
    torch.ops.fastmoco.soft_cross_entropy_rows: _rows_flops,
    torch.ops.fastmoco.soft_cross_entropy_pairs: _pairs_flops,
}
"""What torch's counter lacks: attention on a CPU, which has the products of the one on a GPU, and
losses that multiply. And what it counts wrong: the gradient of a grouped convolution's weight, as if
it had no groups."""


class Line(NamedTuple):
    """Bytes of a batch of images: `fixed + images * per_image`."""

    per_image: float
    fixed: float

    def at(self, images: int) -> float:
        """Bytes for a number of images."""
        return self.fixed + images * self.per_image

    def or_more(self, other: Line) -> Line:
        """At least as many bytes as either for every number of images."""
        return Line(max(self.per_image, other.per_image), max(self.fixed, other.fixed))


class Units(NamedTuple):
    """Parameters of FSDP2's units: a block, the largest unit, an encoder without head, both heads.

    `frozen` parameters are in no unit. `bytes`: per element that is exchanged between ranks.
    """

    block: int
    largest: int
    trunk: int
    heads: int
    frozen: int
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCosts:
    """The costs of one step.

    An image means all its views. Bytes are per process; FLOPs count a multiply-add as two.
    """

    trainable: int
    """Parameters with gradients and optimizer state."""
    parameters: int
    """All parameters, including averages."""
    coupling_reason: str
    """Why the trunk cannot run in chunks; empty if it can."""
    view_bytes: float
    """All views of an image."""
    feature_bytes: float
    """What a chunk keeps per image: the features of all encoders, copied once, and a gradient of
    the online ones."""
    key_bytes: float
    """Keys of one image of another rank: both views, as received and as normalised."""
    graph: Line
    """Kept between forward and backward of the query trunk."""
    train: Line
    """Peak of a forward and backward of the query trunk, including `graph`."""
    forward: Line
    """Peak of both trunks without gradient."""
    heads: Line
    """Peak of heads and loss, forward and backward."""
    query_flops: float
    """Forward of the query trunk, per image; without the patch projection if it is shared."""
    recompute_flops: float
    """What activation checkpointing computes twice, per image."""
    step_flops: float
    """The whole step with everything computed once, per image."""
    units: Units
    lean: Line | None = None
    """`graph` of images whose fused blocks keep only the residual stream; None if blocks cannot."""
    lean_train: Line | None = None
    """`train` of such images."""
    lean_flops: float = 0.0
    """What is computed twice for such images, per image."""
    apart: bool = False
    """Whether every kept chunk has its own fixed part of `graph`: compiled blocks copy the weights
    for each chunk, autocast copies them once per step."""
    piled_bytes: float = 0.0
    """Gradients that a step in chunks holds unsharded until its end, besides the state."""
    averaged: bool = True
    """Whether the images also pass an encoder without gradient, the momentum encoder."""
    separate: bool = False
    """Whether nothing couples images: heads and loss run in chunks too, and nothing is computed
    twice (`Coupling.NONE`)."""
    ring_above: float = math.inf
    """Bytes of gathered keys above which the keys come in a ring (`fastmoco.planning.keys`)."""


def measure_costs(
    config: Config,
    precision: str,
    *,
    attention: str = "sdpa",
    recompute: Recompute | None = None,
    compiled: bool = False,
    budget: float = 1.0,
    levels: bool = False,
    phase: Phase | None = None,
) -> StepCosts:
    """Count what a step of a config costs. Where the run has phases of tokens and patches: what is
    enough in each of them.

    Args:
        config: its model, heads and views are used.
        precision: "bf16", "fp32" or "fp64".
        attention: the attention backend; a kernel other than torch's counts like `sdpa`, which
            keeps the same.
        recompute: used instead of `model.checkpointing`.
        compiled: whether blocks go through torch.compile, which then chooses what they keep.
        budget: see `compile_blocks`.
        levels: whether views come as uint8 and are normalised one chunk at a time.
        phase: one of the run's phases, which alone is counted.
    """
    if phase is None:
        largest = config.model.phases.largest(config.model.patch_size)
        return most_of(
            measure_costs(
                config,
                precision,
                attention=attention,
                recompute=recompute,
                compiled=compiled,
                budget=budget,
                levels=levels,
                phase=one,
            )
            for one in largest
        )
    recompute = recompute or config.model.checkpointing
    dtype = torch.float64 if precision == "fp64" else torch.float32
    with FakeTensorMode(), _default_dtype(dtype):
        pieces = _pieces(config, precision, attention, phase, levels=levels)
        objective = pieces.objective
        own = list(objective.parameters())
        features = pieces.features(images=1)
        # Whatever is kept, a plan asks for the same products once more, and for the same bytes of
        # `forward` and `heads`.
        key: tuple[Hashable, ...] = (config, precision, attention, levels, phase, DEPTHS)
        if key not in _FLOPS:
            _FLOPS.clear()
            _FLOPS[key] = pieces.on_all_blocks("none", pieces.flops_of_an_image)
        flops = _FLOPS[key]
        # The compiler also does the checkpointing inside compiled blocks, but keeps what was
        # requested.
        pieces.traced = compiled and recompute == "none"
        pieces.recompute(recompute)  # only blocks that keep everything are traced
        with traced_blocks(objective, budget=budget) if pieces.traced else nullcontext():
            sizes = pieces.on_all_blocks(recompute, pieces.bytes_to_train)
            key = (*key, pieces.traced)
            if key not in _BYTES:
                _BYTES.clear()
                _BYTES[key] = pieces.on_all_blocks(recompute, pieces.bytes_of_the_rest)
            sizes |= _BYTES[key]
            once = recompute == "none" and not compiled
            again = flops if once else pieces.on_all_blocks(recompute, pieces.flops_to_train)

        # Images whose fused blocks keep only the residual stream.
        lean = None
        twice = flops
        if config.model.blocks == "fused" and recompute == "none":
            lean = pieces.on_all_blocks("full", pieces.bytes_to_train)
            twice = pieces.on_all_blocks("full", pieces.flops_to_train)

    element = own[0].element_size()
    return StepCosts(
        trainable=sum(p.numel() for p in own if p.requires_grad),
        parameters=sum(p.numel() for p in own),
        coupling_reason=objective.coupling_reason,
        averaged=bool(objective.averages() and features.target),
        separate=objective.coupling is Coupling.NONE,
        view_bytes=sum(3 * side**2 for side in pieces.sides) * (1 if levels else element),
        feature_bytes=sum(3 * rows.nbytes for rows in features.online)
        + sum(2 * rows.nbytes for rows in features.target),
        key_bytes=key_bytes(config, element),
        graph=Line(*sizes["graph"]),
        train=Line(*sizes["train"]),
        forward=Line(*sizes["forward"]),
        heads=Line(*sizes["heads"]),
        query_flops=flops["query"][0],
        recompute_flops=again["train"][0] - flops["train"][0],
        step_flops=flops["train"][0] + flops["forward"][0] - flops["query"][0] + flops["heads"][0],
        units=_units(objective, 2 if precision == "bf16" else element),
        apart=compiled and recompute == "none",
        lean=Line(*lean["graph"]) if lean else None,
        lean_train=Line(*lean["train"]) if lean else None,
        lean_flops=twice["train"][0] - flops["train"][0],
    )


def most_of(found: Iterable[StepCosts]) -> StepCosts:
    """The largest of each figure of several kinds of steps."""
    first, *others = found
    for other in others:
        lines: dict[str, Any] = {
            name: line.or_more(getattr(other, name))
            for name in ("graph", "train", "forward", "heads", "lean", "lean_train")
            if (line := getattr(first, name)) is not None
        }
        flops: dict[str, Any] = {
            name: max(getattr(first, name), getattr(other, name))
            for name in ("query_flops", "recompute_flops", "step_flops", "lean_flops")
        }
        first = replace(first, **lines, **flops)
    return first


def part_flops(
    config: Config,
    precision: str,
    images: int,
    *,
    attention: str = "sdpa",
    images_twice: int = 0,
    images_lean: int = 0,
    phase: Phase | None = None,
) -> dict[str, float]:
    """FLOPs of the matrix products, convolutions and attention of a step, by part
    (`fastmoco_pipelines.loading.step_parts`).

    Args:
        config: its model, heads and views are used.
        precision: "bf16", "fp32" or "fp64".
        images: of the step, on this process alone.
        attention: as of `measure_costs`.
        images_twice: of these, that pass the query trunk a second time, because the step runs in
            micro-batches that do not keep their graphs.
        images_lean: of these, whose fused blocks keep the residual stream alone (`StepPlan.lean`).
        phase: of the step; None: the first one.
    """
    dtype = torch.float64 if precision == "fp64" else torch.float32
    with FakeTensorMode(), _default_dtype(dtype):
        pieces = _pieces(config, precision, attention, phase or config.model.phases.items[0])
        found = pieces.flops_of_parts(images)
        if images_twice:
            with _FlopsOfParts(None) as again:
                pieces.query(images_twice)
            found[QUERY_FORWARD] = found.get(QUERY_FORWARD, 0.0) + again.flops[""]
        if images_lean:
            plain = pieces.flops_of_parts(images_lean)
            pieces.recompute("full")
            lean = pieces.flops_of_parts(images_lean)
            found[BACKWARD] += lean[BACKWARD] - plain[BACKWARD]
    return found


class WholeStep(NamedTuple):
    """A step of a whole batch, as `count_step` counts it."""

    peak_bytes: int
    """What lives at once at most, besides parameters and buffers: views, activations, gradients."""
    flops: float
    """Forward and backward of everything."""
    encoder_flops: float
    """One forward of the evaluated encoder on as many whole images, without its head."""


def count_step(config: Config, precision: str, images: int) -> WholeStep:
    """Count a step that takes its images at once on one process, as it runs: no depth is left out
    and no line is drawn, unlike in `measure_costs`.

    Args:
        config: its model, heads and views are used.
        precision: "bf16", "fp32" or "fp64".
        images: of the step.
    """
    dtype = torch.float64 if precision == "fp64" else torch.float32
    with FakeTensorMode(), _default_dtype(dtype):
        pieces = _pieces(config, precision, "sdpa", config.model.phases.items[0])
        objective = pieces.objective
        state = [*objective.parameters(), *objective.buffers()]
        with LiveBytes(state) as live, _FlopsOfParts(None) as step:
            pieces.whole_step(images)()
        with _FlopsOfParts(None) as encoder:
            pieces.encode(images)
        return WholeStep(
            peak_bytes=live.peak, flops=step.flops[""], encoder_flops=encoder.flops[""]
        )


def trunk_passes(config: Config, precision: str) -> dict[str, int]:
    """Forwards of the trunk of each network of an objective in a step that takes its images at once,
    by the network's name; without networks that have no trunk.

    Args:
        config: its model, heads and views are used.
        precision: "bf16", "fp32" or "fp64".
    """
    dtype = torch.float64 if precision == "fp64" else torch.float32
    found: dict[str, int] = {}
    with FakeTensorMode(), _default_dtype(dtype):
        pieces = _pieces(config, precision, "sdpa", config.model.phases.items[0])

        def count(name: str) -> Callable[..., None]:
            def counted(*_: object) -> None:
                found[name] += 1

            return counted

        for name, parts in pieces.objective.parts().items():
            if len(parts.blocks):
                found[name] = 0
                parts.blocks[0].register_forward_hook(count(name))
        pieces.features(SIZES[0])
    return found


def _pieces(
    config: Config, precision: str, attention: str, phase: Phase, *, levels: bool = False
) -> _Pieces:
    """The parts of a step of a config, on one process."""
    objective = build_model(config)
    if objective.ring:
        # On one process the same products, in an operator that counts; others' keys are a formula.
        objective.ring = False
    for module in objective.modules():
        if isinstance(module, Attention):
            module.backend = attention if attention in ("explicit", "reference") else "sdpa"
    views = each_view(config.data.views)
    return _Pieces(
        objective,
        [view.size for view in views],
        precision == "bf16",
        view_preparation(views, precision, exact=objective.exact_views),
        levels,
        _within(phase),
    )


def _within(phase: Phase) -> Progress:
    """A step of a phase, in a run of many steps."""
    return Progress(phase.first_step(MANY_STEPS), MANY_STEPS)


def key_bytes(config: Config, element: int) -> float:
    """`StepCosts.key_bytes` of a config with `element` bytes a number."""
    return 2 * 2 * config.model.projection_dim * element


def _units(objective: Objective, size: int) -> Units:
    networks = objective.networks()
    trained = {
        name
        for name, network in networks.items()
        if any(p.requires_grad for p in network.parameters())
    }
    blocks = [0]
    heads = [0]
    trunk = frozen = 0
    for name, parts in objective.parts().items():
        inside = [sum(p.numel() for p in head.parameters()) for head in parts.heads.values()]
        if name in trained:
            blocks += [sum(p.numel() for p in block.parameters()) for block in parts.blocks]
            heads += inside
            own = sum(p.numel() for p in networks[name].parameters() if p.requires_grad)
            trunk += own - sum(inside)

    # Parameters that are neither trained nor averages are not sharded.
    averages = {id(average) for own, average in objective.averages().items() if own.requires_grad}
    frozen = sum(
        p.numel() for p in objective.parameters() if not p.requires_grad and id(p) not in averages
    )
    return Units(
        block=max(blocks),
        largest=max(*blocks, *heads),
        trunk=trunk,
        heads=sum(heads),
        frozen=frozen,
        bytes=size,
    )


class _FlopsOfParts(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up FLOPs by the part under way; without a collector all are of the part ""."""

    def __init__(self, collector: Collector | None) -> None:
        # Imported here because it imports Triton, which runs that count nothing do not need.
        from torch.utils.flop_counter import flop_registry

        super().__init__()  # type: ignore[no-untyped-call]
        self.flops: defaultdict[str, float] = defaultdict(float)
        self._collector = collector
        self._registry: dict[Any, Any] = flop_registry

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        packet = func._overloadpacket
        shaped: Any = OWN_FLOPS.get(packet)
        part = (self._collector.current() if self._collector else None) or ""
        if shaped is not None:
            shapes = (arg.shape if isinstance(arg, Tensor) else arg for arg in args)
            self.flops[part] += float(shaped(*shapes))
        elif packet in self._registry:
            self.flops[part] += float(self._registry[packet](*args, **kwargs, out_val=out))
        elif func._schema.name == "fastmoco::info_nce":
            (images, dim), directions = args[0].shape, 1 if args[2] is None else 2
            gradients = {"gradient": args[8], "key_gradient": args[9]}
            self.flops[part] += loss_cost.flops(
                images, len(args[1]), dim, directions=directions, **gradients
            )
        return out


Figures = dict[str, tuple[float, ...]]


class _Pieces:
    """The parts of a step, run on fake images under a counter.

    Attributes:
        traced: whether blocks that train are in `traced_blocks`.
    """

    traced = False

    def __init__(
        self,
        objective: Objective,
        sides: list[int],
        bf16: bool,
        prepare: PrepareViews,
        levels: bool,
        at: Progress,
    ) -> None:
        self.objective = objective
        self.sides = sides
        self.bf16 = bf16
        self.prepare = prepare
        self.kind = torch.uint8 if levels else torch.get_default_dtype()
        self.at = at
        self._rows: list[list[tuple[torch.Size, torch.dtype]]] | None = None
        self._seen: set[int] = set()

    def recompute(self, what: Recompute) -> None:
        """Choose what the backward of all blocks computes again."""
        for parts in self.objective.trunks().values():
            for block in parts.blocks:
                block.recompute = what  # type: ignore[assignment]

    def on_all_blocks(self, recompute: Recompute, measure: Callable[[], Figures]) -> Figures:
        """The result of `measure` with all blocks.

        The blocks of a network are alike, so the difference of two depths is the cost of more
        blocks.
        """
        networks = [parts for parts in self.objective.parts().values() if len(parts.blocks)]
        trunks: list[Any] = [parts.blocks for parts in networks]
        self.recompute(recompute)

        # Networks of different or small depths, and of unlike blocks, are measured as they are.
        depths = {len(blocks) for blocks in trunks}
        depth = max(depths, default=0)
        alike = all(parts.alike for parts in networks)
        if len(depths) != 1 or depth <= max(DEPTHS) or not alike:
            return measure()

        # Others are cut to each depth and restored. Heads always see the features of all blocks.
        self.features(SIZES[0])
        whole = [list(blocks) for blocks in trunks]
        measured = []
        for few in DEPTHS:
            for blocks, all_of_them in zip(trunks, whole, strict=True):
                del blocks[:]
                blocks.extend(all_of_them[:few])
            measured.append(measure())
        for blocks, all_of_them in zip(trunks, whole, strict=True):
            blocks.extend(all_of_them[len(blocks) :])

        # The line through both depths, at all blocks.
        steps = (depth - DEPTHS[0]) / (DEPTHS[1] - DEPTHS[0])
        less, more = measured
        return {
            name: tuple(a + (b - a) * steps for a, b in zip(less[name], more[name], strict=True))
            for name in less
        }

    def bytes_to_train(self) -> Figures:
        """Bytes of `train`, and `graph`."""
        return self._bytes(("train",))

    def bytes_of_the_rest(self) -> Figures:
        """Bytes of `forward` and `heads`, which keep nothing."""
        return self._bytes(("forward", "heads"))

    def _bytes(self, names: Collection[str]) -> Figures:
        """Peak of each part, and `graph`: bytes per image, and bytes that are independent of it."""
        measured = []
        for images in SIZES:
            found: dict[str, float] = {}
            for name, run in self._runs(images).items():
                if name not in names:
                    continue
                if name == "train":
                    self._trace(images, run)
                live = LiveBytes(self.objective.parameters())
                with live:
                    graph = run(live)
                found[name] = live.peak
                if graph:
                    found["graph"] = graph
            measured.append(found)
        small, large = measured
        slopes = {name: (large[name] - small[name]) / (SIZES[1] - SIZES[0]) for name in small}
        return {
            name: (slope, max(0.0, small[name] - slope * SIZES[0]))
            for name, slope in slopes.items()
        }

    def _trace(self, images: int, run: Callable[[LiveBytes | None], int]) -> None:
        """Call `run` once if its blocks are yet to be traced for this number of images; all depths
        share graphs."""
        if self.traced and images not in self._seen:
            run(None)
            self._seen.add(images)

    def flops_to_train(self) -> Figures:
        """FLOPs of `train` alone."""
        return self.flops_of_an_image(("train",))

    def flops_of_an_image(
        self, names: Collection[str] = ("query", "train", "forward", "heads")
    ) -> Figures:
        """FLOPs of each part, in a separate pass, because torch's counter keeps tensors alive."""
        # Imported here because it imports Triton, which runs that count nothing do not need.
        from torch.utils.flop_counter import FlopCounterMode

        found: Figures = {}
        for name, run in self._runs(SIZES[0]).items():
            if name not in names:
                continue
            if name == "train":
                self._trace(SIZES[0], run)
            with FlopCounterMode(display=False, custom_mapping=OWN_FLOPS) as counter:
                run(None)
            found[name] = (counter.get_total_flops() / SIZES[0],)
        return found

    def _runs(self, images: int) -> dict[str, Callable[[LiveBytes | None], int]]:
        """The parts by name.

        `train` returns the live bytes between its forward and its backward, the others return 0.
        """
        objective = self.objective
        at = self.at
        views = tuple(torch.empty(images, 3, side, side, dtype=self.kind) for side in self.sides)
        online, target = self.features(images)
        leaves = tuple(rows.requires_grad_() for rows in online)

        def query(live: LiveBytes | None) -> int:
            with torch.no_grad(), self._autocast():
                objective.features(self.inputs(views), at, target=False)
            return 0

        def train(live: LiveBytes | None) -> int:
            with self._autocast():
                features = objective.features(self.inputs(views), at, target=False).online
            graph = live.now if live else 0
            trained = [rows for rows in features if rows.requires_grad]  # none of a frozen trunk
            torch.autograd.backward(trained, [torch.empty_like(rows) for rows in trained])
            objective.zero_grad(set_to_none=True)
            return graph

        def forward(live: LiveBytes | None) -> int:
            with torch.no_grad(), self._autocast():
                objective.features(self.inputs(views), at)
            return 0

        def heads(live: LiveBytes | None) -> int:
            with self._autocast():
                loss = objective.compare(Features(leaves, target), at, accuracy=True).loss
            loss.backward()  # type: ignore[no-untyped-call]
            objective.zero_grad(set_to_none=True)
            for rows in leaves:
                rows.grad = None
            return 0

        return {"query": query, "train": train, "forward": forward, "heads": heads}

    def query(self, images: int) -> None:
        """The forward of the query trunk."""
        views = tuple(torch.empty(images, 3, side, side, dtype=self.kind) for side in self.sides)
        with torch.no_grad(), self._autocast():
            self.objective.features(self.inputs(views), self.at, target=False)

    def encode(self, images: int) -> None:
        """A forward of the evaluated encoder on whole images."""
        side = self.sides[0]
        with torch.no_grad(), self._autocast():
            self.objective.evaluation_encoder(torch.empty(images, 3, side, side))

    def flops_of_parts(self, images: int) -> dict[str, float]:
        """FLOPs of a whole batch by part."""
        run = self.whole_step(images)
        run()  # what a first run does once is no part of a step
        with collecting() as collector, _FlopsOfParts(collector) as counter:
            run()
        return dict(counter.flops)

    def whole_step(self, images: int) -> Callable[[], None]:
        """Forward and backward of a whole batch, with the marks of a trainer."""
        views = tuple(torch.empty(images, 3, side, side, dtype=self.kind) for side in self.sides)

        def run() -> None:
            inputs = self.inputs(views)
            with self._autocast():
                features = self.objective.features(inputs, self.at)
                loss = self.objective.compare(features, self.at).loss
            with part(BACKWARD):
                loss.backward()  # type: ignore[no-untyped-call]
            self.objective.zero_grad(set_to_none=True)

        return run

    def inputs(self, views: tuple[torch.Tensor, ...]) -> Inputs:
        """What the trunks read of some views."""
        labels = self.labels(len(views[0]))
        found = self.objective.inputs(self.prepare(views), at=self.at, labels=labels)
        return self.objective.resized(found, self.at)

    def features(self, images: int) -> Features:
        """Features of some images as the whole trunks return them, without a graph."""
        if self._rows is None:
            # So many that groups of batch norms (`objective.batch_norm_groups`) have some of them.
            some = SIZES[0]
            views = tuple(torch.empty(some, 3, side, side, dtype=self.kind) for side in self.sides)
            with torch.no_grad(), self._autocast():
                found = self.objective.features(self.inputs(views), self.at)
            self._rows = [[(rows.shape[1:], rows.dtype) for rows in side] for side in found]
        return Features(
            *(
                tuple(torch.empty(images, *shape, dtype=dtype) for shape, dtype in side)
                for side in self._rows
            )
        )

    def labels(self, images: int) -> Tensor | None:
        """Labels of some images, where the objective needs them."""
        needed = self.objective.needs_labels
        return torch.empty(images, dtype=torch.int64) if needed else None

    def _autocast(self) -> torch.autocast:
        return torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.bf16)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
