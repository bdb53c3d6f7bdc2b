"""One of two real processes: LARS, LARC, SGD and AdamWEMA under FSDP2 and HSDP. Started by
test_optimizer_ranks.py, as run_ranks.py is.
"""

from __future__ import annotations

import os
from collections.abc import Callable

os.environ["TRITON_INTERPRET"] = "1"  # CPU processes on any machine

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

from fastmoco.distributed import World
from fastmoco.optim.apex import build_apex
from fastmoco.optim.larc import LARC
from fastmoco.optim.sgd import SGD
from fastmoco_kernels.lars.op import lars_step_
from fastmoco_kernels.lars.optimizer import LARS
from tests.distributed import run_adamw_ema
from tests.distributed.cases import run_cases

STEPS = 3
LR = 2.0
IN_BUFFER = {"lr_in_buffer": True, "adapt": True}
"""The rate inside the buffer, and a bias that is adapted: its shards need the whole norm, too."""


class Model(nn.Module):
    """Shards of unequal size: 5 rows over two ranks, one row (an empty shard on
    rank 1), a bias, a class token.
    """

    def __init__(self) -> None:
        super().__init__()
        self.class_token = nn.Parameter(torch.randn(1, 1, 6))
        self.first = nn.Linear(6, 5)
        self.second = nn.Linear(5, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 6] -> [B, 1]."""
        hidden: Tensor = self.second(torch.tanh(self.first(x + self.class_token[0])))
        return hidden


def build(dtype: torch.dtype = torch.float64) -> Model:
    """The same model in every process."""
    torch.manual_seed(5)
    return Model().to(dtype)


def batch(step: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """The global batch of a step."""
    return torch.randn(8, 6, generator=torch.Generator().manual_seed(step), dtype=torch.float64).to(
        dtype
    )


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    rows: slice,
    dtype: torch.dtype = torch.float64,
) -> None:
    """A few steps on these rows of every batch."""
    for step in range(STEPS):
        optimizer.zero_grad()
        model(batch(step, dtype)[rows]).square().mean().backward()
        optimizer.step()


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor, gathered where it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def run_sharded(
    world: World,
    mesh: DeviceMesh,
    dtype: torch.dtype = torch.float64,
    backend: str = "auto",
    **options: bool,
) -> dict[str, object]:
    """Train under fully_shard, counting the collectives of one step of the optimizer."""
    model = build(dtype)
    fully_shard(model, mesh=mesh)
    optimizer = LARS(model.parameters(), lr=LR, weight_decay=0.05, backend=backend, **options)
    calls = []
    all_reduce = dist.all_reduce

    def counted(tensor: Tensor, *arguments: object, **options: object) -> object:
        calls.append((tuple(tensor.shape), tensor.dtype))
        return all_reduce(tensor, *arguments, **options)

    optimizer.register_step_pre_hook(lambda *_: setattr(dist, "all_reduce", counted))
    optimizer.register_step_post_hook(lambda *_: setattr(dist, "all_reduce", all_reduce))
    rows = batch(0).shape[0] // world.world_size
    train(model, optimizer, slice(world.rank * rows, (world.rank + 1) * rows), dtype)
    buffers = [optimizer.state[p]["momentum_buffer"] for p in model.parameters()]
    return {
        "calls": calls,
        "params": {n: whole(p) for n, p in model.named_parameters()},
        "buffers": [whole(b) for b in buffers],
        "sharded_state": all(isinstance(b, DTensor) for b in buffers),
        "local_sizes": [p.to_local().numel() for p in model.parameters() if isinstance(p, DTensor)],
    }


NUMBERS: dict[type[torch.optim.Optimizer], dict[str, float]] = {
    LARC: {"lr": LR, "momentum": 0.9, "weight_decay": 0.05, "trust_coefficient": 0.1},
    SGD: {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.05},
}


def run_other(world: World, kind: type[torch.optim.Optimizer]) -> dict[str, object]:
    """LARC or SGD on one dimension, sharded."""
    model = build()
    fully_shard(model, mesh=init_device_mesh("cpu", (world.world_size,)))
    optimizer = kind(model.parameters(), **NUMBERS[kind])
    rows = batch(0).shape[0] // world.world_size
    train(model, optimizer, slice(world.rank * rows, (world.rank + 1) * rows))
    buffers = [optimizer.state[p]["momentum_buffer"] for p in model.parameters()]
    return {
        "params": {n: whole(p) for n, p in model.named_parameters()},
        "buffers": [whole(b) for b in buffers],
    }


def run_fsdp(
    world: World, dtype: torch.dtype = torch.float64, backend: str = "auto", **options: bool
) -> dict[str, object]:
    """One dimension, sharded."""
    mesh = init_device_mesh("cpu", (world.world_size,))
    return run_sharded(world, mesh, dtype, backend, **options)


def run_hsdp(world: World) -> dict[str, object]:
    """Every rank a replica: sums over the replicas would double the norms."""
    mesh = init_device_mesh("cpu", (world.world_size, 1), mesh_dim_names=("replicate", "shard"))
    return run_sharded(world, mesh)


def run_hsdp_sharded(world: World) -> dict[str, object]:
    """One replica over all ranks, on a mesh of two dimensions."""
    mesh = init_device_mesh("cpu", (1, world.world_size), mesh_dim_names=("replicate", "shard"))
    return run_sharded(world, mesh)


def run_mixed(world: World) -> dict[str, object]:
    """A sharded and a plain parameter in one optimizer; the norms of the plain
    one need no reduction.
    """
    model = build()
    fully_shard(model.first)
    optimizer = LARS(model.parameters(), lr=LR, weight_decay=0.05)
    train(model, optimizer, slice(None))
    return {"params": {n: whole(p) for n, p in model.named_parameters()}}


def run_shard_ratios(world: World) -> dict[str, object]:
    """Mutant: the op on local shards without reduction, as in an optimizer
    without support for DTensor.
    """
    model = build()
    fully_shard(model)
    params = list(model.parameters())
    buffers = [torch.zeros_like(p) for p in params]
    for step in range(STEPS):
        model.zero_grad()
        model(batch(step)).square().mean().backward()
        grads = [p.grad for p in params]
        parts = [[t.detach().to_local() for t in tensors] for tensors in (params, grads, buffers)]
        lars_step_(*parts, lr=LR, weight_decay=0.05)
    return {"params": {n: whole(p) for n, p in model.named_parameters()}}


def message_of(action: Callable[[], object]) -> str:
    """The text of the ValueError that an action must raise."""
    try:
        action()
    except ValueError as error:
        return str(error)
    return "no error"


def run_refusals(world: World) -> dict[str, object]:
    """A gradient with another placement than its parameter; apex with shards."""
    model = build()
    fully_shard(model)
    weight = model.first.weight
    weight.grad = None
    lone = nn.Parameter(weight.detach())
    lone.grad = distribute_tensor(
        torch.ones(5, 6, dtype=torch.float64), weight.device_mesh, [Replicate()]
    )
    named = list(model.named_parameters())
    return {
        "gradient": message_of(LARS([lone], lr=1.0).step),
        "apex": message_of(
            lambda: build_apex(
                "lamb", named, lr=0.0, weight_decay=0.0, betas=(0.9, 0.999), eps=1e-8
            )
        ),
    }


CASES: dict[str, Callable[[World], dict[str, object]]] = {
    "fsdp": run_fsdp,
    "fsdp fp32": lambda world: run_fsdp(world, torch.float32),
    "fsdp triton": lambda world: run_fsdp(world, backend="triton"),
    "fsdp in buffer": lambda world: run_fsdp(world, **IN_BUFFER),
    "hsdp": run_hsdp,
    "hsdp sharded": run_hsdp_sharded,
    "mixed": run_mixed,
    "larc": lambda world: run_other(world, LARC),
    "sgd": lambda world: run_other(world, SGD),
    "shard ratios": run_shard_ratios,
    "refusals": run_refusals,
}


if __name__ == "__main__":
    run_cases(CASES | run_adamw_ema.CASES)
