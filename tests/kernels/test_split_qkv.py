"""q, k, v out of a stacked projection: views forward; stacked gradient and bias's gradient against
torch's own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from fastmoco_kernels import _bias_gradient, attention, split_qkv
from fastmoco_kernels.column_sums import launch as sums
from fastmoco_kernels.stacked_qkv import launch
from fastmoco_kernels.stacked_qkv.cost import eager_backward_bytes, split_qkv_backward_bytes
from tests.kernels.touched_bytes import CountedKernel

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HALF, SINGLE = torch.float16, torch.float32


def _gradients_of_parts(
    B: int, L: int, A: int, d: int, dtype: torch.dtype, memory: str
) -> list[Tensor]:
    """dq, dk, dv, [B, A, L, d] by shape, in memory as told."""
    generator = torch.Generator().manual_seed(B + L + A + d)
    parts = [
        torch.randn(B, A, L, d, generator=generator, dtype=torch.float64).to(DEVICE, dtype)
        for _ in range(3)
    ]
    if memory == "BLAd":  # as flash attention leaves them
        return [t.transpose(1, 2).contiguous().transpose(1, 2) for t in parts]
    if memory == "stacked":  # views of one tensor
        return list(torch.stack([t.transpose(1, 2) for t in parts], 2).transpose(1, 3).unbind(2))
    if memory == "BAdL":  # columns are not on end
        return [t.mT.contiguous().mT for t in parts]
    if memory == "mixed":
        q, k, v = parts
        return [q, k.transpose(1, 2).contiguous().transpose(1, 2), v.mT.contiguous().mT]
    return parts


def _all(parts: list[Tensor], backend: str, bias: torch.dtype | None) -> list[Tensor]:
    """dqkv and dbias."""
    B, A, L, d = parts[0].shape
    qkv = torch.zeros(B, L, 3 * A * d, dtype=parts[0].dtype, device=DEVICE, requires_grad=True)
    parameter = (
        None
        if bias is None
        else torch.zeros(3 * A * d, dtype=bias, device=DEVICE, requires_grad=True)
    )
    torch.autograd.backward(split_qkv(qkv, A, parameter, backend=backend), parts)
    return [qkv.grad, *([] if parameter is None else [parameter.grad])]


def _assert_right(parts: list[Tensor], bias: torch.dtype | None) -> None:
    """The stack bit by bit; its sums to the rounding of float32."""
    ours, torchs = (_all(parts, backend, bias) for backend in ("triton", "reference"))
    assert ours[0].is_contiguous()
    assert torch.equal(ours[0], torchs[0])
    if bias is not None:
        assert (ours[1].dtype, ours[1].shape) == (torchs[1].dtype, torchs[1].shape)
        rows = ours[0].double().flatten(0, 1)
        error = (ours[1].double() - rows.sum(0)).abs()
        eps = torch.finfo(bias).eps if bias != SINGLE else 0
        assert (error <= 1e-6 * rows.abs().sum(0) + eps * rows.sum(0).abs() + 1e-30).all()


# one row; one head of one column; odd everything; enough rows that programs go through several
# tiles; heads of ViT-S (MoCo v3's and the usual ones), ViT-B and ViT-H
@pytest.mark.parametrize(
    ("B", "L", "A", "d"),
    [
        (1, 1, 1, 1),
        (1, 1, 12, 32),
        (3, 5, 2, 7),
        (5, 131, 3, 5),
        (2, 50, 12, 32),
        (3, 11, 6, 64),
        (2, 3, 12, 64),
        (1, 4, 16, 80),
    ],
)
@pytest.mark.parametrize("memory", ["BALd", "BLAd", "mixed"])
@pytest.mark.parametrize("dtype", [SINGLE, HALF])
def test_is_torchs_stack_and_its_sum(B, L, A, d, memory, dtype):
    _assert_right(_gradients_of_parts(B, L, A, d, dtype, memory), SINGLE)


@pytest.mark.parametrize("memory", ["stacked", "BAdL"])
@pytest.mark.parametrize("bias", [SINGLE, HALF, None])
def test_other_strides_and_biases(memory, bias):
    _assert_right(_gradients_of_parts(3, 11, 2, 32, HALF, memory), bias)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_parts_are_views_of_one_memory(backend):
    qkv = torch.arange(2 * 3 * 24.0, device=DEVICE).view(2, 3, 24).requires_grad_()
    bias = torch.zeros(24, device=DEVICE, requires_grad=True)
    expected = qkv.view(2, 3, 3, 2, 4).unbind(2)
    for part, other in zip(split_qkv(qkv, 2, bias, backend=backend), expected, strict=True):
        assert torch.equal(part, other.transpose(1, 2))
        assert part.stride() == other.transpose(1, 2).stride()
        assert part.data_ptr() == other.data_ptr()
        assert part.requires_grad
    with torch.no_grad():
        assert not split_qkv(qkv, 2, bias, backend=backend)[0].requires_grad


def test_every_tile_that_tuning_may_pick_gives_the_same(monkeypatch):
    parts = _gradients_of_parts(3, 31, 2, 64, HALF, "BLAd")
    default = _all(parts, "triton", SINGLE)
    for tile in launch.tiles(128)[1:]:
        monkeypatch.setattr(launch, "tiles", lambda _, tile=tile: [tile])
        dqkv, dbias = _all(parts, "triton", SINGLE)
        assert torch.equal(dqkv, default[0])
        torch.testing.assert_close(dbias, default[1], rtol=1e-5, atol=1e-5)


def test_the_same_bits_every_time():
    parts = _gradients_of_parts(3, 31, 2, 64, HALF, "BLAd")
    for a, b in zip(_all(parts, "triton", SINGLE), _all(parts, "triton", SINGLE), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("E", [1, 33, 64, 96, 100, 192, 320, 384, 768, 1024, 1280])
def test_blocks_of_columns_cover_the_width(E):
    cols = launch.columns(E)
    assert cols & (cols - 1) == 0
    assert E % cols == 0 or cols == min(256, max(32, 1 << (E - 1).bit_length()))


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_expanded_missing_and_no_gradients(backend):
    """A sum's gradient is one number, expanded; a part may be used by nobody; a batch may be empty;
    a bias may want none."""
    qkv = torch.zeros(2, 3, 24, device=DEVICE, requires_grad=True)
    bias = torch.zeros(24, device=DEVICE, requires_grad=True)
    split_qkv(qkv, 2, bias, backend=backend)[1].sum().backward()
    assert qkv.grad.sum((0, 1)).tolist() == bias.grad.tolist() == [0] * 8 + [6] * 8 + [0] * 8
    empty = torch.zeros(0, 3, 24, device=DEVICE, requires_grad=True)
    bias.grad = None
    sum(t.sum() for t in split_qkv(empty, 2, bias, backend=backend)).backward()
    assert bias.grad.tolist() == [0] * 24
    constant = bias.detach()
    sum(t.sum() for t in split_qkv(qkv, 2, constant, backend=backend)).backward()
    assert constant.grad is None


def _attend(x: Tensor, W: Tensor, bias: Tensor, backend: str, own: bool = True) -> Tensor:
    qkv = F.linear(x, W, bias.detach() if own else bias)
    if own:
        q, k, v = split_qkv(qkv, 2, bias, backend=backend)
    else:
        q, k, v = (t.transpose(1, 2) for t in qkv.view(*x.shape[:2], 3, 2, -1).unbind(2))
    return attention(q, k, v, backend="sdpa").transpose(1, 2).float().square().sum()


def _gradients(
    function, *rest, dtype: torch.dtype = SINGLE, device: torch.device = DEVICE
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((3, 5, 16), (48, 16), (48,))
    leaves = [
        torch.randn(s, generator=generator, dtype=torch.float64).to(device, dtype).requires_grad_()
        for s in shapes
    ]
    return list(torch.autograd.grad(function(*leaves, *rest), leaves))


@pytest.mark.parametrize(
    ("dtype", "autocast"), [(torch.float64, None), (SINGLE, None), (SINGLE, torch.bfloat16)]
)
def test_the_reference_has_the_bits_of_the_linear_layers_own_gradient(dtype, autocast):
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        mine, torchs = (
            _gradients(_attend, "reference", own, dtype=dtype, device=torch.device("cpu"))
            for own in (True, False)
        )
    for a, b in zip(mine, torchs, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", ["triton", "reference", "auto"])
def test_compiles_to_one_graph_with_the_same_numbers(backend):
    compiled = torch.compile(_attend, fullgraph=True, backend="aot_eager")
    for a, b in zip(_gradients(compiled, backend), _gradients(_attend, backend), strict=True):
        assert torch.equal(a, b)


def test_a_compiled_forward_copies_nothing():
    """The graph holds views, and no node of ours."""
    graphs = []

    def look(graph, inputs):
        graphs.append(graph)
        return graph

    from torch._dynamo.backends.common import aot_autograd

    compiled = torch.compile(_attend, fullgraph=True, backend=aot_autograd(fw_compiler=look))
    _gradients(compiled, "triton")
    names = " ".join(str(node.target) for node in graphs[0].graph.nodes)
    assert "clone" not in names.partition("scaled_dot_product")[0]
    assert "fastmoco" not in names
    assert "copy" not in names.partition("scaled_dot_product")[0]


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_a_checkpoint_changes_no_bit(backend):
    def forgetful(*arguments):
        return checkpoint(_attend, *arguments, use_reentrant=False)

    for a, b in zip(_gradients(forgetful, backend), _gradients(_attend, backend), strict=True):
        assert torch.equal(a, b)


def test_auto_takes_the_kernel_where_triton_runs_in_a_compiled_graph_too(monkeypatch):
    torch._dynamo.reset()  # a constant is not guarded: graphs of other tests would be taken
    # as what decides on CUDA: no graph compiler looks into it, so it must be a constant
    monkeypatch.setattr(
        _bias_gradient, "triton_is_default", lambda device: Path(os.devnull).exists()
    )
    taken = []
    real = launch.backward
    monkeypatch.setattr(launch, "backward", lambda *given: taken.append(given) or real(*given))
    compiled = torch.compile(_attend, fullgraph=True, backend="aot_eager")
    for number, function in enumerate((_attend, compiled)):
        _gradients(function, "auto")
        assert len(taken) == number + 1
    _gradients(_attend, "auto", dtype=torch.float64)
    assert len(taken) == 2
    torch._dynamo.reset()


@pytest.mark.parametrize("bias_dtype", [SINGLE, HALF, None])
@pytest.mark.parametrize("memory", ["BALd", "BLAd"])
def test_opcheck(bias_dtype, memory):
    parts = _gradients_of_parts(2, 3, 2, 5, HALF, memory)
    torch.library.opcheck(torch.ops.fastmoco.split_qkv_backward.default, (*parts, bias_dtype))


def test_fake_tensors_keep_what_real_ones_keep_which_is_nothing():
    """A planner counts the fake ones; and the views lie as the real ones."""

    def look() -> list[tuple[int, ...]]:
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            qkv = torch.zeros(2, 3, 24, device=DEVICE, requires_grad=True)
            parts = split_qkv(
                qkv, 2, torch.zeros(24, device=DEVICE, requires_grad=True), backend="triton"
            )
        assert kept == []
        assert all(t.untyped_storage().nbytes() == qkv.nbytes for t in parts)
        return [(*t.shape, *t.stride(), t.storage_offset()) for t in parts]

    real = look()
    with FakeTensorMode():
        assert look() == real


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ((torch.zeros(2, 3, 24), 2, torch.zeros(8)), r"qkv is \(2, 3, 24\) but its bias is \(8,\)"),
        (
            (torch.zeros(2, 3, 24), 2, torch.zeros(24, device="meta")),
            "qkv is on cpu but its bias is on meta",
        ),
        ((torch.zeros(2, 3, 24), 5), "24 columns and num_heads=5"),
        ((torch.zeros(2, 3, 24), 0), "24 columns and num_heads=0"),
        ((torch.zeros(3, 24), 2), r"torch.float32 \(3, 24\)"),
        ((torch.zeros(2, 3, 24, dtype=torch.int8), 2), "qkv is torch.int8"),
        ((torch.zeros(2, 3, 24), 2, None, "cuda"), "backend='cuda' is none of"),
        ((torch.zeros(2, 3, 24).double(), 2, None, "triton"), "qkv is torch.float64"),
    ],
)
def test_errors_name_both_sides(given, text):
    with pytest.raises(ValueError, match=text):
        split_qkv(*given[:3], backend=given[3] if len(given) > 3 else "auto")


@pytest.mark.parametrize("bias", [SINGLE, HALF, None])
def test_the_byte_model_counts_the_tensors_that_the_launches_touch(bias, monkeypatch):
    touched: list[int] = []
    for module, name in ((launch, "split_qkv_bwd_kernel"), (sums, "column_sum_kernel")):
        monkeypatch.setattr(module, name, CountedKernel(getattr(module, name), touched))
    launch.backward(*_gradients_of_parts(3, 11, 6, 64, HALF, "BLAd"), bias)
    programs = launch.programs_of(33, 384, launch.tiles(384)[0], DEVICE)
    size = 0 if bias is None else bias.itemsize
    assert sum(touched) == split_qkv_backward_bytes(3, 11, 384, bias=size, programs=programs)
    whole = 12 * 256 * 197 * 384
    assert split_qkv_backward_bytes(256, 197, 384, bias=4, programs=118) == pytest.approx(
        whole, rel=5e-3
    )
    assert eager_backward_bytes(256, 197, 384) == 1.5 * whole


@pytest.mark.gpu
@pytest.mark.parametrize(("A", "d"), [(12, 32), (6, 64), (12, 64), (16, 80)])
@pytest.mark.parametrize("memory", ["BALd", "BLAd"])
@pytest.mark.parametrize(
    "deterministic", [True, False]
)  # the default tile, and the one that tuning picks
def test_bf16_on_cuda_at_the_size_of_a_chunk(A, d, memory, deterministic):
    """256 images of 197 tokens."""
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    parts = _gradients_of_parts(256, 197, A, d, torch.bfloat16, memory)
    for bias in (SINGLE, torch.bfloat16, None):
        _assert_right(parts, bias)


@pytest.mark.gpu
def test_a_compiled_layer_on_cuda_takes_the_kernel(monkeypatch):
    taken = []
    real = launch.backward
    monkeypatch.setattr(launch, "backward", lambda *given: taken.append(given) or real(*given))
    compiled = torch.compile(_attend, fullgraph=True, dynamic=False)
    for a, b in zip(_gradients(compiled, "auto"), _gradients(_attend, "reference"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    assert len(taken) == 1
