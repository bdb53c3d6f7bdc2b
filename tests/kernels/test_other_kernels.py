"""Attention by other people's kernels against the reference in value and every gradient; what of
xformers a CPU can tell.

On a GPU every backend that can be imported is run; the others are counted as skipped, with what
they lack.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastmoco_kernels import attention
from fastmoco_kernels.attention.choice import choose_attention, require_xformers

OTHERS = ("sdpa", "flash", "cudnn", "efficient", "fa4", "xformers")


@pytest.fixture
def xformers():
    """The real module; skipped with the reason where it is not installed, of another version, or
    does not import."""
    try:
        require_xformers()
    except ValueError as error:
        pytest.skip(str(error))
    pytest.importorskip("xformers.ops", exc_type=ImportError)
    import xformers.ops

    # Its backward has no deterministic kernel and refuses to run where one is asked for, as
    # conftest.py does.
    torch.use_deterministic_algorithms(False)
    return xformers.ops


def _inputs(*shape: int, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """q, k, v, and the gradient that comes back, from one seed."""
    generator = torch.Generator("cuda").manual_seed(0)
    return [torch.randn(shape, device="cuda", generator=generator).to(dtype) for _ in range(4)]


def _check(found: list[Tensor], exact: list[Tensor]) -> None:
    """bf16 rounds weights and results to 2^-9; the limit is on the whole tensor."""
    for name, mine, true in zip(("out", "dq", "dk", "dv"), found, exact, strict=True):
        assert mine.dtype == torch.bfloat16, name
        error = ((mine.double() - true).norm() / true.norm()).item()
        assert error <= 1.5e-2, f"{name}: {error:.1e}"


@pytest.mark.gpu
@pytest.mark.parametrize("backend", OTHERS)
@pytest.mark.parametrize("head_dim", [32, 64])
@pytest.mark.parametrize("packed_projection", [False, True])
def test_every_kernel_that_is_here_is_right_both_ways(
    backend, head_dim, packed_projection, request
):
    """Contiguous tensors, and views of one projection [B, L, 3, A, d] as a block of a vision
    transformer makes them."""
    if backend == "xformers":
        request.getfixturevalue("xformers")
    device = torch.device("cuda", torch.cuda.current_device())
    try:
        choose_attention(device, torch.bfloat16, 197, 197, head_dim, backend=backend)
    except ValueError as error:
        pytest.skip(str(error))
    q, k, v, gradient = _inputs(4, 6, 197, head_dim)
    exact_leaves = [t.double().requires_grad_() for t in (q, k, v)]
    exact = attention(*exact_leaves, backend="reference")
    truth = [exact.detach(), *torch.autograd.grad(exact, exact_leaves, gradient.double())]
    if packed_projection:
        qkv = torch.stack([q, k, v]).permute(1, 3, 0, 2, 4).contiguous().requires_grad_()
        out = attention(*(t.transpose(1, 2) for t in qkv.unbind(2)), backend=backend)
        (grad,) = torch.autograd.grad(out, [qkv], gradient)
        grads = [t.transpose(1, 2) for t in grad.unbind(2)]
    else:
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        out = attention(*leaves, backend=backend)
        grads = list(torch.autograd.grad(out, leaves, gradient))
    _check([out.detach(), *grads], truth)


def _arguments(head_dim: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """What `attention_by_xformers` hands over, on the meta device: views of one packed
    projection."""
    qkv = torch.empty(4, 197, 3, 6, head_dim, dtype=dtype, device="meta")
    heads_first = (t.transpose(1, 2) for t in qkv.unbind(2))
    return dict(
        zip(("query", "key", "value"), (t.transpose(1, 2) for t in heads_first), strict=True)
    )


def _operators() -> list[object]:
    from xformers.ops.fmha import cutlass, flash

    return [flash.FwOp, flash.BwOp, cutlass.FwOp, cutlass.BwOp]


def _objections(operator, inputs) -> list[str]:
    """Why an operator does not take a call, apart from where this machine is: no CUDA, tensors on
    another device."""
    elsewhere = ("device=", "requires device with capability", "CUDA", "cuda", "A100+ GPUs")
    return [
        reason
        for reason in operator.not_supported_reasons(inputs)
        if not any(w in reason for w in elsewhere)
    ]


@pytest.mark.parametrize("head_dim", [32, 64])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_real_xformers_has_no_objection_to_our_arguments(xformers, head_dim, dtype):
    """Its own checks of shapes, strides and types, forward and backward, for both kernels that it
    may take."""
    from xformers.ops.fmha import Inputs

    tensors = _arguments(head_dim, dtype)
    inputs = Inputs(**tensors)
    inputs.validate_inputs()
    for operator in _operators():
        assert operator.OPERATOR is not None, f"{operator.NAME} has no kernel here"
        assert _objections(operator, inputs) == [], operator.NAME
    wrong = Inputs(**{name: t[..., ::2] for name, t in tensors.items()})
    assert all(_objections(operator, wrong) for operator in _operators()), (
        "a stride of 2 must be objected to"
    )
