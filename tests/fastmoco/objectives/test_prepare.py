"""Views on their way to the encoder."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from fastmoco.objectives.prepare import view_preparation
from fastmoco_pipelines.spec import moco_v3_views


def test_both_passes_over_a_chunk_share_one_compiled_graph(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    graphs = CompileCounter()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=graphs))
    specs = moco_v3_views(8)
    compiled = view_preparation(specs, "bf16", compiled=True)
    plain = view_preparation(specs, "bf16")
    noise = torch.Generator().manual_seed(2)
    levels = torch.randint(256, (2, 5, 3, 8, 8), generator=noise, dtype=torch.uint8).unbind()
    for with_gradient in (False, True):
        with torch.set_grad_enabled(with_gradient):
            views = compiled(levels)
            assert torch.is_grad_enabled() is with_gradient
        for view, expected in zip(views, plain(levels), strict=True):
            assert torch.equal(view, expected)
    assert graphs.frame_count == 1
