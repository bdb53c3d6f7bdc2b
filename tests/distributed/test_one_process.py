"""What the distributed parts do where there is one process."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastmoco.distributed import (
    BatchNorm,
    World,
    gather_keys,
    group_rank,
    group_size,
    mesh,
    parallelize,
    start_world,
)
from fastmoco.distributed.replicas import bit_sums


def test_a_run_without_torchrun_is_a_world_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert start_world("cpu") == World(
        rank=0, world_size=1, local_rank=0, device=torch.device("cpu")
    )
    assert (group_rank(), group_size()) == (0, 1)


def test_wrong_devices_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="device='tpu'"):
        start_world("tpu")  # type: ignore[arg-type]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match="this machine has no CUDA device"):
        start_world("gpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match=r"local_rank=64: this machine has 2 CUDA devices"):
        mesh._device_of("gpu", 64)


def test_keys_and_objective_pass_through() -> None:
    keys = torch.ones(2, 3, requires_grad=True)
    assert torch.equal(gather_keys(keys), keys)
    assert not gather_keys(keys).requires_grad
    objective = nn.Linear(2, 2)
    assert parallelize(objective, World()) is objective


@pytest.mark.parametrize(
    ("shape", "affine"), [((6, 3), True), ((6, 3), False), ((4, 3, 2, 5), True)]
)
def test_norm_equals_torch_in_names_values_gradients_and_buffers(
    shape: tuple[int, ...], affine: bool
) -> None:
    torch.manual_seed(0)
    ours = BatchNorm(3, affine=affine).double()
    other = (nn.BatchNorm1d if len(shape) == 2 else nn.BatchNorm2d)(3, affine=affine).double()
    assert list(ours.state_dict()) == list(other.state_dict())
    other.load_state_dict(ours.state_dict())
    for _ in range(2):
        x = torch.randn(shape, dtype=torch.float64)
        pair = [x.clone().requires_grad_(), x.clone().requires_grad_()]
        for norm, leaf in zip((ours, other), pair, strict=True):
            norm(leaf).pow(3).sum().backward()
        assert torch.equal(pair[0].grad, pair[1].grad)
    for a, b in zip([*ours.parameters()], [*other.parameters()], strict=True):
        assert torch.equal(a.grad, b.grad)
    for a, b in zip(ours.buffers(), other.buffers(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(ours.eval()(x), other.eval()(x))
    assert ours.num_batches_tracked.item() == 2


@pytest.mark.parametrize("training", [True, False])
def test_stacked_batches_are_normalised_apart(training: bool) -> None:
    torch.manual_seed(0)
    stacked, one_by_one = (BatchNorm(3).double().train(training) for _ in range(2))
    x = torch.randn(2, 6, 3, dtype=torch.float64) * torch.tensor([1.0, 5.0]).view(2, 1, 1)
    assert torch.equal(stacked(x), torch.stack([one_by_one(view) for view in x]))
    for a, b in zip(stacked.buffers(), one_by_one.buffers(), strict=True):
        assert torch.equal(a, b)


def test_norm_keeps_bf16_out_of_its_statistics() -> None:
    torch.manual_seed(0)
    norm = BatchNorm(3)
    x = (
        torch.randn(64, 3) * 0.1 + 50
    ).bfloat16()  # in bf16 a sum of 64 of these would be off by a unit and more
    y = norm(x)
    assert y.dtype == torch.bfloat16
    assert norm.running_mean.dtype == torch.float32
    assert (norm.running_mean - 0.1 * x.float().mean(0)).abs().max() <= 1e-5


def test_norm_names_wrong_shapes() -> None:
    with pytest.raises(ValueError, match=r"input shape=\(4, 5\): needs \[B, 3\]"):
        BatchNorm(3)(torch.zeros(4, 5))


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.bool]
)
def test_every_flipped_bit_changes_the_sum(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tensor = (torch.randn(5, 7) * 3).to(dtype)
    raw = tensor.view(-1).view(torch.uint8)
    before = bit_sums([tensor])
    for byte in range(len(raw)):
        for bit in range(8):
            raw[byte] ^= 1 << bit
            assert bit_sums([tensor]) != before
            raw[byte] ^= 1 << bit
    assert torch.equal(bit_sums([tensor]), before)
