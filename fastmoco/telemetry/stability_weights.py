"""What weights show of the health of a run: how far a step moved them, and how far the encoder is
from its momentum encoder.

Read in log steps only. Everything stays on the device, and nothing here waits for it.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from fastmoco_kernels.tensors import local, sums_over_shards

CHUNK_BYTES = 16 * 2**20
"""Of differences that are in memory at once."""


class UpdateRatios:
    """Norm of a step's update as a share of the norm of the weights, by place in the network.

    The update is the difference of the weights after and before the optimizer, so it is right for
    every optimizer, with weight decay and clipping. Between the two calls the weights that have a
    place are in memory twice.

    Args:
        trainable: parameters by name, after sharding.
        places: parameter name -> places in which it counts (`Objective.places`).
    """

    def __init__(
        self, trainable: Mapping[str, nn.Parameter], places: Mapping[str, tuple[str, ...]]
    ) -> None:
        groups: dict[tuple[str, Hashable], list[Tensor]] = {}
        for name, parameter in trainable.items():
            for place in places.get(name, ()):
                groups.setdefault((place, _sharding(parameter)), []).append(parameter)
        self._places = [place for place, _ in groups]
        self._groups = list(groups.values())
        self._before: list[Tensor] = []

    @torch.no_grad()
    def begin(self) -> None:
        """Copy the weights: call it before the optimizer."""
        self._before = [_flat(group) for group in self._groups]

    @torch.no_grad()
    def finish(self) -> dict[str, Tensor]:
        """The ratios since `begin`: call it after the optimizer.

        Returns:
            `update_ratio/PLACE` -> a scalar on the device, float64, at least 0; 0 where no weight has
            moved, infinite where all were 0 and have, NaN where weights are not finite. For sharded
            weights that of the whole ones: one small collective, so all ranks must call.
        """
        if not self._before:
            return {}
        weights = torch.stack([_square_sum(before) for before in self._before])
        updates = torch.stack(
            [
                _square_sum(before.sub_(_flat(group)))
                for before, group in zip(self._before, self._groups, strict=True)
            ]
        )
        self._before = []
        owners = [group[0] for group in self._groups]
        updates, weights = sums_over_shards([updates, weights], [*owners, *owners])

        # A place has several groups if its weights are sharded in several ways.
        rows: dict[str, list[int]] = {}
        for row, place in enumerate(self._places):
            rows.setdefault(place, []).append(row)
        moved = {place: _sum_of(updates, of) for place, of in rows.items()}
        return {
            f"update_ratio/{place}": torch.where(
                moved[place] == 0, 0.0, moved[place] / _sum_of(weights, of)
            ).sqrt()
            for place, of in rows.items()
        }


def ema_distance(averages: Iterable[tuple[Tensor, Tensor]]) -> Tensor | None:
    """Distance of the averages from their weights, as a share of the norm of the weights.

    Args:
        averages: (weight, average) of equal shapes and shardings, plain or DTensors. For DTensors
            one small collective per call, so all ranks must call.

    Returns:
        Scalar float64 on the device, no host sync; None without averages.
    """
    groups: dict[Hashable, list[tuple[Tensor, Tensor]]] = {}
    for weight, average in averages:
        groups.setdefault(_sharding(weight), []).append((weight, average))
    if not groups:
        return None
    apart, norms, owners = [], [], []
    with torch.no_grad():
        for pairs in groups.values():
            for first, end in pairwise(_bounds([weight for weight, _ in pairs])):
                own = _flat([weight for weight, _ in pairs[first:end]])
                norms.append(_square_sum(own))
                apart.append(_square_sum(own.sub_(_flat([a for _, a in pairs[first:end]]))))
                owners.append(pairs[0][0])
        distance, norm = sums_over_shards(
            [torch.stack(apart), torch.stack(norms)], [*owners, *owners]
        )
        return (distance.sum() / norm.sum().clamp_min(1e-30)).sqrt()


def batch_norm_drift(pairs: Sequence[tuple[nn.Module, nn.Module]]) -> Tensor | None:
    """How far the running statistics of the momentum encoder's batch norms are from the encoder's.

    The root mean square over channels of two differences: of the means, in standard deviations of
    the encoder; and of the logarithms of the standard deviations. 0: equal statistics; 1: shifted
    by a standard deviation, or 2.7 times as wide.

    Args:
        pairs: (batch norm of the encoder, the same one of the momentum encoder).

    Returns:
        Scalar float32 on the device, no host sync; None without pairs.
    """
    if not pairs:
        return None
    with torch.no_grad():
        own, other = (_statistics(side) for side in zip(*pairs, strict=True))
        variance, wide = (side[1] + 1e-5 for side in (own, other))
        shift = (other[0] - own[0]).square() / variance
        stretch = (0.5 * (wide.log() - variance.log())).square()
        return (shift + stretch).mean().sqrt()


def _statistics(norms: Iterable[nn.Module]) -> tuple[Tensor, Tensor]:
    """Running means and variances of all channels."""
    norms = list(norms)
    means, variances = (
        torch.cat([getattr(norm, name).float() for norm in norms])
        for name in ("running_mean", "running_var")
    )
    return means, variances


def _sharding(tensor: Tensor) -> Hashable:
    """Equal for tensors that are sharded in the same way; (None, None) of plain ones."""
    return getattr(tensor, "device_mesh", None), getattr(tensor, "placements", None)


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    """A copy of this rank's parts of some tensors, one after the other."""
    return torch.cat([part.detach().reshape(-1) for part in local(tensors)])


def _square_sum(flat: Tensor) -> Tensor:
    """The sum of squares, a scalar float64; accumulated in float32 or wider."""
    wide = torch.promote_types(flat.dtype, torch.float32)
    norm: Tensor = torch.linalg.vector_norm(flat, dtype=wide)
    return norm.double().square()


def _sum_of(sums: Tensor, rows: Sequence[int]) -> Tensor:
    """The sum of some of them. Views: a list as an index would be copied to the device."""
    return torch.stack([sums[row] for row in rows]).sum()


def _bounds(tensors: Sequence[Tensor]) -> list[int]:
    """Where to cut a list so that each part is of about `CHUNK_BYTES`."""
    cuts, size = [0], 0
    for number, tensor in enumerate(tensors):
        size += tensor.numel() * tensor.element_size()
        if size >= CHUNK_BYTES or number == len(tensors) - 1:
            cuts.append(number + 1)
            size = 0
    return cuts
