"""LARS by torch's own multi-tensor functions: the path of every device without Triton.

T tensors; `squares_T2` holds `||p||^2` and `||g + weight_decay * p||^2` of each in float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def squares_foreach(
    params: Sequence[Tensor], grads: Sequence[Tensor], weight_decay: float, adapt: Sequence[bool]
) -> Tensor:
    """`squares_T2`; 0 where nothing is scaled: tensors that are not adapted, empty shards."""
    squares_T2 = torch.zeros(len(params), 2, dtype=torch.float64, device=params[0].device)
    scaled = [i for i, param in enumerate(params) if adapt[i] and param.numel()]
    if scaled:
        weights = [params[i] for i in scaled]
        decayed = torch._foreach_add(_as_params(params, grads, scaled), weights, alpha=weight_decay)
        norms = torch._foreach_norm([*weights, *decayed], 2, dtype=torch.float64)
        squares_T2[scaled] = torch.stack(list(norms)).view(2, -1).T.square()
    return squares_T2


def update_foreach_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    squares_T2: Tensor,
    lr: Tensor,
    adapt: Sequence[bool],
    *,
    momentum: float,
    weight_decay: float,
    trust_coefficient: float,
    found_inf: Tensor | None,
    lr_in_buffer: bool = False,
) -> None:
    """The update, given norms of whole tensors.

    Reads `found_inf` on the host, and `lr` if it is there.
    """
    if found_inf is not None and bool(found_inf != 0):
        return
    updates = _as_params(params, grads, range(len(params)))
    scaled = [i for i, adapted in enumerate(adapt) if adapted]
    if scaled:
        ratios = trust_ratios(squares_T2, trust_coefficient)[scaled].unbind()
        decayed = torch._foreach_add(
            [updates[i] for i in scaled], [params[i] for i in scaled], alpha=weight_decay
        )
        torch._foreach_mul_(decayed, ratios)
        for i, update in zip(scaled, decayed, strict=True):
            updates[i] = update
    buffers = list(momentum_buffers)
    torch._foreach_mul_(buffers, momentum)
    if lr_in_buffer:
        if lr.is_cuda:
            torch._foreach_add_(buffers, torch._foreach_mul(updates, lr.reshape(())))
        else:
            torch._foreach_add_(buffers, updates, alpha=lr.item())
        torch._foreach_sub_(list(params), buffers)
        return
    torch._foreach_add_(buffers, updates)
    if lr.is_cuda:
        torch._foreach_sub_(list(params), torch._foreach_mul(buffers, lr.reshape(())))
    else:
        torch._foreach_add_(list(params), buffers, alpha=-lr.item())


def trust_ratios(squares_T2: Tensor, trust_coefficient: float) -> Tensor:
    """[T] float64: `trust * ||p|| / ||g + weight_decay * p||`, and 1 where either norm is 0."""
    param_T, update_T = squares_T2.sqrt().unbind(1)
    both = (param_T > 0) & (update_T > 0)
    return torch.where(both, trust_coefficient * param_T / update_T, torch.ones_like(param_T))


def _as_params(
    params: Sequence[Tensor], grads: Sequence[Tensor], chosen: Sequence[int]
) -> list[Tensor]:
    """The chosen gradients in their parameters' dtype."""
    return [grads[i].to(params[i].dtype) for i in chosen]
