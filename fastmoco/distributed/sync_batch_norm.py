"""Batch normalisation over the batches of all ranks, on CPU and CUDA alike.

torch's own ``SyncBatchNorm`` refuses to train on CPU tensors, so nothing about it could be tested without GPUs, and
statistics that stay local change the loss by 0.1 and more without an error. Here one process uses torch's batch norm;
several processes sum over ranks in two passes, first the values, then the squares of the centred values: the second
pass costs one more small message and loses no digits to cancellation.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from fastmoco.distributed.mesh import group_size


class _NormaliseOverRanks(torch.autograd.Function):
    """y = (x - mean) / sqrt(var + eps) * weight + bias with mean and biased var over batch, positions and ranks.

    Forward sends [C + 1] and [C] numbers, backward [2, C]: with xhat = (y - bias) / weight and means over all ranks,
    dx = weight / sqrt(var + eps) * (dy - mean(dy) - xhat * mean(dy * xhat)). Gradients of weight and bias stay local,
    as every other parameter's: the data-parallel wrapper averages them.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        dims = [d for d in range(x.ndim) if d != 1]
        per_channel = [-1 if d == 1 else 1 for d in range(x.ndim)]
        wide = x.to(dtype)
        sums = torch.cat([wide.sum(dims), wide.new_full((1,), x.numel() // x.shape[1])])
        dist.all_reduce(sums)
        count = sums[-1]
        mean = sums[:-1] / count
        centred = wide - mean.view(per_channel)
        squares = centred.square().sum(dims)
        dist.all_reduce(squares)
        var = squares / count
        inverse_std = torch.rsqrt(var + eps)
        y = centred * inverse_std.view(per_channel)
        if weight is not None and bias is not None:
            y = y * weight.view(per_channel) + bias.view(per_channel)
        ctx.save_for_backward(x, mean, inverse_std, weight, count)
        ctx.mark_non_differentiable(mean, var, count)
        return y.to(x.dtype), mean, var, count

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        x, mean, inverse_std, weight, count = ctx.saved_tensors
        dims = [d for d in range(x.ndim) if d != 1]
        per_channel = [-1 if d == 1 else 1 for d in range(x.ndim)]
        dy = grads[0].to(mean.dtype)
        xhat = (x.to(mean.dtype) - mean.view(per_channel)) * inverse_std.view(per_channel)
        local = torch.stack([dy.sum(dims), (dy * xhat).sum(dims)])
        dbias, dweight = local if weight is not None else (None, None)
        over_ranks = local.clone()
        dist.all_reduce(over_ranks)
        mean_dy, mean_dy_xhat = (over_ranks / count).unbind()
        scale = inverse_std if weight is None else inverse_std * weight
        dx = (dy - mean_dy.view(per_channel) - xhat * mean_dy_xhat.view(per_channel)) * scale.view(per_channel)
        return dx.to(x.dtype), dweight, dbias, None, None


class BatchNorm(nn.Module):
    """Batch normalisation whose training statistics cover the batches of all ranks.

    Parameter and buffer names, defaults and the running averages are those of ``torch.nn.BatchNorm1d``. Statistics
    and arithmetic are at least float32 for half-precision inputs; the output has the input's dtype. ``running_var``
    averages the unbiased variance, n / (n - 1) times the biased one, n counting values over all ranks.

    Args:
        num_features: number of channels C of inputs [B, C] or [B, C, H, W].
        eps: added to the variance.
        averaging: share of the newest statistics in the running averages.
        affine: whether there are a trainable ``weight`` and ``bias`` [C].
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, num_features: int, *, eps: float = 1e-5, averaging: float = 0.1, affine: bool = True) -> None:
        super().__init__()
        self.num_features, self.eps, self.averaging = num_features, eps, averaging
        self.weight = nn.Parameter(torch.ones(num_features)) if affine else None
        self.bias = nn.Parameter(torch.zeros(num_features)) if affine else None
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))
        self.register_buffer("num_batches_tracked", torch.tensor(0, dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [B, C] or [B, C, H, W]: over the global batch in training, by the running averages otherwise.

        Raises:
            ValueError: if the channel count is not ``num_features``, or one process trains on one value per channel.
        """
        if x.ndim < 2 or x.shape[1] != self.num_features:
            raise ValueError(
                f"input shape={tuple(x.shape)}: needs [B, {self.num_features}] or [B, {self.num_features}, H, W]"
            )
        if self.training:
            self.num_batches_tracked.add_(1)
            if group_size() > 1:
                return self._normalise_over_ranks(x)
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training, self.averaging, self.eps
        )

    def _normalise_over_ranks(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, self.running_mean.dtype)
        outputs: tuple[Tensor, ...] = _NormaliseOverRanks.apply(x, self.weight, self.bias, self.eps, dtype)  # type: ignore[no-untyped-call]
        y, mean, var, count = outputs
        with torch.no_grad():
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.averaging)
            self.running_var.lerp_((var * (count / (count - 1))).to(self.running_var.dtype), self.averaging)
        return y

    def extra_repr(self) -> str:
        """What ``print(module)`` shows of it."""
        return f"{self.num_features}, eps={self.eps}, averaging={self.averaging}, affine={self.weight is not None}"
