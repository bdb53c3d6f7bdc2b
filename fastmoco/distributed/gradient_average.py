"""Accumulate gradients locally over several backward passes, and average them over ranks once.

`DistributedDataParallel` averages in every backward. A step in micro-batches would then all-reduce
the whole model once for each of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastmoco.distributed.mesh import group_size
from fastmoco.distributed.sharding import is_sharded, trunk_units, units_of

BUCKET_BYTES = 32 * 2**20
"""Bytes of gradients in one message: large enough for the network, small compared with the
model."""


class GradientAverage:
    """Averages gradients over ranks after the last backward pass of a step.

    Use `with average.local(): ...` around every backward but the last, and
    `with average.last(): ...` around the last one. Afterwards `grad` of every trainable parameter
    is the mean of the sums of all ranks, with the same bits on all of them.

    Args:
        module: with the same trainable parameters in the same order on every rank; each must get a
            gradient.
    """

    def __init__(self, module: nn.Module) -> None:
        self._named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]

    @contextmanager
    def local(self) -> Iterator[None]:
        """A backward pass whose gradients are accumulated in this process only."""
        yield

    @contextmanager
    def last(self) -> Iterator[None]:
        """The backward pass that completes the gradients.

        Raises:
            RuntimeError: naming the first trainable parameter without a gradient. Other ranks would
                wait for it, or use the gradient of another parameter instead.
        """
        yield
        if group_size() > 1:
            for bucket in _buckets(self._gradients()):
                _average_(bucket)

    def _gradients(self) -> Iterator[Tensor]:
        for name, parameter in self._named:
            if parameter.grad is None:
                raise RuntimeError(
                    f"{name} has no gradient: "
                    "every trainable parameter must take part in every step"
                )
            yield parameter.grad


class ShardedGradientAverage:
    """The same for a model under FSDP2.

    Gradients of the trunk are accumulated unsharded, in float32 and in this process, until the last
    backward, and are then reduced into the shards. The heads have one backward per step and are
    reduced in it.

    Args:
        objective: an `Objective` after `parallelize`. All ranks must use the same micro-batches,
            because FSDP2 gathers weights in each of them.
    """

    def __init__(self, objective: Any) -> None:
        networks: dict[str, Any] = dict(objective.networks())
        if objective.coupling == "none":  # heads have a backward per micro-batch, too
            self._roots = [
                net for net in networks.values() if any(p.requires_grad for p in net.parameters())
            ]
            self._units = [unit for root in self._roots for unit in units_of(root)]
        else:
            trunks = objective.trunks()
            self._roots = [networks[name] for name in trunks]
            self._units = [
                unit
                for name, parts in trunks.items()
                for unit in trunk_units(networks[name], parts)
            ]

    @contextmanager
    def local(self) -> Iterator[None]:
        """A backward pass whose trunk gradients are accumulated in this process only."""
        self._set(last=False)
        yield

    @contextmanager
    def last(self) -> Iterator[None]:
        """The backward pass that completes the gradients."""
        self._set(last=True)
        yield

    def _set(self, *, last: bool) -> None:
        for root in self._roots:
            root.set_is_last_backward(last)
        for unit in self._units:
            unit.set_requires_gradient_sync(last, recurse=False)


def gradient_average(objective: Any) -> GradientAverage | ShardedGradientAverage:
    """The gradient average for an objective, sharded or not."""
    return (
        ShardedGradientAverage(objective) if is_sharded(objective) else GradientAverage(objective)
    )


def _buckets(gradients: Iterator[Tensor]) -> Iterator[list[Tensor]]:
    """Consecutive gradients of one dtype, up to `BUCKET_BYTES` together.

    A larger tensor has its own bucket.
    """
    bucket: list[Tensor] = []
    size = 0
    for gradient in gradients:
        if bucket and (size + gradient.nbytes > BUCKET_BYTES or gradient.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(gradient)
        size += gradient.nbytes
    if bucket:
        yield bucket


def _average_(bucket: list[Tensor]) -> None:
    """Replace each tensor by its mean over ranks."""
    flat = torch.cat([gradient.reshape(-1) for gradient in bucket]).div_(group_size())
    dist.all_reduce(flat)
    means = flat.split([gradient.numel() for gradient in bucket])  # type: ignore[no-untyped-call]
    torch._foreach_copy_(
        bucket, [mean.view_as(gradient) for mean, gradient in zip(means, bucket, strict=True)]
    )
