"""The trunk's two passes over a chunk at fixed addresses, captured once as CUDA graphs and
replayed: no launches from Python.

Chunks of a step have one shape, so what the GPU does for one is the same list of kernels on the
same addresses, once inputs are copied to where the list reads them:

    features:   views -> features of all encoders, without gradient
    backward:   views, d loss / d features -> forward again, and added to `grad`

Both run as plain code over the same tensors where nothing is captured. That code is held equal to
`ChunkedStep` without graphs, bit for bit, and it is what is captured.

What must hold, and what holds it. Weights keep their addresses: optimizers, restore and rollback
write in place, and `begin` captures again where one has moved. Gradients are added in place, so
`begin` puts tensors of its own into `grad` and zeroes them there, whatever has set them to
None since. No pass waits for the device: what `Objective.choices` decides is asked before, and
another answer captures again. No random numbers: a replay could not draw those of the first pass
again. Autograd's nodes for parameters remember a stream, so nothing may hold a graph of the trunk
while capturing: `begin` is the first act of a step. Other threads go on meanwhile (data,
checkpoints), so capturing watches its own alone.

Chunks whose graphs are kept stay as they are: each would need a pool of its own for what it keeps.
So do chunks of another size.

Memory, which a plan has to count beside the state while this exists, c images a chunk, with F, T of
`StepCosts`:

    static inputs:  c views (`c * view_bytes`) and one gradient of c features
    pool:           max(F(c), T(c)): what either pass needs in passing is never returned, so heads
                    and kept graphs come on top: peak = inputs + pool + B (views + features)
                    + max(G(k) + H(B), G(k) + F(c) for the kept chunks)

Gradients take what they take anyway, but stay between steps.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from fastmoco.distributed.sharding import is_sharded
from fastmoco.objectives.interface import Features, Inputs, Objective, Progress
from fastmoco.objectives.prepare import PrepareViews, as_they_are

WARM_UP = 3
"""Runs before a capture: compilers compile, libraries choose kernels and take their workspaces."""


class Replayable:
    """A function of no arguments over tensors that stay where they are: called, or captured once
    and then replayed.

    Args:
        function: launches work on the current stream, and returns the same tensors or None.

    Attributes:
        captured: whether calls replay.
    """

    def __init__(self, function: Callable[[], Any]) -> None:
        self._function = function
        self._graph: torch.cuda.CUDAGraph | None = None
        self._result: Any = None

    @property
    def captured(self) -> bool:
        """Whether calls replay."""
        return self._graph is not None

    def capture(self, stream: torch.cuda.Stream, pool: Any) -> None:
        """Record what the function launches, without running it. It must have run on this stream
        before.

        Args:
            stream: a side stream; the one of the warm-up.
            pool: of `torch.cuda.graph_pool_handle`; graphs that never run at the same time may
                share one.
        """
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            self._result = self._function()
        self._graph = graph

    def __call__(self) -> Any:
        """What the function returns: after a capture the same tensors every time, with new numbers
        in them."""
        if self._graph is None:
            return self._function()
        self._graph.replay()
        return self._result


class ChunkGraphs:
    """`ChunkedStep`'s passes over chunks of one size, replayed.

    Call `begin` first in a step; then `features` and `backward` for every chunk that `fits`.

    Args:
        objective: its trunk couples no images and recomputes nothing; in this process whole.
        chunk: images of a chunk.
        autocast: makes the contexts of the forwards. They are entered inside a capture, so each
            replay casts its weights.
        prepare: as for `ChunkedStep`; part of what is captured.
        capture: False runs the same code over the same tensors without capturing, on any device:
            for tests.

    Raises:
        ValueError: for an objective that cannot be captured, or a device without graphs.
    """

    def __init__(
        self,
        objective: Objective,
        chunk: int,
        autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
        *,
        prepare: PrepareViews = as_they_are,
        capture: bool = True,
    ) -> None:
        require_capturable(objective, capture=capture)
        self._prepare = prepare
        self._objective, self._chunk, self._autocast, self._capture = (
            objective,
            chunk,
            autocast,
            capture,
        )
        self._trained: list[torch.nn.Parameter] = []
        self._gradients: list[Tensor] = []
        self._key: tuple[object, ...] = ()

    _features: Replayable
    _backward: Replayable
    _inputs: Inputs
    _gradient: tuple[Tensor, ...]

    def begin(self, inputs: Inputs, at: Progress) -> None:
        """Make ready for a step: passes that hold, and gradients where they add them, zero where
        they were None.

        The first call, and one after a weight has moved, runs a chunk a few times and captures,
        which takes seconds and waits for the device. What is in `grad` is kept.

        Args:
            inputs: of the step, at least a chunk.
            at: the step.
        """
        parameters = list(self._objective.parameters())
        shapes = [(tensor.shape[1:], tensor.dtype, tensor.device) for tensor in _tensors(inputs)]
        chosen = self._objective.choices(at), self._objective.phase(at).patch_size
        key = (*shapes, *chosen, *(p.data_ptr() for p in parameters))
        if key != self._key:
            self._build(inputs, at)
            self._key = key
        missing = []
        for parameter, gradient in zip(self._trained, self._gradients, strict=True):
            if parameter.grad is None:
                missing.append(gradient)
            elif parameter.grad is not gradient:
                gradient.copy_(parameter.grad)
            parameter.grad = gradient
        if missing:
            torch._foreach_zero_(missing)

    def fits(self, chunk: Inputs) -> bool:
        """Whether a chunk has the size of the passes."""
        return len(chunk.views[0]) == self._chunk

    def features(self, chunk: Inputs) -> Features:
        """Features of a chunk without gradient, the caller's own."""
        self._load(chunk)
        online, target = self._features()
        return Features(
            tuple(rows.clone() for rows in online), tuple(rows.clone() for rows in target)
        )

    def backward(self, chunk: Inputs, gradient: tuple[Tensor, ...]) -> None:
        """Add what a chunk's online features pass on of their `gradient` to the trunk's `grad`."""
        self._load(chunk)
        for held, given in zip(self._gradient, gradient, strict=True):
            held.copy_(given)
        self._backward()

    def close(self) -> None:
        """Give back graphs, pool and buffers; the next `begin` makes them again. The gradients in
        `grad` stay."""
        self._key = ()
        for name in ("_features", "_backward", "_inputs", "_gradient"):
            self.__dict__.pop(name, None)

    def _load(self, chunk: Inputs) -> None:
        for held, given in zip(_tensors(self._inputs), _tensors(chunk), strict=True):
            held.copy_(given)

    def _build(self, inputs: Inputs, at: Progress) -> None:
        """Static tensors, and both passes over them."""
        self.close()
        objective = self._objective

        def blank(tensor: Tensor) -> Tensor:
            # Zeros: a warm-up's numbers are not used, and may be anything but slow.
            return torch.zeros_like(tensor[: self._chunk], memory_format=torch.contiguous_format)

        self._inputs = Inputs(
            tuple(map(blank, inputs.views)),
            tuple(map(blank, inputs.masks)),
            tuple(map(blank, inputs.paths)),
            None if inputs.labels is None else blank(inputs.labels),
            tuple(map(blank, inputs.kept)),
        )

        def prepared() -> Inputs:
            held = self._inputs._replace(views=self._prepare(self._inputs.views))
            return objective.resized(held, at)

        def features() -> Features:
            with torch.no_grad(), self._autocast():
                return objective.features(prepared(), at)

        def backward() -> None:
            with self._autocast():
                online = objective.features(prepared(), at, target=False).online
            torch.autograd.backward(online, self._gradient)

        self._features, self._backward = Replayable(features), Replayable(backward)
        trained = [p for p in objective.parameters() if p.requires_grad]
        found = [None if p.grad is None else p.grad.clone() for p in trained]
        for parameter in trained:
            parameter.grad = None
        try:
            self._warm_up()
        finally:
            for parameter, gradient in zip(trained, found, strict=True):
                parameter.grad = gradient

    def _warm_up(self) -> None:
        """Run both passes, see which parameters they reach, and capture."""
        device = self._inputs.views[0].device
        before = _random_state(device)
        stream = torch.cuda.Stream(device) if self._capture else None  # type: ignore[no-untyped-call]
        with _beside(stream):
            online = self._features().online
        self._gradient = tuple(torch.zeros_like(rows) for rows in online)
        del online
        with _beside(stream):
            self._backward()
        self._trained = [p for p in self._objective.parameters() if p.grad is not None]
        self._gradients = [torch.zeros_like(p) for p in self._trained]
        for parameter, gradient in zip(self._trained, self._gradients, strict=True):
            parameter.grad = gradient
        with _beside(stream):
            for _ in range(WARM_UP - 1 if stream is not None else 0):
                self._features()
                self._backward()
        if not torch.equal(before, _random_state(device)):
            raise ValueError(
                "batch.cuda_graphs=True: the trunk draws random numbers, and a replay would draw "
                "others in its second forward; take batch.cuda_graphs False"
            )
        if stream is not None:
            gc.collect()  # what a dead cycle holds is better freed now than while capturing
            pool = torch.cuda.graph_pool_handle()
            for passed in (self._features, self._backward):
                passed.capture(stream, pool)


def require_capturable(objective: Objective, *, capture: bool = True) -> None:
    """Refuse what graphs cannot serve.

    Raises:
        ValueError: with the reason, and what to do instead.
    """
    cure = "take batch.cuda_graphs False"
    device = next(objective.parameters()).device
    if capture and device.type != "cuda":
        raise ValueError(
            f"batch.cuda_graphs=True: device {device.type!r} has no CUDA graphs; {cure}"
        )
    if is_sharded(objective):
        raise ValueError(
            "batch.cuda_graphs=True: under fsdp and hsdp weights are gathered again for every "
            f"chunk, at other addresses; {cure}, or parallel.strategy ddp"
        )
    blocks = [block for parts in objective.trunks().values() for block in parts.blocks]
    how = {getattr(block, "recompute", "none") for block in blocks} - {"none"}
    if how:
        raise ValueError(
            f"batch.cuda_graphs=True: with model.checkpointing={how.pop()} the forward reads the "
            "state of the random numbers, which no capture allows; "
            f"{cure}, or model.checkpointing none"
        )


@contextmanager
def _beside(stream: torch.cuda.Stream | None) -> Iterator[None]:
    """Work on a side stream, after what was launched before and before what comes after; None:
    where one is."""
    if stream is None:
        yield
        return
    around = torch.cuda.current_stream(stream.device)
    stream.wait_stream(around)
    with torch.cuda.stream(stream):
        yield
    around.wait_stream(stream)


def _tensors(inputs: Inputs) -> tuple[Tensor, ...]:
    labels = () if inputs.labels is None else (inputs.labels,)
    return (*inputs.views, *inputs.masks, *inputs.paths, *labels, *inputs.kept)


def _random_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()
