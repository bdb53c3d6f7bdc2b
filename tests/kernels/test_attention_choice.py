"""Who computes attention: the choice, its reason, what refuses to run here and why, and what other
libraries are handed."""

from __future__ import annotations

import importlib.metadata
import logging
import sys
import types

import pytest
import torch

from fastmoco_kernels import attention
from fastmoco_kernels.attention import choice, external
from fastmoco_kernels.attention.choice import (
    BACKENDS,
    choose_attention,
    require_fa4,
    require_xformers,
)
from fastmoco_kernels.attention.reference import attention_explicit

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("device", "dtype", "head_dim", "backend", "reason"),
    [
        (CPU, torch.bfloat16, 32, "explicit", "bf16 on a CPU"),
        (CPU, torch.float32, 32, "sdpa", "float32 on cpu"),
        (
            CUDA,
            torch.bfloat16,
            32,
            "sdpa",
            "triton fits, but has not been measured on a GPU and is opt-in",
        ),
        (CUDA, torch.float16, 80, "sdpa", "triton cannot: head dimension 80 is none of"),
        (CUDA, torch.float64, 32, "sdpa", "triton cannot: float64"),
    ],
)
def test_auto_says_why(device, dtype, head_dim, backend, reason):
    chosen = choose_attention(device, dtype, 197, 197, head_dim)
    assert chosen.backend == backend
    assert reason in chosen.reason
    assert str(chosen) == f"{backend} ({chosen.reason})"


def test_a_name_is_taken_as_given():
    assert (
        choose_attention(CPU, torch.float32, 5, 5, 8, backend="explicit").reason
        == "asked for by name"
    )
    with pytest.raises(ValueError, match="backend='flash9' is none of"):
        choose_attention(CPU, torch.float32, 5, 5, 8, backend="flash9")


@pytest.mark.parametrize("backend", ["flash", "cudnn", "efficient", "fa4", "xformers"])
def test_kernels_of_the_gpu_refuse_the_cpu(backend):
    q = torch.ones(1, 1, 4, 32)
    with pytest.raises(ValueError, match=f"backend='{backend}' on cpu; it needs a CUDA device"):
        attention(q, q, q, backend=backend)


@pytest.mark.parametrize("backend", ["flash", "cudnn", "fa4"])
def test_kernels_of_16_bits_refuse_float32(backend):
    with pytest.raises(
        ValueError, match=f"backend='{backend}' in float32; it takes float16, bfloat16"
    ):
        choose_attention(CUDA, torch.float32, 197, 197, 64, backend=backend)


def test_triton_refuses_a_cpu_without_the_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="backend='triton' on cpu"):
        choose_attention(CPU, torch.float32, 197, 197, 32, backend="triton")


def test_each_choice_is_logged_once(caplog, monkeypatch):
    monkeypatch.setattr(choice, "_checked", set())
    monkeypatch.setattr(choice, "_said", set())
    caplog.set_level(logging.INFO, logger="fastmoco_kernels")
    for rows in (3, 3, 5):
        q = torch.ones(1, 1, rows, 8)
        attention(q, q, q)
        attention(q.bfloat16(), q.bfloat16(), q.bfloat16())
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2
    assert said[0].startswith("attention: sdpa (float32 on cpu")
    assert said[1].startswith("attention: explicit (bf16 on a CPU")


def test_a_refused_call_is_refused_again():
    q = torch.ones(1, 1, 4, 32)
    for _ in range(2):
        with pytest.raises(ValueError, match="cudnn"):
            attention(q, q, q, backend="cudnn")


def test_flash_attention_4_says_what_is_missing(monkeypatch):
    with pytest.raises(ValueError, match=r"capability \(8, 0\); it needs 9.x or 10.x"):
        require_fa4((8, 0))
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    monkeypatch.setattr(choice.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install flash-attn-4"):
        require_fa4((9, 0))
    monkeypatch.delattr(torch.nn.attention, "activate_flash_attention_impl")
    with pytest.raises(
        ValueError, match=r"torch \S+ has no torch.nn.attention.activate_flash_attention_impl"
    ):
        require_fa4((9, 0))


def test_flash_attention_4_is_switched_on_once(monkeypatch):
    switched = []
    monkeypatch.setattr(
        torch.nn.attention,
        "current_flash_attention_impl",
        lambda: switched[-1] if switched else None,
    )
    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", switched.append)
    external._activate_fa4()
    external._activate_fa4()
    assert switched == ["FA4"]


@pytest.mark.parametrize("name", ["flash", "cudnn", "efficient"])
def test_exactly_one_kernel_of_torch_is_allowed(name, monkeypatch):
    allowed = []

    def spy(q, k, v):
        allowed.extend(torch.nn.attention._cur_sdpa_kernel_backends())
        return q

    monkeypatch.setattr(external, "scaled_dot_product_attention", spy)
    external.attention_by_kernel(name, *torch.ones(3, 1, 1, 4, 32))
    assert allowed == [external._KERNELS[name]]


@pytest.mark.parametrize("version", ["0.0.33", "0.0.36", "0.1.0"])
def test_xformers_of_another_version_is_refused(version, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda _: version)
    with pytest.raises(ValueError, match=rf"xformers is {version}; pip install"):
        require_xformers()


def test_a_missing_xformers_is_named(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(
        ValueError, match=r"xformers is not installed; pip install 'xformers>=0\.0\.34,<0\.0\.36'"
    ):
        require_xformers()


@pytest.fixture
def xformers(monkeypatch):
    """A double with the name that is used; it keeps what it was handed, and computes it plainly."""
    calls: list[dict[str, object]] = []

    def memory_efficient_attention(q, k, v):
        calls.append({"shape": tuple(q.shape), "bases": [t.data_ptr() for t in (q, k, v)]})
        return attention_explicit(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)

    ops = types.ModuleType("xformers.ops")
    ops.memory_efficient_attention = memory_efficient_attention
    monkeypatch.setitem(sys.modules, "xformers", types.ModuleType("xformers"))
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "0.0.35+cu128")
    return calls


def test_xformers_gets_rows_before_heads_without_copies(xformers):
    q, k, v = torch.randn(3, 2, 4, 5, 8).unbind()
    found = external.attention_by_xformers(q, k, v)
    assert xformers[0]["shape"] == (2, 5, 4, 8)
    assert xformers[0]["bases"] == [t.data_ptr() for t in (q, k, v)]
    torch.testing.assert_close(found, attention_explicit(q, k, v))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("head_dim", [32, 64])
def test_every_backend_that_runs_on_this_gpu(backend, head_dim):
    generator = torch.Generator("cuda").manual_seed(0)
    inputs = (
        torch.randn(3, 2, 4, 197, head_dim, device="cuda", generator=generator).bfloat16().unbind()
    )
    try:
        choose_attention(inputs[0].device, torch.bfloat16, 197, 197, head_dim, backend=backend)
    except ValueError as error:
        pytest.skip(str(error))
    results = []
    for name, dtype in ((backend, torch.bfloat16), ("reference", torch.float64)):
        leaves = [t.to(dtype).requires_grad_() for t in inputs]
        out = attention(*leaves, backend=name)
        out.float().square().sum().backward()
        results.append([out, *(leaf.grad for leaf in leaves)])
    for a, b in zip(*results, strict=True):
        assert (a.double() - b).norm() <= 2e-2 * b.norm()
