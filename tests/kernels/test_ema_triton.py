"""The one-launch moving average against float64: ragged sizes, odd addresses, types, devices of the
momentum."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastmoco_kernels import ema_update_
from fastmoco_kernels.ema.op import bytes_moved
from fastmoco_kernels.tables import CHUNK
from tests.kernels.touched_bytes import touched_bytes

ROOT = Path(__file__).resolve().parents[2]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# one element; around a chunk; several chunks and a rest; no elements; no dimensions
SHAPES = [(1,), (CHUNK - 1,), (CHUNK,), (CHUNK + 1,), (3, CHUNK), (64, 65), (0, 5), ()]


def _tensors(seed: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in SHAPES]


def _odd(tensor: torch.Tensor, shift: int = 1) -> torch.Tensor:
    """The same numbers at an address that is no multiple of 16 bytes."""
    room = torch.zeros(tensor.numel() + shift, device=tensor.device, dtype=tensor.dtype)
    return room[shift:].view(tensor.shape).copy_(tensor)


@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.996, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_matches_float64(momentum, dtype):
    averages, sources = _tensors(1), _tensors(2, dtype)
    expected = [
        momentum * a.double() + (1 - momentum) * s.double()
        for a, s in zip(averages, sources, strict=True)
    ]
    ema_update_(averages, sources, momentum, backend="triton")
    for average, value in zip(averages, expected, strict=True):
        torch.testing.assert_close(average.double(), value, rtol=2e-6, atol=2e-7)


@pytest.mark.parametrize("momentum", [0.0, 1.0])
def test_the_ends_are_exact(momentum):
    averages, sources = _tensors(1), _tensors(2)
    expected = [t.clone() for t in (averages if momentum else sources)]
    ema_update_(averages, sources, momentum, backend="triton")
    assert all(torch.equal(a, e) for a, e in zip(averages, expected, strict=True))


@pytest.mark.parametrize("shift", [1, 2, 3, 4])
def test_odd_addresses_give_the_same_bits(shift):
    averages, sources = _tensors(1), _tensors(2)
    odd_averages = [_odd(t, shift if i % 2 else 0) for i, t in enumerate(averages)]
    odd_sources = [_odd(t, shift if i % 3 else 0) for i, t in enumerate(sources)]
    ema_update_(averages, sources, 0.9, backend="triton")
    ema_update_(odd_averages, odd_sources, 0.9, backend="triton")
    assert all(torch.equal(a, o) for a, o in zip(averages, odd_averages, strict=True))


def test_neighbours_in_memory_are_left_alone():
    room = torch.zeros(3 * CHUNK, device=DEVICE)
    inside = room[CHUNK - 3 : 2 * CHUNK + 5]
    ema_update_([inside], [torch.ones_like(inside)], 0.5, backend="triton")
    assert room.sum().item() == 0.5 * inside.numel()
    assert bool((inside == 0.5).all())


def test_equal_tensors_never_drift_at_any_momentum():
    """An update of equal tensors that changes nothing can be repeated for ever; test_ema.py repeats
    it."""
    start = [torch.randn(1000, generator=torch.Generator().manual_seed(3)).to(DEVICE)]
    averages = [t.clone() for t in start]
    for step in range(101):
        ema_update_(averages, start, 1 - (step / 100) ** 4, backend="triton")
    assert torch.equal(averages[0], start[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("backend", ["triton", "foreach", "reference"])
def test_a_momentum_on_the_device_is_the_same(backend, dtype):
    one, two, sources = _tensors(1), _tensors(1), _tensors(2)
    ema_update_(one, sources, 0.75, backend=backend)
    ema_update_(two, sources, torch.tensor([0.75], dtype=dtype, device=DEVICE), backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_permuted_gappy_and_float64_tensors_are_right_too():
    image = torch.randn(2, 3, 4, 5, device=DEVICE)
    averages = [
        image.to(memory_format=torch.channels_last).clone(memory_format=torch.preserve_format),
        image.clone(),
        torch.zeros(6, 8, device=DEVICE)[:, ::2],
        torch.zeros(5, dtype=torch.float64, device=DEVICE),
    ]
    sources = [
        torch.randn_like(averages[0]),
        torch.randn_like(averages[0]),
        torch.randn(6, 4),
        torch.randn(5),
    ]
    sources = [s.to(DEVICE) for s in sources]
    expected = [
        0.25 * a.double() + 0.75 * s.double() for a, s in zip(averages, sources, strict=True)
    ]
    ema_update_(averages, sources, 0.25, backend="triton")
    for average, value in zip(averages, expected, strict=True):
        torch.testing.assert_close(average.double(), value, rtol=1e-6, atol=1e-6)


def test_moved_sources_are_found_and_autograd_hears_of_the_change():
    averages, sources = _tensors(1), _tensors(2)
    for _ in range(3):
        version = averages[0]._version
        sources = [s.clone() + 1 for s in sources]
        expected = [0.5 * a + 0.5 * s for a, s in zip(averages, sources, strict=True)]
        ema_update_(averages, sources, 0.5, backend="triton")
        assert averages[0]._version == version + 1
        for average, value in zip(averages, expected, strict=True):
            torch.testing.assert_close(average, value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.skipif(DEVICE == "cuda", reason="counted in the interpreter")
def test_the_byte_model_is_what_the_launch_touches(dtype):
    averages, sources = _tensors(1), _tensors(2, dtype)
    with touched_bytes(CHUNK) as counts:
        ema_update_(averages, sources, 0.9, backend="triton")
    elements = sum(a.numel() for a in averages)
    assert counts["read"] + counts["written"] == bytes_moved(elements, source_bytes=dtype.itemsize)
    assert bytes_moved(1) == 12


@pytest.mark.parametrize("backend", ["triton", "foreach"])
def test_opcheck(backend):
    tensor = None if backend == "triton" else torch.tensor(0.5, device=DEVICE)
    averages, sources = [t.detach() for t in _tensors(1)[:4]], _tensors(2)[:4]
    torch.library.opcheck(
        torch.ops.fastmoco.ema_update_.default, (averages, sources, 0.5, tensor, backend)
    )


def test_compiles_as_a_whole_graph_and_autocast_changes_nothing():
    sources = _tensors(2)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(averages, sources):
        ema_update_(averages, sources, 0.5)
        return averages[0] * 2

    one, two = _tensors(1), _tensors(1)
    doubled = compiled(one, sources)
    with torch.autocast(DEVICE, torch.bfloat16):
        ema_update_(two, sources, 0.5)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert torch.equal(doubled, one[0] * 2)


LOADS = """
import re, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from benchmarks.aot import adamw_ema, ema
for case, arrays in ((ema.aot_cases()[0], 2), (adamw_ema.aot_cases()[0], 5)):
    names = list(case.signature)
    attributes = {(names.index(n),): [["tt.divisibility", 16]] for n in case.aligned}
    source = ASTSource(case.kernel, dict(case.signature), constexprs=dict(case.constexprs), attrs=attributes)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
    per_array = case.constexprs["CHUNK"] // (32 * case.num_warps * 4)
    wide = len(re.findall(r"ld\\.global\\S*\\.v4\\.b32", ptx))
    assert wide == arrays * per_array, (case.name, wide)
"""


@pytest.mark.slow
def test_full_chunks_are_read_128_bits_at_a_time():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", LOADS],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.gpu
def test_bf16_sources_on_a_gpu():
    averages, sources = _tensors(1), _tensors(2, torch.bfloat16)
    expected = [0.5 * a.double() + 0.5 * s.double() for a, s in zip(averages, sources, strict=True)]
    ema_update_(averages, sources, 0.5)
    for average, value in zip(averages, expected, strict=True):
        torch.testing.assert_close(average.double(), value, rtol=2e-6, atol=2e-7)
