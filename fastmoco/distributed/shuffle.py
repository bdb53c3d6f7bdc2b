"""Images in another order over all ranks, and what was computed of them back to their owners.

For batch norms of few images, which would otherwise tell an image from its neighbours (He, Fan, Wu,
Xie, Girshick 2020, section 3.3). The official code gathers the images of all ranks on each; here a
rank receives only those that it encodes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from fastmoco.distributed.mesh import group_rank, group_size
from fastmoco_kernels.tensors import sent


class Shuffle:
    """An exchange of rows among ranks by a permutation that all of them know.

    Args:
        order: [N] int64, N = B * ranks: number of the row of the global batch that is at each
            place. Rank r works on places r * B to (r + 1) * B.
        device: of the rows.

    Raises:
        ValueError: if `order` is not a permutation, or N is no multiple of the number of ranks.
    """

    def __init__(self, order: np.ndarray, device: torch.device) -> None:
        ranks, rank = group_size(), group_rank()
        if not np.array_equal(np.sort(order), np.arange(len(order))) or len(order) % ranks:
            raise ValueError(
                f"order of {len(order)} rows: must be a permutation of the rows of {ranks} ranks, "
                "which have equally many"
            )
        each = len(order) // ranks
        places = order.reshape(ranks, each)
        owners = places // each

        # To whom this rank sends which of its rows, and from whom the row of each place comes.
        leaving = [places[to][owners[to] == rank] - rank * each for to in range(ranks)]
        self._leaving = [len(rows) for rows in leaving]
        self._arriving = [int((owners[rank] == source).sum()) for source in range(ranks)]
        arrived = np.argsort(owners[rank], kind="stable")
        self._sent, self._arrived = (
            _Order(rows, device) for rows in (np.concatenate(leaving), arrived)
        )

    def there(self, rows: Tensor) -> Tensor:
        """The rows at this rank's places, [B, ...], from this rank's own rows, [B, ...]."""
        return self._arrived.undone(_exchange(self._sent.done(rows), self._leaving, self._arriving))

    def back(self, rows: Tensor) -> Tensor:
        """What belongs to this rank's own rows, [B, ...], from what belongs to its places."""
        return self._sent.undone(_exchange(self._arrived.done(rows), self._arriving, self._leaving))


class _Order:
    """An order of a rank's rows, on the device."""

    def __init__(self, order: np.ndarray, device: torch.device) -> None:
        self._done, self._undone = (
            sent(torch.from_numpy(rows), device) for rows in (order, np.argsort(order))
        )

    def done(self, rows: Tensor) -> Tensor:
        return rows[self._done]

    def undone(self, rows: Tensor) -> Tensor:
        return rows[self._undone]


def _exchange(rows: Tensor, leaving: Sequence[int], arriving: Sequence[int]) -> Tensor:
    """Rows in the order of the ranks to which they go -> in that of those from which they come."""
    if group_size() == 1:
        return rows
    # As bytes: gloo does not know every dtype.
    flat = rows.reshape(len(rows), -1).view(torch.uint8)
    received = flat.new_empty((sum(arriving), flat.shape[1]))
    dist.all_to_all_single(received, flat, list(arriving), list(leaving))
    return received.view(rows.dtype).view(-1, *rows.shape[1:])


def copy_of_first_rank_(tensors: Sequence[Tensor]) -> None:
    """Overwrite tensors of one dtype by those of rank 0, in place, by one message."""
    if group_size() == 1 or not tensors:
        return
    flat = torch.cat([tensor.detach().reshape(-1) for tensor in tensors])
    dist.broadcast(flat, src=0)
    parts = flat.split([tensor.numel() for tensor in tensors])  # type: ignore[no-untyped-call]
    with torch.no_grad():
        torch._foreach_copy_(
            list(tensors), [part.view_as(t) for part, t in zip(parts, tensors, strict=True)]
        )
