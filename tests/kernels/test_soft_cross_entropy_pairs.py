"""Cross-entropy of weighted pairs of rows and targets: in blocks against the definition, in value,
gradients and the largest tensor."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastmoco_kernels import soft_cross_entropy_of_pairs
from fastmoco_kernels.soft_cross_entropy import blocks, of_pairs

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NAMES = ("rows", "weight", "target_rows", "target_weight", "pairs")


def inputs(
    B: int, R: int, S: int, K: int, *, dtype: torch.dtype = torch.float64, D: int = 6, E: int = 5
) -> dict[str, Tensor]:
    """Everything of a call, in values that `dtype` holds; a third of the pairs have no weight."""
    noise = torch.Generator().manual_seed(R * K + S)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=noise, dtype=torch.float64).to(DEVICE, dtype)

    pairs = random(B, R, S)
    pairs = torch.where(pairs > -0.4, pairs.abs(), 0.0)
    shapes = random(B, R, D), random(K, D), random(B, S, E) / 4, random(K, E)
    return {**dict(zip(NAMES, (*shapes, pairs), strict=True)), "centre": random(1, K) / 4}


def call(given: dict[str, Tensor], backend: str = "auto", **options: Any) -> list[Tensor]:
    """The loss and its gradients."""
    leaves = [given[name].detach().requires_grad_() for name in NAMES[:2]]
    how = {"temperature": 0.1, "target_temperature": 0.07, "centre": given["centre"]} | options
    rest = [given[name] for name in NAMES[2:]]
    loss = soft_cross_entropy_of_pairs(*leaves, *rest, backend=backend, **how)
    return [loss.detach(), *torch.autograd.grad(loss * 3, leaves)]


class Largest(TorchDispatchMode):
    """The most elements of a tensor that any operation made."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


# rows and targets that fill blocks, leave a rest, and fit into one
@pytest.mark.parametrize(("R", "S", "K", "size"), [(4, 3, 7, 6), (7, 2, 64, 4), (2, 9, 257, 99)])
@pytest.mark.parametrize("centre", [False, True])
def test_blocks_are_the_definition(R: int, S: int, K: int, size: int, centre: bool) -> None:
    for dtype, tolerance in (
        (torch.float64, 1e-12),
        (torch.float32, 3e-6),
        (torch.bfloat16, 2 * torch.finfo(torch.bfloat16).eps),
    ):
        given = inputs(3, R, S, K, dtype=dtype)
        options = {} if centre else {"centre": None}
        exact = call({name: t.double() for name, t in given.items()}, "reference", **options)
        bytes_of = size * K * (8 if dtype == torch.float64 else 4)
        with mock.patch.object(blocks, "MULTIPLIED_BYTES", {"cpu": bytes_of}):
            found = call(given, **options)
        assert found[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        for ours, expected in zip(found, exact, strict=True):
            assert (ours.double() - expected).abs().max() / expected.abs().max() <= tolerance


def test_no_tensor_grows_with_rows_times_outputs() -> None:
    """Neither of rows nor of targets. What grows are rows and pairs, which have no outputs."""
    K, size = 512, 16
    most = {}
    for backend in ("blocks", "reference"):
        for B in (2, 16):
            given = inputs(B, 20, 12, K, dtype=torch.float32)
            with mock.patch.object(blocks, "MULTIPLIED_BYTES", {DEVICE.type: size * K * 4}):
                arguments = [given[name] for name in NAMES]
                arguments[:2] = [tensor.requires_grad_() for tensor in arguments[:2]]
                # The passes themselves, which the operator hides from a mode.
                with Largest() as largest:
                    if backend == "blocks":
                        with torch.no_grad():
                            of_pairs.of_pairs(*arguments, None, 0.1, 0.07, True, True)
                    else:
                        loss = soft_cross_entropy_of_pairs(
                            *arguments, temperature=0.1, target_temperature=0.07, backend=backend
                        )
                        loss.backward()
            most[backend, B] = largest.elements
    assert most["blocks", 2] == most["blocks", 16] == size * K
    assert most["reference", 16] == 16 * 20 * K


def test_the_widest_head_is_as_exact_as_a_narrow_one() -> None:
    given = inputs(1, 3, 2, 65536, dtype=torch.float32)
    exact = call({name: t.double() for name, t in given.items()}, "reference")
    for ours, expected in zip(call(given), exact, strict=True):
        assert (ours.double() - expected).abs().max() / expected.abs().max() <= 1e-5


def test_only_what_is_wanted_is_differentiated_and_only_once() -> None:
    given = inputs(2, 4, 3, 9)
    both = call(given)
    how = {"temperature": 0.1, "target_temperature": 0.07, "centre": given["centre"]}
    for number in (0, 1):
        arguments = [given[name] for name in NAMES]
        own = arguments[number] = arguments[number].detach().requires_grad_()
        loss = soft_cross_entropy_of_pairs(*arguments, **how)
        (gradient,) = torch.autograd.grad(loss * 3, own, create_graph=True)
        torch.testing.assert_close(gradient, both[1 + number], rtol=1e-12, atol=0)
        with pytest.raises(RuntimeError, match="cannot be differentiated again"):
            gradient.sum().backward()
    assert not soft_cross_entropy_of_pairs(*(given[name] for name in NAMES), **how).requires_grad


def test_opcheck() -> None:
    given = inputs(2, 2, 3, 5, dtype=torch.float32)
    rows, weight, *rest = (given[name] for name in NAMES)
    graded = (rows.requires_grad_(), weight.requires_grad_())
    torch.library.opcheck(
        of_pairs._pairs_op, (*graded, *rest, given["centre"].flatten(), 0.1, 0.05, True, True)
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pairs": torch.ones(2, 4, 4)}, "must be .*B, R, S"),
        ({"rows": torch.ones(8, 6)}, "must be .*B, R, D"),
        ({"weight": torch.ones(9, 6, dtype=torch.int64)}, "int64 on .*; all must be floating"),
        ({"centre": torch.ones(8)}, "centre has 8 numbers for K=9"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Tensor], message: str) -> None:
    given = {name: t.cpu().float() for name, t in inputs(2, 4, 3, 9).items()} | change
    arguments = [given[name] for name in NAMES]
    how: dict[str, Any] = {"temperature": 0.1, "target_temperature": 0.04}
    with pytest.raises(ValueError, match=message):
        soft_cross_entropy_of_pairs(*arguments, centre=given["centre"], **how)
    for name in how:
        with pytest.raises(ValueError, match=f"{name}=0 must be positive"):
            soft_cross_entropy_of_pairs(
                *(inputs(2, 4, 3, 9)[n] for n in NAMES), **(how | {name: 0})
            )
