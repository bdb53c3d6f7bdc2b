"""Soft cross-entropy over a wide head: all paths against the definition, in value and gradients."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from fastmoco_kernels import soft_cross_entropy, soft_cross_entropy_of_rows
from fastmoco_kernels.soft_cross_entropy import blocks, operator

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PATHS = ("triton", "blocks")
FORMS = ("logits", "rows")
TEACHER = {"target_temperature": 0.07}


def _inputs(
    V: int, Q: int, B: int, K: int, *, teacher: bool, dtype: torch.dtype, D: int = 6
) -> dict[str, Tensor]:
    """Everything of a call, in values that `dtype` holds."""
    noise = torch.Generator().manual_seed(V * K + Q)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=noise, dtype=torch.float64).to(DEVICE, dtype)

    given = {"rows": random(V, B, D), "weight": random(K, D), "logits": random(V, B, K)}
    targets = random(Q, B, K)
    if teacher:
        return {**given, "targets": targets / 4, "centre": random(1, K) / 4}
    return {**given, "targets": targets.softmax(-1)}


def _call(form: str, given: dict[str, Tensor], backend: str, **options: Any) -> list[Tensor]:
    """The loss and its gradients."""
    first = ("logits",) if form == "logits" else ("rows", "weight")
    leaves = [given[name].detach().requires_grad_() for name in first]
    call = soft_cross_entropy if form == "logits" else soft_cross_entropy_of_rows
    options = {"temperature": 0.1, "centre": given.get("centre"), "backend": backend} | options
    loss = call(*leaves, given["targets"], **options)
    return [loss.detach(), *torch.autograd.grad(loss * 3, leaves)]


def _check(
    form: str, given: dict[str, Tensor], backend: str, tolerance: float, **options: Any
) -> None:
    exact = _call(form, {n: t.double() for n, t in given.items()}, "reference", **options)
    found = _call(form, given, backend, **options)
    assert found[0].dtype == (
        torch.float64 if given["rows"].dtype == torch.float64 else torch.float32
    )
    for ours, expected in zip(found, exact, strict=True):
        error = (ours.double() - expected).abs().max() / expected.abs().max()
        assert error <= tolerance, (form, backend, float(error))


# two views; targets of one view, two, all; a width below, above and beside the blocks
@pytest.mark.parametrize(("V", "Q", "K"), [(2, 1, 5), (2, 2, 130), (3, 3, 257), (10, 2, 64)])
@pytest.mark.parametrize("teacher", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_blocks_are_the_definition_in_float64_and_float32(
    form: str, teacher: bool, V: int, Q: int, K: int
) -> None:
    options = TEACHER if teacher else {}
    small = {"cpu": 3 * 8 * K}  # blocks of three images, and a rest
    with (
        mock.patch.object(blocks, "CACHED_BYTES", small),
        mock.patch.object(blocks, "MULTIPLIED_BYTES", {"cpu": 5 * V * 8 * K}),
    ):
        for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 3e-6)):
            given = _inputs(V, Q, 7, K, teacher=teacher, dtype=dtype)
            _check(form, given, "blocks", tolerance, **options)


@pytest.mark.parametrize(("V", "Q", "K"), [(2, 1, 5), (2, 2, 130), (3, 3, 257), (10, 2, 64)])
@pytest.mark.parametrize("teacher", [False, True])
def test_kernels_are_the_definition(teacher: bool, V: int, Q: int, K: int) -> None:
    given = _inputs(V, Q, 3, K, teacher=teacher, dtype=torch.float32)
    options = TEACHER if teacher else {}
    _check("logits", given, "triton", 3e-6, **options)
    if V < 10:
        _check("rows", given, "triton", 3e-6 if DEVICE.type == "cpu" else 3e-3, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("path", PATHS)
def test_narrow_inputs(path: str, dtype: torch.dtype) -> None:
    """The gradient is rounded to the dtype of the logits once; nothing else is."""
    rounding = 2 * torch.finfo(dtype).eps
    given = _inputs(3, 2, 4, 70, teacher=True, dtype=dtype)
    _check("logits", given, path, rounding, **TEACHER)
    # Logits of a block of the kernels are narrow too: at temperature 0.1 their error is tenfold.
    _check("rows", given, path, 40 * rounding if path == "triton" else rounding, **TEACHER)


@pytest.mark.parametrize("path", PATHS)
def test_extreme_logits(path: str) -> None:
    """Exponentials of 1e4 / 0.1 are beyond every float; a common offset changes nothing."""
    given = _inputs(2, 2, 3, 40, teacher=True, dtype=torch.float32)
    given["logits"] = given["logits"] * 1e3
    given["targets"] = given["targets"] * 1e3
    _check("logits", given, path, 1e-5, **TEACHER)
    shifted = dict(given, logits=given["logits"].round() + 4096.0)
    plain = dict(given, logits=given["logits"].round())
    for ours, expected in zip(
        _call("logits", shifted, path, **TEACHER),
        _call("logits", plain, path, **TEACHER),
        strict=True,
    ):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


FUSED = """
import re, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from benchmarks.aot.soft_cross_entropy import aot_cases
for case in [case for case in aot_cases() if case.quick]:
    source = ASTSource(case.kernel, dict(case.signature), constexprs=dict(case.constexprs))
    options = {"num_warps": case.num_warps, "enable_fp_fusion": case.fp_fusion}
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
    assert not re.search(r"fma[.]rn[.]f32", ptx), case.name  # those of log2 flush to zero
"""


@pytest.mark.slow
def test_no_kernel_rounds_a_logit_otherwise_than_the_others() -> None:
    """Scaled to 5e4 its rounding is 0.1 % of a share, unless all kernels have the same."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", FUSED],
        cwd=Path(__file__).resolve().parents[2],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("path", PATHS)
def test_targets_of_zeros_and_logits_without_a_share(path: str) -> None:
    """Codes of SwAV may be 0 as a whole; masked logits are -inf, for student and teacher alike."""
    given = _inputs(3, 2, 4, 40, teacher=False, dtype=torch.float32)
    given["targets"][0, 1] = 0
    given["targets"][:, 2] = 0
    _check("logits", given, path, 3e-6)
    given["targets"][..., 7:11] = 0
    given["logits"][..., 7:11] = -math.inf
    _check("logits", given, path, 3e-6)

    teacher = _inputs(3, 2, 4, 40, teacher=True, dtype=torch.float32)
    teacher["targets"][..., 7:11] = -math.inf
    teacher["logits"][..., 7:11] = -math.inf
    _check("logits", teacher, path, 3e-6, **TEACHER)

    # A target where the student has no share is infinitely far.
    given["targets"][0, 0, 7] = 0.5
    assert _call("logits", given, path)[0] == math.inf


@pytest.mark.parametrize("path", [*PATHS, "reference"])
@pytest.mark.parametrize("name", ["logits", "targets", "centre"])
def test_a_nan_is_seen(path: str, name: str) -> None:
    """In the loss: a trainer skips the step by it."""
    given = _inputs(3, 2, 4, 40, teacher=True, dtype=torch.float32)
    given[name][..., 3] = math.nan
    found = _call("logits", given, path, **TEACHER)
    assert all(bool(t.isnan().any()) for t in found)

    given = _inputs(3, 2, 4, 40, teacher=False, dtype=torch.float32)
    given["logits" if name == "logits" else "targets"][..., 1, 3] = math.nan
    if name == "logits":
        given["targets"][:, 1] = 0
    assert _call("logits", given, path)[0].isnan()


def test_the_widest_head_of_few_images() -> None:
    """Its loss is as exact as that of a narrow one."""
    given = _inputs(4, 2, 2, 65536, teacher=True, dtype=torch.float32)
    wide = {name: tensor.double() for name, tensor in given.items()}
    for form in FORMS:
        _check(form, given, "blocks", 1e-5, **TEACHER)
        found, exact = (
            _call(form, each, path, **TEACHER)[0].item()
            for each, path in ((given, "blocks"), (wide, "reference"))
        )
        assert found == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("form", FORMS)
def test_terms_that_are_alike_add_up_exactly(form: str, path: str) -> None:
    """Those of a collapsed encoder are: the error of a float32 sum must not grow with the width."""
    K = 9999
    given = {
        "rows": torch.ones(2, 1, 1),
        "weight": torch.full((K, 1), 0.3),
        "logits": torch.full((2, 1, K), 0.3),
        "targets": torch.full((1, 1, K), 1 / K),
    }
    loss = _call(form, {name: tensor.to(DEVICE) for name, tensor in given.items()}, path)[0]
    assert loss.item() == pytest.approx(math.log(K), rel=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(form: str) -> None:
    given = _inputs(3, 2, 2, 5, teacher=True, dtype=torch.float64, D=3)
    names = ("logits",) if form == "logits" else ("rows", "weight")
    call = soft_cross_entropy if form == "logits" else soft_cross_entropy_of_rows

    def loss(*leaves: Tensor) -> Tensor:
        options = {"temperature": 0.5, "centre": given["centre"], "target_temperature": 0.5}
        return call(*leaves, given["targets"], **options)

    assert torch.autograd.gradcheck(loss, [given[name].requires_grad_() for name in names])


def test_only_what_is_wanted_is_differentiated_and_only_once() -> None:
    given = _inputs(2, 2, 3, 9, teacher=False, dtype=torch.float64)
    rows, weight, targets = given["rows"], given["weight"], given["targets"]
    both = _call("rows", given, "blocks")
    for number, leaf in enumerate((rows, weight)):
        own = leaf.detach().requires_grad_()
        pair = (own, weight) if number == 0 else (rows, own)
        loss = soft_cross_entropy_of_rows(*pair, targets, temperature=0.1)
        (gradient,) = torch.autograd.grad(loss * 3, own, create_graph=True)
        torch.testing.assert_close(gradient, both[1 + number], rtol=1e-12, atol=0)
        with pytest.raises(RuntimeError, match="cannot be differentiated again"):
            gradient.sum().backward()
    assert not soft_cross_entropy_of_rows(rows, weight, targets, temperature=0.1).requires_grad


@pytest.mark.parametrize("path", PATHS)
def test_opcheck(path: str) -> None:
    given = _inputs(2, 2, 2, 5, teacher=True, dtype=torch.float32, D=3)
    names = ("logits", "targets", "rows", "weight")
    logits, targets, rows, weight = (given[name] for name in names)
    centre, triton = given["centre"].reshape(-1), path == "triton"
    graded = [tensor.requires_grad_() for tensor in (logits, rows, weight)]
    torch.library.opcheck(operator._logits_op, (graded[0], targets, centre, 0.1, 0.05, triton))
    torch.library.opcheck(
        operator._rows_op, (*graded[1:], targets, None, 0.1, 0.05, True, True, triton)
    )

    # The gradients are contiguous also where rows [B, V, D] and weight [D, K] come transposed.
    turned = [t.detach().mT.contiguous().mT.requires_grad_() for t in graded[1:]]
    torch.library.opcheck(
        operator._rows_op, (*turned, targets, None, 0.1, 0.05, True, True, triton)
    )


@pytest.mark.parametrize("form", FORMS)
def test_compiles_to_one_graph_with_the_same_numbers(form: str) -> None:
    given = _inputs(2, 2, 3, 9, teacher=True, dtype=torch.float32)

    def loss(*leaves: Tensor) -> Tensor:
        call = soft_cross_entropy if form == "logits" else soft_cross_entropy_of_rows
        return 3 * call(*leaves, given["targets"], temperature=0.1, target_temperature=0.07)

    names = ("logits",) if form == "logits" else ("rows", "weight")
    leaves = [given[name].requires_grad_() for name in names]
    eager = loss(*leaves)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves)
    assert torch.equal(eager, compiled)
    for ours, expected in zip(
        torch.autograd.grad(compiled, leaves), torch.autograd.grad(eager, leaves), strict=True
    ):
        assert torch.equal(ours, expected)


def test_autocast_changes_nothing() -> None:
    given = _inputs(2, 2, 3, 9, teacher=True, dtype=torch.float32)
    for form in FORMS:
        plain = _call(form, given, "blocks", **TEACHER)
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
            narrow = _call(form, given, "blocks", **TEACHER)
        assert all(torch.equal(a, b) for a, b in zip(plain, narrow, strict=True))


@pytest.mark.parametrize(
    ("shapes", "options", "text"),
    [
        (((1, 2, 3), (1, 2, 3)), {}, "V=1 views"),
        (((2, 2, 3), (3, 2, 3)), {}, "Q=3 with targets"),
        (((2, 0, 3), (2, 0, 3)), {}, "B=0 images"),
        (((2, 2, 3), (2, 2, 4)), {}, r"\(2, 2, 3\) and targets \(2, 2, 4\)"),
        (((2, 2, 3), (2, 2, 3)), {"temperature": 0.0}, "temperature=0.0 must be positive"),
        (((2, 2, 3), (2, 2, 3)), {"target_temperature": -1.0}, "target_temperature=-1.0"),
        (((2, 2, 3), (2, 2, 3)), {"centre": torch.zeros(3)}, "centre has 3 numbers for K=3 and"),
        (((2, 2, 3), (2, 2, 3)), {"backend": "fast"}, "backend='fast' is none of"),
    ],
)
def test_wrong_arguments_are_named(
    shapes: tuple[tuple[int, ...], tuple[int, ...]], options: dict[str, Any], text: str
) -> None:
    logits, targets = (torch.zeros(shape) for shape in shapes)
    with pytest.raises(ValueError, match=text):
        soft_cross_entropy(logits, targets, **({"temperature": 0.1} | options))


def test_rows_and_weight_must_fit() -> None:
    rows, weight, targets = torch.zeros(2, 4, 3), torch.zeros(8, 5), torch.zeros(2, 4, 8)
    with pytest.raises(ValueError, match=r"rows \(2, 4, 3\) and weight \(8, 5\)"):
        soft_cross_entropy_of_rows(rows, weight, targets, temperature=0.1)
    with pytest.raises(ValueError, match="does not take float64"):
        soft_cross_entropy(
            torch.zeros(2, 4, 8).double(), targets, temperature=0.1, backend="triton"
        )
