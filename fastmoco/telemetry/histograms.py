"""Histograms of gradients at sparse log steps, counted on the device.

Each place in the network has one, of at most `MOST_VALUES` of its values, evenly spaced. The counts
are copied to the host behind the work of the step, and the one wait of the log step covers them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from fastmoco.telemetry.trackers.interface import Histogram
from fastmoco_kernels.tensors import local, sent

MOST_VALUES = 1 << 16
"""Values of a place that are counted."""
_DECADES, _PER_DECADE = (-10, 2), 4
_POWERS = range(_DECADES[0] * _PER_DECADE, _DECADES[1] * _PER_DECADE + 1)
_POSITIVE = [10.0 ** (power / _PER_DECADE) for power in _POWERS]
EDGES = [-edge for edge in reversed(_POSITIVE)] + _POSITIVE
"""Inner edges, fixed, so that no count waits for the range of the values: 1e-10 to 100, four a
factor of ten, on both sides of zero."""


class GradientHistograms:
    """Histograms of every n-th log step of one process.

    Args:
        every: log steps between two histograms, the first log step has one; 0: none.
    """

    def __init__(self, *, every: int) -> None:
        self._every = every
        self._logged = 0
        self._names: list[str] = []
        self._counts: Tensor | None = None

    def due(self) -> bool:
        """Whether this log step has histograms; to be called at each, once."""
        self._logged += 1
        return self._every > 0 and (self._logged - 1) % self._every == 0

    @torch.no_grad()
    def take(
        self, gradients: Iterable[tuple[str, Tensor]], places: Mapping[str, tuple[str, ...]]
    ) -> None:
        """Count gradients on their device, without waiting for it.

        Args:
            gradients: by name, any floating dtype; of a sharded one this rank's part counts.
            places: parameter name -> places.
        """
        by_place: dict[str, list[Tensor]] = {}
        for name, gradient in gradients:
            (own,) = local([gradient.detach()])
            for place in places.get(name, ()) if own.numel() else ():
                by_place.setdefault(place, []).append(own.reshape(-1))
        if not by_place:
            return
        self._names = list(by_place)
        device = next(iter(by_place.values()))[0].device
        edges = sent(torch.tensor(EDGES, dtype=torch.float64), device)
        counts = torch.stack([_counted(values, edges) for values in by_place.values()])
        if counts.is_cuda:
            # Pinned, so that the copy joins the queue of the device and the host goes on.
            self._counts = torch.empty(counts.shape, dtype=counts.dtype, pin_memory=True)
            self._counts.copy_(counts, non_blocking=True)
        else:
            self._counts = counts

    def fetched(self) -> dict[str, Histogram]:
        """The histograms of `take` by name, after a wait for the device; {} if there are none. A
        place with a value that is not finite has none: its norm tells of it."""
        counts, self._counts = self._counts, None
        if counts is None:
            return {}
        made = (_histogram(row) for row in counts.tolist())
        names = [f"gradients/{name}" for name in self._names]
        return {name: one for name, one in zip(names, made, strict=True) if one is not None}


def _counted(gradients: list[Tensor], edges: Tensor) -> Tensor:
    """[5 + len(EDGES)] float64 of flat gradients: how many values, smallest, largest, sum, sum of
    squares, and how many are below each edge. Sorted, so the counts are the same each time."""
    total = sum(len(gradient) for gradient in gradients)
    stride = -(-total // MOST_VALUES)
    parts, start = [], 0
    for gradient in gradients:  # the stride goes on from one to the next
        parts.append(gradient[start::stride])
        start = (start - len(gradient)) % stride
    values = torch.cat(parts).double().sort().values
    below = torch.searchsorted(values, edges).double()
    count = torch.full_like(values[0], float(len(values)))
    head = torch.stack([count, values[0], values[-1], values.sum(), values.square().sum()])
    return torch.cat([head, below])


def _histogram(row: list[float]) -> Histogram | None:
    """The counts between edges, without empty ones at both ends."""
    count, low, high, total, squares, *below = row
    if not all(map(math.isfinite, (low, high, total))):
        return None
    counts = [b - a for a, b in zip([0.0, *below], [*below, count], strict=True)]
    edges = [min(low, EDGES[0]), *EDGES, max(high, EDGES[-1])]
    first = next(i for i, found in enumerate(counts) if found)
    last = max(i for i, found in enumerate(counts) if found)
    return Histogram(
        edges=edges[first : last + 2],
        counts=counts[first : last + 1],
        total=total,
        squares=squares,
    )
