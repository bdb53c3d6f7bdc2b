"""The residual layer norm as torch sees it: registration, graphs, checkpoints, fake tensors,
autocast, errors, cost."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from benchmarks.registry import CASES
from fastmoco_kernels import residual_norm
from fastmoco_kernels.residual_norm import launch, op, operator
from fastmoco_kernels.residual_norm.cost import (
    eager_bytes,
    residual_norm_backward_bytes,
    residual_norm_bytes,
)
from tests.kernels.touched_bytes import CountedKernel

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
EPS = 1e-6
HALF, SINGLE = torch.float16, torch.float32


def _inputs(rows: int, E: int, *, branch=HALF) -> list[Tensor]:
    """x, branch, weight and bias."""
    generator = torch.Generator().manual_seed(rows + E)
    shapes = ((rows, E), (rows, E), (E,), (E,))
    x, b, weight, bias = (torch.randn(shape, generator=generator).to(DEVICE) for shape in shapes)
    return [x, b.to(branch), weight, bias]


def _leaves(tensors: list[Tensor]) -> list[Tensor]:
    return [t.detach().clone().requires_grad_() for t in tensors]


def _two_norms(x, branch, weight, bias, backend):
    """As in a block: the norm of the stream, then the sum goes on, and meets a second branch."""
    x, y = residual_norm(x, None, weight, bias, EPS, HALF, backend=backend)
    x, y = residual_norm(x, branch + y, weight, bias, EPS, HALF, backend=backend)
    x, y = residual_norm(x, y * 2, weight, bias, EPS, HALF, backend=backend)
    return x.sum() + y.float().square().sum()


def _gradients(function, tensors: list[Tensor], *rest) -> list[Tensor]:
    leaves = _leaves(tensors)
    return list(torch.autograd.grad(function(*leaves, *rest), leaves))


@pytest.mark.parametrize("branch", [HALF, SINGLE, None])
def test_opcheck(branch):
    x, b, weight, bias = _leaves(_inputs(5, 7, branch=branch or HALF))
    b = None if branch is None else b
    torch.library.opcheck(
        torch.ops.fastmoco.residual_norm.default, (x, b, weight, bias, EPS, HALF, None)
    )
    with torch.no_grad():
        x_new, y, mean, rstd = torch.ops.fastmoco.residual_norm(x, b, weight, bias, EPS, HALF, None)
        x_new = x.detach() if b is None else x_new
        saved = (x_new, weight.detach(), mean, rstd)
        for dx_new, other in ((x_new * 2, HALF), (None, None)):
            arguments = (y.detach(), dx_new, *saved, SINGLE, other, None)
            torch.library.opcheck(torch.ops.fastmoco.residual_norm_backward.default, arguments)


@pytest.mark.parametrize("backend", ["triton", "reference", "auto"])
def test_compiles_to_one_graph_with_the_same_numbers(backend):
    """Of a graph "auto" means the reference, on a GPU too."""
    tensors = _inputs(5, 7)
    compiled = torch.compile(_two_norms, fullgraph=True, backend="aot_eager")
    same = "reference" if backend == "auto" else backend
    for a, b in zip(
        _gradients(compiled, tensors, backend),
        _gradients(_two_norms, tensors, same),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_a_graph_compiler_is_left_the_plain_form_and_finds_no_break_in_the_choice(monkeypatch):
    """It fuses that by itself; and it cannot trace what decides where Triton runs."""
    asked = []
    monkeypatch.setattr(op, "triton_is_default", lambda device: asked.append(device) or True)
    monkeypatch.setattr(
        op, "residual_norm_triton", lambda *_: pytest.fail("the kernels are in the graph")
    )
    x, b, weight, bias = _inputs(5, 7)
    compiled = torch.compile(residual_norm, fullgraph=True, backend="eager")
    y = compiled(x, b, weight, bias, EPS, HALF)[1]
    assert torch.equal(y, residual_norm(x, b, weight, bias, EPS, HALF, backend="reference")[1])
    with torch.autocast(DEVICE.type, HALF):
        assert compiled(x, b, weight, bias, EPS)[1].dtype == HALF
    assert not asked


def test_auto_takes_the_kernels_where_triton_runs_and_they_fit(monkeypatch):
    monkeypatch.setattr(op, "triton_is_default", lambda device: True)
    taken = []
    real = operator.residual_norm_triton
    monkeypatch.setattr(
        op, "residual_norm_triton", lambda *given: taken.append(given) or real(*given)
    )
    x, b, weight, bias = _inputs(5, 7)
    residual_norm(x, b, weight, bias, EPS)
    assert len(taken) == 1
    residual_norm(x.double(), b, weight, bias, EPS)
    wide = torch.zeros(1, op.WIDEST + 1, device=DEVICE)
    residual_norm(wide, None, wide[0], wide[0], EPS)
    assert len(taken) == 1


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_a_checkpoint_changes_no_bit(backend):
    def forgetful(*arguments):
        return checkpoint(_two_norms, *arguments, use_reentrant=False)

    tensors = _inputs(5, 100)
    for a, b in zip(
        _gradients(forgetful, tensors, backend),
        _gradients(_two_norms, tensors, backend),
        strict=True,
    ):
        assert torch.equal(a, b)


def _saved(
    tensors: list[Tensor], *, branch: bool
) -> list[tuple[torch.dtype, tuple[int, ...], int]]:
    """dtype, shape and storage of what is kept for the backward."""
    kept = []
    x, b, weight, bias = (t.requires_grad_() for t in tensors)

    def pack(t: Tensor) -> Tensor:
        kept.append((t.dtype, tuple(t.shape), t.untyped_storage().nbytes()))
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        residual_norm(x, b if branch else None, weight, bias, EPS, HALF, backend="triton")
    return kept


@pytest.mark.parametrize("branch", [True, False])
def test_fake_tensors_keep_what_real_ones_keep(branch):
    """A planner counts the fake ones. Kept are the sum, the weight and two numbers a row; not y,
    not the branch."""
    real = _saved(_inputs(6, 100), branch=branch)
    with FakeTensorMode():
        fake = _saved(
            [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in _inputs_of(6, 100)],
            branch=branch,
        )
    assert fake == real
    assert real == [
        (SINGLE, (6, 100), 2400),
        (SINGLE, (100,), 400),
        (SINGLE, (6,), 24),
        (SINGLE, (6,), 24),
    ]


def _inputs_of(rows: int, E: int) -> list[Tensor]:
    """Shapes and dtypes of `_inputs`, where nothing can be drawn."""
    shapes = ((rows, E), SINGLE), ((rows, E), HALF), ((E,), SINGLE), ((E,), SINGLE)
    return [torch.empty(shape, dtype=dtype, device=DEVICE) for shape, dtype in shapes]


def test_fake_results_lie_as_the_real_ones():
    """Whatever the strides of x."""
    x, b, weight, bias = _inputs(6, 100)
    given = (x.mT.contiguous().mT, b, weight, bias, EPS, HALF, None)
    real = torch.ops.fastmoco.residual_norm(*given)
    with FakeTensorMode() as mode:
        fake = torch.ops.fastmoco.residual_norm(
            *(mode.from_tensor(t) if isinstance(t, Tensor) else t for t in given)
        )
    for a, b in zip(fake, real, strict=True):
        assert (a.dtype, a.shape, a.stride(), a.device) == (b.dtype, b.shape, b.stride(), b.device)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_autocast_casts_no_argument_and_names_the_default_of_y(backend):
    x, b, weight, bias = _inputs(5, 100)

    def run(out, inside):
        context = torch.autocast(DEVICE.type, HALF) if inside else contextlib.nullcontext()
        leaves = _leaves([x, b, weight, bias])
        with context:
            x_new, y = residual_norm(*leaves, EPS, out, backend=backend)
            (x_new.sum() + y.float().square().sum()).backward()
        return [x_new, y, *(t.grad for t in leaves)]

    for inside, plain in zip(run(None, True), run(HALF, False), strict=True):
        assert torch.equal(inside, plain)
    assert run(None, False)[1].dtype == SINGLE
    assert run(SINGLE, True)[1].dtype == SINGLE
    with torch.autocast(DEVICE.type, HALF):
        assert residual_norm(x.double(), b, weight, bias, EPS)[1].dtype == torch.float64


@pytest.mark.parametrize("branch", [HALF, SINGLE, None])
def test_the_way_past_the_dispatcher_gives_what_the_operator_gives(branch, monkeypatch):
    tensors = _inputs(5, 100, branch=branch or HALF)

    def run():
        x, b, weight, bias = leaves = _leaves(tensors)
        x_new, y = residual_norm(
            x, None if branch is None else b, weight, bias, EPS, HALF, backend="triton"
        )
        (x_new.square().sum() + y.float().square().sum()).backward()
        return [x_new, y, *(t.grad for t in leaves)], type(y.grad_fn).__name__

    direct, direct_name = run()
    monkeypatch.setattr(operator, "_watched", lambda *_: True)
    registered, registered_name = run()
    assert (direct_name, registered_name) == (
        "_EagerBackward",
        "GeneratedBackwardFor_fastmoco_residual_norm_defaultBackward",
    )
    for a, b in zip(direct, registered, strict=True):
        assert a is b is None or torch.equal(a, b)


@pytest.mark.parametrize("watched", [True, False])
def test_a_second_derivative_is_refused(watched, monkeypatch):
    monkeypatch.setattr(operator, "_watched", lambda *_: watched)
    x, b, weight, bias = _leaves(_inputs(5, 100))
    y = residual_norm(x, b, weight, bias, EPS, backend="triton")[1]
    (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(
        RuntimeError, match=r"once_differentiable|no autograd formula was registered"
    ):
        gradient.sum().backward()


def test_without_gradients_nothing_is_kept():
    x, b, weight, bias = _leaves(_inputs(5, 100))
    with torch.no_grad():
        x_new, y = residual_norm(x, b, weight, bias, EPS, HALF, backend="triton")
    assert not x_new.requires_grad
    assert not y.requires_grad


@pytest.mark.parametrize(
    ("position", "value", "options", "text"),
    [
        (1, torch.zeros(2, 8), {}, r"x is \(3, 8\) but branch is \(2, 8\)"),
        (2, torch.ones(7), {}, r"x \(3, 8\) .* weight \(7,\) and bias \(8,\)"),
        (3, torch.ones(8, dtype=HALF), {}, "weight is torch.float32 but bias is torch.float16"),
        (1, torch.ones(3, 8, device="meta"), {}, "x is on cpu but branch is on meta"),
        (0, torch.ones(3, 8, dtype=torch.int32), {}, "x is torch.int32"),
        (0, torch.ones(3, 8), {"out_dtype": torch.int8}, "out_dtype=torch.int8"),
        (0, torch.ones(3, 8), {"backend": "cuda"}, "backend='cuda' is none of"),
        (0, torch.ones(3, 8).double(), {"backend": "triton"}, "torch.float64 is none of"),
    ],
)
def test_errors_name_both_sides(position, value, options, text):
    given = [t.cpu() for t in _inputs(3, 8)]
    given[position] = value
    with pytest.raises(ValueError, match=text):
        residual_norm(*given, EPS, **options)


def test_rows_that_do_not_fit_on_chip_are_refused_by_name():
    x = torch.zeros(1, op.WIDEST + 1, device=DEVICE)
    with pytest.raises(ValueError, match="rows of 4097, where at most 4096 fit on chip"):
        residual_norm(x, None, x[0], x[0], EPS, backend="triton")


@pytest.mark.parametrize(
    ("branch", "dx_new"), [(HALF, True), (SINGLE, True), (None, True), (HALF, False)]
)
def test_the_byte_model_counts_the_tensors_that_the_launches_touch(branch, dx_new, monkeypatch):
    touched: list[int] = []
    for name in (
        "residual_norm_fwd_kernel",
        "residual_norm_bwd_kernel",
        "residual_norm_sum_kernel",
    ):
        monkeypatch.setattr(launch, name, CountedKernel(getattr(launch, name), touched))
    rows, E = 63, 384
    x, b, weight, bias = _leaves(_inputs(rows, E, branch=branch or HALF))
    x_new, y = residual_norm(
        x, None if branch is None else b, weight, bias, EPS, HALF, backend="triton"
    )
    sizes = {"branch": 0 if branch is None else branch.itemsize}
    assert sum(touched) == residual_norm_bytes(rows, E, **sizes)
    touched.clear()
    loss = y.float().square().sum()
    (loss + x_new.sum() if dx_new and branch is not None else loss).backward()
    programs = launch.programs_of(rows, launch.backward_tiles(E)[0], DEVICE)
    used = dx_new and branch is not None
    assert sum(touched) == residual_norm_backward_bytes(
        rows, E, **sizes, dx_new=used, programs=programs
    )


def test_bytes_an_element_of_the_usual_types():
    R, E = 4096 * 197, 384
    assert residual_norm_bytes(R, E) == pytest.approx(12 * R * E, rel=3e-3)
    assert residual_norm_backward_bytes(R, E, programs=528) == pytest.approx(16 * R * E, rel=1e-2)
    assert eager_bytes(R, E) == 2 * residual_norm_bytes(R, E) - 2 * (8 * R + 8 * E)
    assert eager_bytes(R, E, backward=True) > 2.7 * residual_norm_backward_bytes(R, E, programs=528)


def test_the_benchmark_checks_every_contender_before_it_times_them():
    case = CASES["residual_norm"]
    found = case.run(case.options(["rows=20", "E=32", "compile=0", "rounds=1"]))
    assert not found["failed"]
    assert set(found["errors"]) == {"residual_norm", "eager"}
    assert set(found["speedup"]) == {"eager"}
    assert found["bytes"]["forward"] < found["bytes"]["eager_forward"]
    with pytest.raises(ValueError, match="dtype='int8' is none of bf16, fp16, fp32"):
        case.run(case.options(["dtype=int8"]))
