"""The choice of a backend, as a graph compiler sees it on a GPU."""

from __future__ import annotations

import pytest
import torch

from fastmoco_kernels import backends

CUDA = torch.device("cuda", 0)


@pytest.fixture
def hopper(monkeypatch):
    """The choice meets a GPU of compute capability 9.0."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    backends._capability.cache_clear()
    yield
    backends._capability.cache_clear()


def _chosen(x: torch.Tensor) -> torch.Tensor:
    return x + 1 if backends.triton_is_default(CUDA) else x - 1


def _required(x: torch.Tensor) -> torch.Tensor:
    backends.require_triton("op", CUDA)
    return x + 1


@pytest.mark.parametrize("function", [_chosen, _required])
def test_the_choice_on_a_gpu_is_a_constant_of_the_graph(function, hopper):
    """Every op makes it on every call, compiled ones included."""
    graphs = []

    def kept(graph, _):
        graphs.append([node.op for node in graph.graph.nodes])
        return graph.forward

    found = torch.compile(function, fullgraph=True, backend=kept)(torch.zeros(2))
    assert found.tolist() == [1, 1]
    assert graphs == [["placeholder", "call_function", "output"]]
