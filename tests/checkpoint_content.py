"""Checkpoints whose every bit can be computed again by whoever checks them."""

from pathlib import Path

import torch
from torch import Tensor

from fastmoco.checkpoint import load_latest, save_checkpoint


def content(step: int) -> dict[str, Tensor]:
    """What step ``step`` must hold, recomputable by whoever checks it."""
    rng = torch.Generator().manual_seed(step)
    return {
        "float32": torch.randn(40, 50, generator=rng),
        "float64": torch.randn(7, generator=rng, dtype=torch.float64),
        "bfloat16": torch.randn(9, 3, generator=rng).bfloat16(),
        "int64": torch.randint(-(2**62), 2**62, (5,), generator=rng),
        "uint8": torch.randint(0, 256, (11,), generator=rng, dtype=torch.uint8),
        "bool": torch.rand(6, generator=rng) > 0.5,
        "scalar": torch.tensor(float(step)),
        "empty": torch.zeros(0, 4),
        "weird": torch.tensor([float("nan"), float("inf"), -0.0, 1e-45]),
    }


def bits(tensor: Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist()) if tensor.numel() else b""


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert actual[name].shape == tensor.shape, name
        assert bits(actual[name]) == bits(tensor), name


def save(root: Path, step: int, keep: int = 3) -> Path:
    return save_checkpoint(root, step=step, tensors=content(step), state={"step": step, "lr": 0.1}, keep=keep)


def loaded_step(root: Path) -> int:
    loaded = load_latest(root)
    assert loaded is not None
    return loaded.step


def flip_bit(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << (bit % 8)
    path.write_bytes(data)
