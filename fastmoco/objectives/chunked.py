"""One exact step of a batch whose activations do not fit: the trunk a chunk at a time, heads and
loss on all of it.

A gradient accumulated over small batches is another gradient: batch norms in the heads would see
other statistics, and each query fewer keys. But only heads and loss couple images; a trunk of layer
norms maps each image by itself. So, with f = trunk(x):

    1. trunks of all encoders, chunk by chunk; of a chunk only its features stay, a few rows of E
       numbers an image
    2. heads, batch statistics, gathers and loss, once, on the whole batch over all ranks: loss and
       d loss / d f
    3. each chunk again, with gradient: its part of d loss / d f goes on through the trunk (chain
       rule, no approximation)

Sums over images are taken in another order, nothing else differs. (The two-pass idea is that of
Gao, Zhang, Han, Callan 2021, "Scaling deep contrastive learning batch size under memory limited
setup".) Graphs of the first chunks are kept, so that only the others pay for a second forward; how
many are kept changes no bit, because chunks go back in their order either way.

Where nothing couples images (`Coupling.NONE`) losses of chunks add up: features, loss and backward
a chunk at a time, each loss weighted by its share of the images, and nothing is computed twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from fastmoco.distributed.gradient_average import (
    GradientAverage,
    ShardedGradientAverage,
    gradient_average,
)
from fastmoco.objectives.chunk_graphs import ChunkGraphs
from fastmoco.objectives.interface import (
    START,
    Coupling,
    Features,
    Inputs,
    Objective,
    Output,
    Progress,
)
from fastmoco.objectives.prepare import PrepareViews, as_they_are
from fastmoco_pipelines.loading.step_parts import BACKWARD, QUERY_FORWARD, TRANSFER, part

RandomState = tuple[Tensor, Tensor | None]


class ChunkedStep:
    """Loss and gradients of a whole batch, the trunk in chunks.

    Nothing in a trunk crosses ranks, so ranks may differ in `chunk` and `kept`; but under FSDP2
    its weights do, and they may not.

    Args:
        objective: its trunk couples no images; not wrapped for data-parallel training.
        chunk: images (with all their views) that pass the trunk together, rounded to a multiple of
            `Objective.images_together`; the last chunk of a batch may be smaller.
        kept: chunks whose graphs are kept; more than there are means all.
        kept_images: instead of `kept`, the first images of a batch, this number of them, which need
            not be whole chunks: where memory holds the graphs of two chunks and a half, the half is
            kept too. They go in chunks of their own, `chunk` images each and the last of what is
            left, and the others after them likewise. Borders of chunks move with it, and so does
            rounding in the sums over images; of a multiple of `chunk` it is `kept`, bit for bit.
            Shapes of chunks become at most three, each compiled once where blocks are compiled.
        autocast: makes the contexts of the forwards. There is none around the step: autocast
            remembers its casts of weights until the outermost context ends, and one made without
            gradient would serve the pass with gradient, silently.
        average: when gradients cross ranks; default once, after the last chunk.
        prepare: makes what the encoder reads of a chunk's two views, each time that they pass the
            trunk: the batch itself may then be held in fewer bytes.
        lean: whether images that keep no graph keep the residual stream of their fused blocks:
            their graphs stay too, and the backward makes the rest again.
        graphs: replays the passes over chunks of its size whose graphs are not kept; None: all run
            from Python.

    Raises:
        ValueError: if the trunk couples images, or for a number that makes no sense.
    """

    def __init__(
        self,
        objective: Objective,
        *,
        chunk: int,
        kept: int = 0,
        kept_images: int | None = None,
        autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
        average: GradientAverage | ShardedGradientAverage | None = None,
        prepare: PrepareViews = as_they_are,
        lean: bool = False,
        graphs: ChunkGraphs | None = None,
    ) -> None:
        if chunk < 1:
            raise ValueError(f"chunk={chunk}: needs at least 1 image")
        if kept < 0:
            raise ValueError(f"kept={kept}: must not be negative")
        if kept_images is not None and (kept or kept_images < 0):
            raise ValueError(
                f"kept_images={kept_images}, kept={kept}: one of the two says what is kept, and is "
                "not negative"
            )
        require_separable(objective, chunk)
        together = objective.images_together
        chunk = max(together, chunk - chunk % together)
        self.objective, self.chunk, self.autocast = objective, chunk, autocast
        self.kept_images = chunk * kept if kept_images is None else kept_images
        self.average = average or gradient_average(objective)
        self.graphs = graphs
        self.prepare, self.lean = prepare, lean

    def __call__(
        self,
        *views: Tensor,
        masks: tuple[Tensor, ...] = (),
        labels: Tensor | None = None,
        at: Progress = START,
        accuracy: bool = False,
    ) -> Output:
        """One forward and backward; gradients are added to `grad` of the trainable parameters,
        averaged over ranks.

        Args:
            views: [B, 3, H, W] each, the same B on every rank.
            masks: of the views that have one.
            labels: [B], where the objective needs them.
            at: the step.
            accuracy: as for `Objective.compare`.

        Returns:
            As `Objective.forward`, its graph used up.
        """
        images = len(views[0])
        for number, view in enumerate(views[1:], start=2):
            if len(view) != images:
                shapes = (
                    f"view1 shape={tuple(views[0].shape)}, view{number} shape={tuple(view.shape)}"
                )
                raise ValueError(f"{shapes}: must have equally many images")
        if torch.is_autocast_enabled(views[0].device.type):
            raise ValueError(
                "autocast is on around the chunked step: give it as ChunkedStep(autocast=...)"
            )
        inputs = self.objective.inputs(views, masks, at, labels=labels)
        if self.objective.coupling is Coupling.NONE:
            return self._separate(inputs, at, accuracy)
        if not self.objective.trunk_trains:
            return self._one_pass(inputs, at, accuracy)
        return self._two_passes(inputs, at, accuracy)

    def _separate(self, inputs: Inputs, at: Progress, accuracy: bool) -> Output:
        """Chunks whose losses add up."""
        images = len(inputs.views[0])
        chunks = _split(inputs, _even_but_last(images, self.chunk))
        total: Tensor | None = None
        watched: dict[str, Tensor] = {}
        for i, chunk in enumerate(chunks):
            share = len(chunk.views[0]) / images
            with self.autocast():
                features = self.objective.features(self._prepared(chunk, at), at)
                output = self.objective.compare(features, at, accuracy=accuracy)
            average = self.average.last() if i == len(chunks) - 1 else self.average.local()
            with part(BACKWARD), average:
                (share * output.loss).backward()  # type: ignore[no-untyped-call]

            # What telemetry sees: means of scalars, and rows of the first chunk.
            loss = share * output.loss.detach()
            total = loss if total is None else total + loss
            for name, tensor in output.watch.items():
                if tensor.ndim < 2:
                    watched[name] = share * tensor + watched.get(name, 0.0)
                else:
                    watched.setdefault(name, tensor)
        assert total is not None  # noqa: S101 - a type: a batch has a chunk at least
        return Output(total, watched)

    def _one_pass(self, inputs: Inputs, at: Progress, accuracy: bool) -> Output:
        """A trunk that does not train in chunks, then heads and loss on the whole."""
        chunks = _split(inputs, _even_but_last(len(inputs.views[0]), self.chunk))
        with torch.no_grad(), self.autocast():
            found = [self.objective.features(self._prepared(chunk, at), at) for chunk in chunks]
        online, target = (
            tuple(torch.cat(rows) for rows in zip(*side, strict=True))
            for side in zip(*found, strict=True)
        )
        with self.autocast():
            output = self.objective.compare(Features(online, target), at, accuracy=accuracy)
        with part(BACKWARD), self.average.last():
            output.loss.backward()  # type: ignore[no-untyped-call]
        return output

    def _two_passes(self, inputs: Inputs, at: Progress, accuracy: bool) -> Output:
        """Trunks in chunks, heads and loss on the whole, trunks in chunks again."""
        kept_sizes, other_sizes = self._sizes(len(inputs.views[0]))
        sizes, full = kept_sizes + other_sizes, len(kept_sizes)
        kept = len(sizes) if self.lean else full
        if self.graphs is not None and self.chunk in sizes[kept:]:
            self.graphs.begin(inputs, at)
        chunks = _split(inputs, sizes)

        # Those without a graph first: what they leave is small, and what they need in passing is
        # free again by then.
        with torch.no_grad(), self.autocast():
            later = [
                self._replayed_features(chunk) or self._features(chunk, at)
                for chunk in chunks[kept:]
            ]
        with self.autocast():
            first = [self._features(chunk, at) for chunk in chunks[:full]]
            with self._lean():
                first += [self._features(chunk, at) for chunk in chunks[full:kept]]
        graphs: list[tuple[Tensor, ...]] = [features.online for features, _ in first]

        # Heads and loss, on leaves that receive the gradient of the features.
        features = [features for features, _ in (*first, *later)]
        states = [state for _, state in (*first, *later)]
        online, target = (
            [torch.cat(rows) for rows in zip(*side, strict=True)]
            for side in zip(*features, strict=True)
        )
        leaves = tuple(rows.detach().requires_grad_() for rows in online)
        with self.autocast():
            output = self.objective.compare(Features(leaves, tuple(target)), at, accuracy=accuracy)
        del first, later, features, online, target
        with part(BACKWARD), self.average.local():
            output.loss.backward()  # type: ignore[no-untyped-call]

        # Each chunk's part of that gradient goes on through its trunk.
        split = [_gradient(leaf).split(sizes) for leaf in leaves]  # type: ignore[no-untyped-call]
        gradients = list(zip(*split, strict=True))
        for i, (chunk, gradient, state) in enumerate(zip(chunks, gradients, states, strict=True)):
            again: tuple[Tensor, ...] | None = None  # of a chunk that graphs replay
            if i < kept:
                again = graphs[i]
            elif state is not None:
                again = self._again(chunk, at, state)
            average = self.average.last() if i == len(chunks) - 1 else self.average.local()
            with part(BACKWARD), average:
                if again is not None:
                    torch.autograd.backward(again, gradient)
                elif self.graphs is not None:
                    self.graphs.backward(chunk, gradient)
            if i < kept:
                graphs[i] = ()  # its graph, used up, goes before the next chunk needs room
            del again
        return output

    @contextmanager
    def _lean(self) -> Iterator[None]:
        """Blocks keep the residual stream alone."""
        blocks: list[Any] = [
            block for parts in self.objective.trunks().values() for block in parts.blocks
        ]
        for block in blocks:
            block.recompute = "full"
        try:
            yield
        finally:
            for block in blocks:
                block.recompute = "none"

    def _sizes(self, images: int) -> tuple[list[int], list[int]]:
        """Images of the chunks whose graphs are kept, and of those after them."""
        kept = min(self.kept_images, images)
        return _even_but_last(kept, self.chunk), _even_but_last(images - kept, self.chunk)

    def _replayed_features(self, chunk: Inputs) -> tuple[Features, None] | None:
        """`_features` from a graph, which draws no random numbers; None where there is none for
        this chunk."""
        if self.graphs is None or not self.graphs.fits(chunk):
            return None
        with part(QUERY_FORWARD):  # and of the keys: one replay
            return self.graphs.features(chunk), None

    def _features(self, chunk: Inputs, at: Progress) -> tuple[Features, RandomState]:
        """Features of a chunk, and where the random numbers stood before."""
        state = _random_state(chunk.views[0].device)
        return self.objective.features(self._prepared(chunk, at), at), state

    def _again(self, chunk: Inputs, at: Progress, state: RandomState) -> tuple[Tensor, ...]:
        """The same online features once more, with gradient, from the same random numbers."""
        with _replay(state, chunk.views[0].device), self.autocast():
            return self.objective.features(self._prepared(chunk, at), at, target=False).online

    def _prepared(self, chunk: Inputs, at: Progress) -> Inputs:
        with part(TRANSFER):
            prepared = chunk._replace(views=self.prepare(chunk.views))
            return self.objective.resized(prepared, at)


def require_separable(objective: Objective, chunk: int) -> None:
    """Refuse a trunk that cannot go in chunks.

    Raises:
        ValueError: with the reason, and what to do instead.
    """
    if objective.coupling is Coupling.TRUNK:
        raise ValueError(
            f"batch.chunk={chunk}: this trunk cannot go in chunks, because "
            f"{objective.coupling_reason}; chunks would train another model. Instead: "
            "--model.checkpointing full, more processes (batch norms see the batches of all), a "
            "smaller --global-batch-size, or an encoder without batch norms: one with linear "
            "patches such as vit_small, and --model.mlp-norm layer"
        )


def _split(inputs: Inputs, sizes: list[int]) -> list[Inputs]:
    """Chunks of some sizes, in order."""

    def parts(tensors: tuple[Tensor, ...]) -> list[tuple[Tensor, ...]]:
        split = [tensor.split(sizes) for tensor in tensors]  # type: ignore[no-untyped-call]
        return list(zip(*split, strict=True)) if split else [()] * len(sizes)

    labels = [None] * len(sizes)
    if inputs.labels is not None:
        labels = list(inputs.labels.split(sizes))  # type: ignore[no-untyped-call]
    tensors = map(parts, (inputs.views, inputs.masks, inputs.paths))
    chunks = zip(*tensors, labels, parts(inputs.kept), strict=True)
    return [Inputs(*chunk) for chunk in chunks]


def _gradient(leaf: Tensor) -> Tensor:
    """What the backward has left on a leaf; zero where the loss does not depend on it."""
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def _even_but_last(images: int, chunk: int) -> list[int]:
    """The sizes of chunks of one size, the last of what is left."""
    whole, rest = divmod(images, chunk)
    return [chunk] * whole + ([rest] if rest else [])


def _random_state(device: torch.device) -> RandomState:
    return torch.get_rng_state(), torch.cuda.get_rng_state(
        device
    ) if device.type == "cuda" else None


@contextmanager
def _replay(state: RandomState, device: torch.device) -> Iterator[None]:
    """Draw the numbers that followed a state once more, then go on as before."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.set_rng_state(state[0])
        if state[1] is not None:
            torch.cuda.set_rng_state(state[1], device)
        yield
