"""Attention by other people's kernels against the reference in value and every gradient; what of xformers a CPU can tell.

On a GPU every backend that can be imported is run; the others are counted as skipped, with what they lack.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastmoco_kernels import attention, packed_attention
from fastmoco_kernels.attention import packed
from fastmoco_kernels.attention.choice import choose_attention, require_xformers
from fastmoco_kernels.attention.packed import packed_by_xformers

LENGTHS = [197, 50, 3, 145, 197]
OTHERS = ("sdpa", "flash", "cudnn", "efficient", "fa4", "xformers")


@pytest.fixture
def xformers():
    """The real module; skipped with the reason where it is not installed, of another version, or does not import."""
    try:
        require_xformers()
    except ValueError as error:
        pytest.skip(str(error))
    pytest.importorskip("xformers.ops", exc_type=ImportError)
    import xformers.ops

    packed._block_diagonal.cache_clear()
    # Its packed backward has no deterministic kernel and refuses to run where one is asked for, as conftest.py does.
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
def test_every_kernel_that_is_here_is_right_both_ways(backend, head_dim, packed_projection, request):
    """Contiguous tensors, and views of one projection [B, L, 3, A, d] as a block of a vision transformer makes them."""
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


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["varlen", "xformers"])
@pytest.mark.parametrize("head_dim", [32, 64])
def test_packed_sequences_are_right_both_ways(backend, head_dim, request):
    if backend == "xformers":
        request.getfixturevalue("xformers")
    elif not packed._has_varlen():
        pytest.skip(f"torch {torch.__version__} has no torch.nn.attention.varlen")
    q, k, v, gradient = _inputs(sum(LENGTHS), 6, head_dim)
    results = []
    for name, dtype in ((backend, torch.bfloat16), ("loop", torch.float64)):
        leaves = [t.to(dtype, copy=True).requires_grad_() for t in (q, k, v)]
        out = packed_attention(*leaves, LENGTHS, backend=name)
        results.append([out.detach(), *torch.autograd.grad(out, leaves, gradient.to(dtype))])
    _check(*results)


@pytest.mark.gpu
def test_the_mask_of_one_device_is_made_once(xformers):
    q = _inputs(sum(LENGTHS), 2, 32)[0]
    packed_by_xformers(q, q, q, LENGTHS)
    packed_by_xformers(q, q, q, tuple(LENGTHS))
    assert packed._block_diagonal.cache_info().misses == 1


def _arguments(head_dim: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """What `attention_by_xformers` hands over, on the meta device: views of one packed projection."""
    qkv = torch.empty(4, 197, 3, 6, head_dim, dtype=dtype, device="meta")
    heads_first = (t.transpose(1, 2) for t in qkv.unbind(2))
    return dict(zip(("query", "key", "value"), (t.transpose(1, 2) for t in heads_first), strict=True))


def _operators() -> list[object]:
    from xformers.ops.fmha import cutlass, flash

    return [flash.FwOp, flash.BwOp, cutlass.FwOp, cutlass.BwOp]


def _objections(operator, inputs) -> list[str]:
    """Why an operator does not take a call, apart from where this machine is: no CUDA, tensors on another device."""
    elsewhere = ("device=", "requires device with capability", "CUDA", "cuda", "A100+ GPUs")
    return [reason for reason in operator.not_supported_reasons(inputs) if not any(w in reason for w in elsewhere)]


@pytest.mark.parametrize("head_dim", [32, 64])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
def test_the_real_xformers_has_no_objection_to_our_arguments(xformers, head_dim, dtype, masked):
    """Its own checks of shapes, strides, types and masks, forward and backward, for both kernels that it may take."""
    from xformers.ops.fmha import Inputs

    tensors = _arguments(head_dim, dtype)
    mask = None
    if masked:
        tensors = {name: t.reshape(1, -1, *t.shape[2:]) for name, t in tensors.items()}
        mask = packed._block_diagonal((197,) * 4, torch.device("cpu"))
    inputs = Inputs(**tensors, attn_bias=mask)
    if not masked:
        inputs.validate_inputs()
    for operator in _operators():
        assert operator.OPERATOR is not None, f"{operator.NAME} has no kernel here"
        assert _objections(operator, inputs) == [], operator.NAME
    wrong = Inputs(**{name: t[..., ::2] for name, t in tensors.items()}, attn_bias=mask)
    assert all(_objections(operator, wrong) for operator in _operators()), "a stride of 2 must be objected to"


def test_the_real_mask_keeps_sequences_apart(xformers):
    """Its own dense form, against which rows each row may attend to."""
    mask = packed._block_diagonal((2, 3, 1), torch.device("cpu"))
    dense = mask.materialize((6, 6))
    owner = torch.tensor([0, 0, 1, 1, 1, 2])
    assert torch.equal(dense == 0, owner[:, None] == owner[None, :])
    assert torch.equal(dense == float("-inf"), owner[:, None] != owner[None, :])
    assert mask.q_seqinfo.seqstart.tolist() == [0, 2, 5, 6]
    assert mask.q_seqinfo.max_seqlen == 3
