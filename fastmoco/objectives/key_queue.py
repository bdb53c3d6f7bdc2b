"""Queues of the keys of earlier batches, which are negatives: what objectives that have one share.

A queue is a buffer, equal on all ranks, of rows at unit length. `pointer` is the row that is
written next, `known` is how many rows are keys; the others are random directions still.
"""

from __future__ import annotations

import torch
from torch import Tensor


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
