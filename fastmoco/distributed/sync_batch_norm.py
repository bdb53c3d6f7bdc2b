"""Batch normalisation over the batches of all ranks, on CPU and CUDA.

torch's `SyncBatchNorm` does not train on CPU tensors, so it could not be tested without GPUs. Local
statistics would change the loss by 0.1 and more without an error. Here one process uses torch's
batch norm. Several processes exchange mean, centred squares and count of their parts in one message
per layer, for all views of a head together. They combine them as in Chan, Golub, LeVeque 1983,
without cancellation and with the same bits on all ranks.

MoCo v1 and v2 need statistics of few images instead: `local_statistics`. That is a property of the
call, not of a layer, so one encoder can be used both ways.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from fastmoco.distributed.gather import all_gather_single
from fastmoco.distributed.mesh import group_size

_PASS = threading.local()


def repeated_pass() -> AbstractContextManager[None]:
    """Within it, batch norms in training write no running averages.

    For a forward that the backward repeats (activation checkpointing): the first pass has counted
    the batch. Statistics are of the groups that are set where this function is called. The state
    is that of the thread, because the backward of a GPU has one of its own.
    """
    return _within(repeated=True, groups=_groups())


def local_statistics(groups: int = 1) -> AbstractContextManager[None]:
    """Within it, batch norms in training take the statistics of this rank's images alone.

    Ranks then exchange nothing, and their running averages differ.

    Args:
        groups: equal parts of this rank's batch, each with statistics of its own: neighbouring
            images, as if each part were on a rank of its own. If the batch cannot be divided, the
            first parts are larger by one. The running averages take the mean of the parts.

    Raises:
        ValueError: if there is no group.
    """
    if groups < 1:
        raise ValueError(f"groups={groups}: batch norms need at least 1 group of images")
    return _within(repeated=_is_repeated(), groups=groups)


@contextmanager
def _within(*, repeated: bool, groups: int) -> Iterator[None]:
    """How batch norms of this thread work, for a while."""
    before = _is_repeated(), _groups()
    _PASS.repeated, _PASS.groups = repeated, groups
    try:
        yield
    finally:
        _PASS.repeated, _PASS.groups = before


def _groups() -> int:
    """Groups of this rank's images; 0: statistics cover all ranks."""
    groups: int = getattr(_PASS, "groups", 0)
    return groups


def _is_repeated() -> bool:
    repeated: bool = getattr(_PASS, "repeated", False)
    return repeated


def _layout(x: Tensor) -> tuple[list[int], list[int]]:
    """The dimensions that a statistic covers, and the shape to broadcast channels to `x`."""
    channel = 2 if x.ndim == 3 else 1
    dims = [d for d in range(x.ndim) if d != channel and not (x.ndim == 3 and d == 0)]
    return dims, [-1 if d == channel else 1 for d in range(x.ndim)]


class _NormaliseOverRanks(torch.autograd.Function):
    """y = (x - mean) / sqrt(var + eps) * weight + bias with mean and biased var over batch,
    positions and ranks.

    With V batches in x (1, except for [V, B, C]), the forward sends V * 2C + 1 elements and the
    backward [2, V, C]: with xhat = (y - bias) / weight and means over all ranks, dx = weight /
    sqrt(var + eps) * (dy - mean(dy) - xhat * mean(dy * xhat)). Gradients of weight and bias stay
    local, as for every other parameter; the data-parallel wrapper averages them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        dims, per_channel = _layout(x)

        # Statistics of this rank's part, and those of all ranks in one message.
        wide = x.to(dtype)
        own_mean = wide.mean(dims, keepdim=True)
        own_squares = (wide - own_mean).square().sum(dims, keepdim=True)
        own_count = wide.new_full((1,), x.numel() // own_mean.numel())
        mine = torch.cat([own_mean.flatten(), own_squares.flatten(), own_count])
        parts = mine.new_empty(group_size() * mine.numel())
        all_gather_single(parts, mine)
        parts = parts.view(-1, mine.numel())

        # Combined as in Chan, Golub, LeVeque 1983.
        counts = parts[:, -1:]
        means, squares = parts[:, :-1].chunk(2, dim=1)
        count = counts.sum()
        mean = (means * counts).sum(0) / count
        var = (squares + counts * (means - mean).square()).sum(0) / count

        inverse_std = torch.rsqrt(var + eps).view_as(own_mean)
        y = (wide - mean.view_as(own_mean)) * inverse_std
        if weight is not None:
            y = y * weight.view(per_channel)
        if bias is not None:
            y = y + bias.view(per_channel)
        ctx.save_for_backward(x, mean.view_as(own_mean), inverse_std, weight, count)
        by_batch = (-1, x.shape[per_channel.index(-1)])
        mean, var = mean.view(by_batch), var.view(by_batch)
        ctx.biased = bias is not None
        ctx.mark_non_differentiable(mean, var, count)
        return y.to(x.dtype), mean, var, count

    @staticmethod
    def backward(
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        x, mean, inverse_std, weight, count = ctx.saved_tensors
        dims, per_channel = _layout(x)
        dy = grads[0].to(mean.dtype)
        xhat = (x.to(mean.dtype) - mean) * inverse_std
        sums = torch.stack([dy.sum(dims, keepdim=True), (dy * xhat).sum(dims, keepdim=True)])
        dbias = dweight = None
        if weight is not None:
            dbias, dweight = sums.view(2, -1, weight.numel()).sum(1).to(weight.dtype)
            dbias = dbias if ctx.biased else None
        dist.all_reduce(sums)
        mean_dy, mean_dy_xhat = (sums / count).unbind()
        scale = inverse_std if weight is None else inverse_std * weight.view(per_channel)
        dx = (dy - mean_dy - xhat * mean_dy_xhat) * scale
        return dx.to(x.dtype), dweight, dbias, None, None


class BatchNorm(nn.Module):
    """Batch normalisation whose training statistics cover the batches of all ranks, or groups of
    this rank's images within `local_statistics`.

    Inputs [V, B, C] are V separate batches: the result, buffers included, equals that of V calls in
    turn, with a single message between ranks. Names of parameters and buffers, defaults and running
    averages are those of `torch.nn.BatchNorm1d`. Statistics and arithmetic are at least float32 for
    16-bit inputs; the output has the input's dtype. `running_var` averages the unbiased variance, n
    / (n - 1) times the biased one, where n counts all ranks.

    Args:
        num_features: number of channels C of inputs [B, C], [V, B, C] or [B, C, H, W].
        eps: added to the variance.
        averaging: share of the newest statistics in the running averages.
        affine: whether there is a trainable `weight` [C].
        bias: whether a trainable `bias` [C] belongs to it.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self,
        num_features: int,
        *,
        eps: float = 1e-5,
        averaging: float = 0.1,
        affine: bool = True,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.num_features = num_features
        self.eps = eps
        self.averaging = averaging
        self.weight = nn.Parameter(torch.ones(num_features)) if affine else None
        self.bias = nn.Parameter(torch.zeros(num_features)) if affine and bias else None
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))
        self.register_buffer("num_batches_tracked", torch.tensor(0, dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [B, C], [V, B, C] or [B, C, H, W]: over the global batch in training, else by
        the running averages.

        Raises:
            ValueError: if the channel count is not `num_features`, or a single process trains on
                one value per channel.
        """
        C = self.num_features
        if not 2 <= x.ndim <= 4 or x.shape[2 if x.ndim == 3 else 1] != C:
            raise ValueError(
                f"input shape={tuple(x.shape)}: needs [B, {C}], [V, B, {C}] or [B, {C}, H, W]"
            )
        if self.training:
            if not _is_repeated():
                self.num_batches_tracked.add_(len(x) if x.ndim == 3 else 1)
            if _groups() > 1:
                batches = x.unbind() if x.ndim == 3 else (x,)
                normed = [self._normalise_in_groups(batch, _groups()) for batch in batches]
                return torch.stack(normed) if x.ndim == 3 else normed[0]
            if group_size() > 1 and not _groups():
                return self._normalise_over_ranks(x)
        if x.ndim == 3:
            return torch.stack([self._normalise_here(batch) for batch in x.unbind()])
        return self._normalise_here(x)

    def _normalise_here(self, x: Tensor) -> Tensor:
        # Sharded training gathers weights in bf16; torch needs them as wide as the statistics.
        dtype = self.running_mean.dtype
        weight, bias = (None if p is None else p.to(dtype) for p in (self.weight, self.bias))
        averages = (self.running_mean, self.running_var)
        if self.training and _is_repeated():  # the same call, written to copies
            averages = (self.running_mean.clone(), self.running_var.clone())
        return F.batch_norm(
            x,
            *averages,
            weight,
            bias,
            self.training,
            self.averaging,
            self.eps,
        )

    def _normalise_in_groups(self, x: Tensor, groups: int) -> Tensor:
        """Each part of one batch by its own statistics."""
        dtype = self.running_mean.dtype
        weight, bias = (None if p is None else p.to(dtype) for p in (self.weight, self.bias))
        parts, statistics = [], []
        for part in x.tensor_split(groups):
            # With all the weight on the newest batch, the averages are its statistics.
            own = torch.zeros_like(self.running_mean), torch.ones_like(self.running_var)
            parts.append(F.batch_norm(part, *own, weight, bias, True, 1.0, self.eps))
            statistics.append(torch.stack(own))
        if not _is_repeated():
            with torch.no_grad():
                mean, var = torch.stack(statistics).mean(0)
                self.running_mean.lerp_(mean, self.averaging)
                self.running_var.lerp_(var, self.averaging)
        return torch.cat(parts)

    def _normalise_over_ranks(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, self.running_mean.dtype)
        outputs: tuple[Tensor, ...] = _NormaliseOverRanks.apply(
            x, self.weight, self.bias, self.eps, dtype
        )  # type: ignore[no-untyped-call]
        y, means, variances, count = outputs
        if _is_repeated():
            return y
        with torch.no_grad():
            for mean, var in zip(means, variances * (count / (count - 1)), strict=True):
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.averaging)
                self.running_var.lerp_(var.to(self.running_var.dtype), self.averaging)
        return y

    def extra_repr(self) -> str:
        """Arguments for `print(module)`."""
        affine = self.weight is not None
        return f"{self.num_features}, eps={self.eps}, averaging={self.averaging}, affine={affine}"
