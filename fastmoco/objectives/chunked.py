"""One exact step of a batch whose activations do not fit: the trunk a chunk at a time, heads and loss on all of it.

A gradient accumulated over small batches is another gradient: batch norms in the heads would see other statistics, and each query
fewer keys. But only heads and loss couple images; a trunk of layer norms maps each image by itself. So, with f = trunk(x):

    1. trunk of both encoders, chunk by chunk; of a chunk only its class features stay, two rows of E numbers an image
    2. heads, batch statistics, keys and loss, once, on the whole batch over all ranks: loss and d loss / d f
    3. each chunk again, with gradient: its part of d loss / d f goes on through the trunk (chain rule, no approximation)

Sums over images are taken in another order, nothing else differs. (The two-pass idea is that of Gao, Zhang, Han, Callan
2021, "Scaling deep contrastive learning batch size under memory limited setup".) Graphs of the first chunks are kept, so
that only the others pay for a second forward; how many are kept changes no bit, because chunks go back in their order
either way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from fastmoco.distributed.gradient_average import GradientAverage, ShardedGradientAverage, gradient_average
from fastmoco.objectives.chunk_graphs import ChunkGraphs
from fastmoco.objectives.moco_v3 import MoCoV3, MoCoV3Output
from fastmoco.objectives.prepare import PrepareViews, as_they_are

RandomState = tuple[Tensor, Tensor | None]


class ChunkedStep:
    """Loss and gradients of a whole batch, the trunk in chunks.

    Nothing in a trunk crosses ranks, so ranks may differ in ``chunk`` and ``kept``; but under FSDP2 its weights do, and they
    may not.

    Args:
        objective: its trunk couples no samples; not wrapped for data-parallel training.
        chunk: images (two views each) that pass the trunk together; the last chunk of a batch may be smaller.
        kept: chunks whose graphs are kept; more than there are means all.
        kept_images: instead of ``kept``, the first so many images of a batch, which need not be whole chunks: where memory
            holds the graphs of two chunks and a half, the half is kept too. They go in chunks of their own, ``chunk`` images
            each and the last of what is left, and the others after them likewise. Borders of chunks move with it, and so
            does rounding in the sums over images; of a multiple of ``chunk`` it is ``kept``, bit for bit. Shapes of chunks
            become at most three, each compiled once where blocks are compiled.
        autocast: makes the contexts of the forwards. There is none around the step: autocast remembers its casts of weights
            until the outermost context ends, and one made without gradient would serve the pass with gradient, silently.
        average: when gradients cross ranks; default once, behind the last chunk.
        prepare: makes what the encoder reads of a chunk's two views, each time that they pass the trunk: the batch itself may
            then be held in fewer bytes.
        graphs: replays the passes over chunks of its size whose graphs are not kept; None: all run from Python.

    Raises:
        ValueError: if the trunk couples samples, or for a number that makes no sense.
    """

    def __init__(
        self,
        objective: MoCoV3,
        *,
        chunk: int,
        kept: int = 0,
        kept_images: int | None = None,
        autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
        average: GradientAverage | ShardedGradientAverage | None = None,
        prepare: PrepareViews = as_they_are,
        graphs: ChunkGraphs | None = None,
    ) -> None:
        if chunk < 1:
            raise ValueError(f"chunk={chunk}: needs at least 1 image")
        if kept < 0:
            raise ValueError(f"kept={kept}: must not be negative")
        if kept_images is not None and (kept or kept_images < 0):
            raise ValueError(
                f"kept_images={kept_images}, kept={kept}: one of the two says what is kept, and is not negative"
            )
        require_separable(objective, chunk)
        self.objective, self.chunk, self.autocast = objective, chunk, autocast
        self.kept_images = chunk * kept if kept_images is None else kept_images
        self.average, self.graphs = average or gradient_average(objective), graphs
        self.prepare = prepare

    def __call__(self, view1: Tensor, view2: Tensor, *, accuracy: bool = False) -> MoCoV3Output:
        """One forward and backward; gradients are added to ``grad`` of the trainable parameters, averaged over ranks.

        Args:
            view1: [B, 3, H, W] first view, the same B on every rank.
            view2: [B, 3, H, W] second view.
            accuracy: as for `MoCoV3.forward`.

        Returns:
            As `MoCoV3.forward`, its graph used up.
        """
        if view1.shape != view2.shape:
            raise ValueError(f"view1 shape={tuple(view1.shape)}, view2 shape={tuple(view2.shape)}: must be equal")
        if torch.is_autocast_enabled(view1.device.type):
            raise ValueError("autocast is on around the chunked step: give it as ChunkedStep(autocast=...) instead")
        kept_sizes, other_sizes = self._sizes(len(view1))
        if self.graphs is not None and self.chunk in other_sizes:
            self.graphs.begin(view1)
        sizes, kept = kept_sizes + other_sizes, len(kept_sizes)
        parts = (view.split(sizes) for view in (view1, view2))  # type: ignore[no-untyped-call]
        chunks = list(zip(*parts, strict=True))
        # Those without a graph first: what they leave is small, and what they need in passing is free again by then.
        with torch.no_grad(), self.autocast():
            later = [self._replayed_features(chunk) or self._features(chunk) for chunk in chunks[kept:]]
        with self.autocast():
            first = [self._features(chunk) for chunk in chunks[:kept]]
        graphs = [queries for queries, _, _ in first]
        features = [*first, *later]
        states = [state for _, _, state in features]
        leaf = torch.cat([queries.detach() for queries, _, _ in features], dim=1).requires_grad_()
        with self.autocast():
            output = self.objective.compare(
                leaf, torch.cat([keys for _, keys, _ in features], dim=1), accuracy=accuracy
            )
        del first, later, features
        with self.average.local():
            output.loss.backward()  # type: ignore[no-untyped-call]
        assert leaf.grad is not None
        gradients = leaf.grad.split(sizes, dim=1)  # type: ignore[no-untyped-call]
        for i, (chunk, gradient, state) in enumerate(zip(chunks, gradients, states, strict=True)):
            queries = graphs[i] if i < kept else self._again(chunk, state) if state is not None else None
            with self.average.last() if i == len(chunks) - 1 else self.average.local():
                if queries is not None:
                    queries.backward(gradient)  # type: ignore[no-untyped-call]
                elif self.graphs is not None:
                    self.graphs.backward(chunk[0], chunk[1], gradient)
            if i < kept:
                graphs[i] = graphs[i].detach()  # its graph, used up, goes before the next chunk needs room
            del queries
        return output

    def _sizes(self, images: int) -> tuple[list[int], list[int]]:
        """Images of the chunks whose graphs are kept, and of those after them."""
        kept = min(self.kept_images, images)
        return _even_but_last(kept, self.chunk), _even_but_last(images - kept, self.chunk)

    def _replayed_features(self, chunk: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, None] | None:
        """`_features` from a graph, which draws no random numbers; None where there is none for this chunk."""
        if self.graphs is None or not self.graphs.fits(chunk[0]):
            return None
        return *self.graphs.features(*chunk), None

    def _features(self, chunk: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, RandomState]:
        """Both encoders' features of a chunk, and where the random numbers stood before."""
        state = _random_state(chunk[0].device)
        views = self.prepare(*chunk)
        queries, tokens = self.objective.query_features(*views)
        shared = tokens if self.objective.shares_patch_tokens() else None
        return queries, self.objective.key_features(*views, shared), state

    def _again(self, chunk: tuple[Tensor, Tensor], state: RandomState) -> Tensor:
        """The same features of the query side once more, with gradient, from the same random numbers."""
        with _replay(state, chunk[0].device), self.autocast():
            return self.objective.query_features(*self.prepare(*chunk))[0]


def require_separable(objective: MoCoV3, chunk: int) -> None:
    """Refuse a trunk that cannot go in chunks.

    Raises:
        ValueError: with the reason, and what to do instead.
    """
    if objective.couples_samples:
        raise ValueError(
            f"batch.chunk={chunk}: this trunk cannot go in chunks, because {objective.couples_samples}; chunks would train "
            "another model. Instead: --model.checkpointing full, more processes (batch norms see the batches of all), "
            "a smaller --global-batch-size, or an encoder with linear patches such as vit_small"
        )


def _even_but_last(images: int, chunk: int) -> list[int]:
    """So many images in chunks of one size, the last of what is left."""
    whole, rest = divmod(images, chunk)
    return [chunk] * whole + ([rest] if rest else [])


def _random_state(device: torch.device) -> RandomState:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


@contextmanager
def _replay(state: RandomState, device: torch.device) -> Iterator[None]:
    """Draw the numbers that followed a state once more, then go on as if nobody had."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.set_rng_state(state[0])
        if state[1] is not None:
            torch.cuda.set_rng_state(state[1], device)
        yield
