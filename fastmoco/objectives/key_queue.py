"""Queues of the keys of earlier batches, which are negatives: what objectives that have one share.

A queue is a buffer, equal on all ranks, of rows at unit length. `pointer` is the row that is
written next, `known` is how many rows are keys; the others are random directions still.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from fastmoco.distributed.gather import gather_keys
from fastmoco.objectives.interface import START, Inputs, Objective, Progress


class KeepsKeys(Objective):
    """An objective with a queue, or several of one length, to which the keys of a step go when it
    ends.

    Attributes:
        queue: [..., K, D] keys at unit length, float32 or wider; random directions at first.
        queue_ptr: [1] int64, the row that is written next.
        queue_keys: [1] int64, how many rows are keys; the others are random still.
    """

    queue: Tensor
    queue_ptr: Tensor
    queue_keys: Tensor
    _pushed: list[Tensor]

    def make_queue(self, *shape: int) -> None:
        """Register the buffers; `shape` is that of `queue`.

        Raises:
            ValueError: if the queue has no row.
        """
        if shape[-2] < 1:
            raise ValueError(f"queue={shape[-2]}: must have at least 1 key")
        self.register_buffer("queue", normalize(torch.randn(shape), dim=-1))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.int64))
        self.register_buffer("queue_keys", torch.zeros(1, dtype=torch.int64))
        self._pushed = []

    def push(self, keys: Tensor) -> None:
        """Keep raw keys [..., n, D] of this rank until the step ends."""
        wide = torch.promote_types(keys.dtype, torch.float32)
        self._pushed.append(normalize(keys.detach().to(wide), dim=-1))

    @property
    def queue_fill(self) -> Tensor:
        """Share of the rows that are keys."""
        return self.queue_keys[0] / self.queue.shape[-2]

    def inputs(
        self,
        views: tuple[Tensor, ...],
        masks: tuple[Tensor, ...] = (),
        at: Progress = START,
        *,
        labels: Tensor | None = None,
    ) -> Inputs:
        """As of every objective; keys of a forward before, which no step has ended, are dropped."""
        self._pushed = []
        return super().inputs(views, masks, at, labels=labels)

    def before_step(self, at: Progress) -> None:
        """Forget the keys of a forward that no step has ended."""
        self._pushed = []

    @torch.no_grad()
    def after_step(self, skipped: Tensor | None, at: Progress) -> None:
        """Write the keys of this step, those of all ranks, over the oldest ones."""
        pushed, self._pushed = self._pushed, []
        if not pushed:
            return
        keys = gather_keys(torch.cat(pushed, dim=-2).movedim(-2, 0)).movedim(0, -2)
        write_keys_(self.queue, self.queue_ptr, self.queue_keys, keys, skipped)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        """Keep the queue in float32 where a module is cast to a narrower type."""
        queue = self.queue
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.queue.dtype.itemsize < 4:
            self.queue = queue.to(self.queue.device)
        return self


def queued_reference(
    q: Tensor, k: Tensor, queue: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """`CE([u(q) u(k), u(q) queue^T] / temperature, 0)` of whole logits, and [2] shares of queries
    whose positive ranks first, and among the first five.

    Args:
        q: [B, D] raw queries.
        k: [B, D] raw keys.
        queue: [K, D] at unit length.
        temperature: > 0.
    """
    query, key = normalize(q, dim=1), normalize(k, dim=1)
    positive = (query * key).sum(1, keepdim=True)
    negatives = query @ queue.T.to(query.dtype)
    logits = torch.cat([positive, negatives], dim=1) / temperature
    labels = torch.zeros(len(query), dtype=torch.int64, device=query.device)
    before = (negatives >= positive).sum(1)
    shares = [(before < first).to(positive.dtype).mean() for first in (1, 5)]
    return cross_entropy(logits, labels), torch.stack(shares)


@torch.no_grad()
def write_keys_(
    queue: Tensor, pointer: Tensor, known: Tensor, keys: Tensor, skipped: Tensor | None
) -> None:
    """Write the keys of a step over the oldest rows; nothing where the step was skipped.

    The place is on the device, and so is the decision whether anything is written. A batch may pass
    the end of the queue: its place is that of a run with another batch.

    Args:
        queue: [..., K, D], one queue or several of one length.
        pointer: [1] int64, moves on by the number of keys, modulo K.
        known: [1] int64, rises to K.
        keys: [..., n, D] at unit length, of all ranks in their order; n <= K.
        skipped: one float on the device, above 0 for a skipped step; None: it was not judged.

    Raises:
        ValueError: if there are more keys than rows.
    """
    length, count = queue.shape[-2], keys.shape[-2]
    if count > length:
        raise ValueError(f"queue={length}: must have room for the {count} keys of a step")
    keys = keys.to(queue.dtype)
    rows = (pointer + torch.arange(count, device=keys.device)) % length
    moved = (pointer + count) % length
    filled = (known + count).clamp(max=length)
    if skipped is not None:
        bad = skipped > 0
        keys = torch.where(bad, queue.index_select(-2, rows), keys)
        moved = torch.where(bad, pointer, moved)
        filled = torch.where(bad, known, filled)
    queue.index_copy_(-2, rows, keys)
    pointer.copy_(moved)
    known.copy_(filled)


def require_whole_batches(queue: int, batch: int) -> None:
    """Refuse a queue that a batch would not fill evenly.

    Raises:
        ValueError: with a length that fits.
    """
    if queue % batch:
        raise ValueError(
            f"objective.queue={queue}: must be a multiple of global_batch_size={batch}, whose keys "
            f"replace the oldest ones in each step; take {max(1, round(queue / batch)) * batch}"
        )
