"""The moving average against float64, against itself, and on frozen tensors."""

from __future__ import annotations

import pytest
import torch

from fastmoco_kernels import ema_update_


def _tensors(seed: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        for shape in ((3, 5), (7,), (), (2, 1, 4))
    ]


@pytest.mark.parametrize("momentum", [0.0, 0.9, 0.99, 0.9999, 1.0])
def test_both_backends_agree_and_match_float64(momentum):
    sources = _tensors(1)
    one, two = _tensors(2), _tensors(2)
    ema_update_(one, sources, momentum)
    ema_update_(two, sources, momentum, backend="reference")
    for a, b, start, source in zip(one, two, _tensors(2, torch.float64), sources, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(
            a.double(), momentum * start + (1 - momentum) * source.double(), rtol=2e-6, atol=2e-7
        )


def test_frozen_tensors_never_drift():
    start = _tensors(3)
    averages = [t.clone() for t in start]
    for step in range(1000):
        ema_update_(averages, start, 0.99 + step * 1e-5)
    assert all(torch.equal(a, s) for a, s in zip(averages, start, strict=True))


@pytest.mark.parametrize("momentum", [0.99, 0.9999])
def test_two_thousand_steps_stay_within_1e5_of_float64(momentum):
    """Drift as under AdamW at lr 1.5e-4: an average kept in bf16 is wrong by up to a half on this
    test."""
    generator = torch.Generator().manual_seed(4)
    weights = torch.randn(2000, generator=generator, dtype=torch.float64)
    exact, average = weights.clone(), [weights.float()]
    for _ in range(2000):
        weights = (
            weights + 1.5e-4 * torch.randn(2000, generator=generator, dtype=torch.float64).sign()
        )
        exact = momentum * exact + (1 - momentum) * weights.float().double()
        ema_update_(average, [weights.float()], momentum)
    error = ((average[0].double() - exact).norm() / exact.norm()).item()
    assert error < 1e-5


def test_bf16_sources_are_widened_and_no_graph_is_recorded():
    averages, sources = _tensors(5), [t.requires_grad_() for t in _tensors(6, torch.bfloat16)]
    expected = [
        a.double() * 0.5 + s.detach().double() * 0.5 for a, s in zip(averages, sources, strict=True)
    ]
    ema_update_(averages, sources, 0.5)
    for average, value in zip(averages, expected, strict=True):
        assert not average.requires_grad
        torch.testing.assert_close(average.double(), value, rtol=1e-6, atol=1e-7)


def test_nothing_to_do_is_fine():
    ema_update_([], [], 0.99)


@pytest.mark.parametrize(
    ("averages", "sources", "options", "text"),
    [
        ([torch.ones(2)], [], {}, "1 averages but 0 sources"),
        (
            [torch.ones(2)],
            [torch.ones(3)],
            {},
            r"sources\[0\] is \(3,\) but averages\[0\] is \(2,\)",
        ),
        ([torch.ones(2)], [torch.ones(2)], {"momentum": 1.5}, "momentum=1.5"),
        ([torch.ones(2, dtype=torch.bfloat16)], [torch.ones(2)], {}, "bfloat16"),
        (
            [torch.ones(2)],
            [torch.ones(2, device="meta")],
            {},
            r"sources\[0\] is on meta but averages\[0\] is on cpu",
        ),
        ([torch.ones(2)], [torch.ones(2)], {"backend": "apex"}, "backend='apex'"),
    ],
)
def test_errors_name_both_numbers(averages, sources, options, text):
    with pytest.raises(ValueError, match=text):
        ema_update_(averages, sources, **{"momentum": 0.99, **options})
