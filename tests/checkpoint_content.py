"""Checkpoints whose content a test can compute again."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from fastmoco.checkpoint import group_for_saving, load_latest, save_checkpoint


def content(step: int) -> dict[str, Tensor]:
    """The content of step `step`, a function of the step."""
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
    return (
        bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist()) if tensor.numel() else b""
    )


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert actual[name].shape == tensor.shape, name
        assert bits(actual[name]) == bits(tensor), name


def save(root: Path, step: int, keep: int = 3, group: dist.ProcessGroup | None = None) -> Path:
    state = {"step": step, "lr": 0.1}
    return save_checkpoint(
        root, step=step, tensors=content(step), state=state, keep=keep, group=group
    )


@contextmanager
def group_of_one() -> Iterator[dist.ProcessGroup]:
    """A group of this process only, so that saves use the code for several ranks."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        group = group_for_saving(60)
        assert group is not None
        yield group
    finally:
        dist.destroy_process_group()


def loaded_step(root: Path) -> int:
    loaded = load_latest(root)
    assert loaded is not None
    return loaded.step


def flip_bit(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << (bit % 8)
    path.write_bytes(data)


@contextmanager
def full_disk() -> Iterator[None]:
    """Writing beyond four kilobytes fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
