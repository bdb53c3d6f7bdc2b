"""Names and order of the heads' layers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastmoco.distributed import BatchNorm
from fastmoco.models import predictor, projector
from fastmoco.models.heads import FORMS, HeadForm, build_head


def test_projector_and_predictor_are_built_as_the_paper_says() -> None:
    head = projector(6, 8, 4)
    assert [type(m) for m in head] == [
        nn.Linear,
        BatchNorm,
        nn.ReLU,
        nn.Linear,
        BatchNorm,
        nn.ReLU,
        nn.Linear,
        BatchNorm,
    ]
    names = [name for name, _ in head.named_parameters()]
    assert names == ["0.weight", "1.weight", "1.bias", "3.weight", "4.weight", "4.bias", "6.weight"]
    assert [name for name, _ in predictor(4, 8, 4).named_parameters()] == [
        "0.weight",
        "1.weight",
        "1.bias",
        "3.weight",
    ]
    out = head(torch.randn(16, 6))
    assert out.shape == (16, 4)
    assert out.mean(0).abs().max() < 1e-5
    assert (out.std(0, unbiased=False) - 1).abs().max() < 1e-2


def test_forms_differ_in_biases_and_the_last_norm() -> None:
    byol = build_head(6, 8, 4, FORMS["byol"])
    assert [type(m) for m in byol] == [nn.Linear, BatchNorm, nn.ReLU, nn.Linear]
    assert [name for name, _ in byol.named_parameters()] == [
        "0.weight",
        "0.bias",
        "1.weight",
        "1.bias",
        "3.weight",
    ]
    bare = build_head(6, 8, 4, HeadForm(layers=3, last_norm=False, last_bias=True))
    assert [type(m) for m in bare] == [
        nn.Linear,
        BatchNorm,
        nn.ReLU,
        nn.Linear,
        BatchNorm,
        nn.ReLU,
        nn.Linear,
    ]
    assert (bare[0].bias, bare[6].bias is None) == (None, False)


@pytest.mark.parametrize("field", ["in_dim", "hidden_dim", "out_dim", "layers"])
def test_wrong_sizes_are_named(field: str) -> None:
    with pytest.raises(ValueError, match=f"{field}=0"):
        projector(**({"in_dim": 4, "hidden_dim": 4, "out_dim": 4, "layers": 3} | {field: 0}))
