"""Cases of run_lars.py: AdamWEMA under FSDP2."""

from __future__ import annotations

import os
from collections.abc import Callable

os.environ["TRITON_INTERPRET"] = "1"  # CPU processes on any machine

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

from fastmoco.distributed import World
from fastmoco_kernels.adamw_ema.optimizer import AdamWEMA

STEPS = 3
OPTIONS = {"lr": 0.02, "weight_decay": 0.1}
MOMENTUM = 0.9


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


def build(seed: int) -> Model:
    """The same model in every process."""
    torch.manual_seed(seed)
    return Model()


def train(model: nn.Module, rows: slice, update: Callable[[], object]) -> None:
    """A few steps on these rows of every batch."""
    for step in range(STEPS):
        for param in model.parameters():
            param.grad = None
        batch = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
        model(batch[rows]).square().mean().backward()
        update()


def whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The whole tensors, gathered."""
    return {
        name: t.full_tensor() if isinstance(t, DTensor) else t.detach()
        for name, t in tensors.items()
    }


def run_sharded(world: World, backend: str) -> dict[str, object]:
    """Train under fully_shard with a sharded momentum encoder."""
    model = build(5)
    momentum_model = build(6)
    fully_shard(model)
    fully_shard(momentum_model)
    params = dict(model.named_parameters())
    averages = dict(momentum_model.named_parameters())
    optimizer = AdamWEMA(
        model.parameters(),
        **OPTIONS,
        averages={params[n]: averages[n] for n in params if n != "second.weight"},
        backend=backend,
    )
    rows = 8 // world.world_size
    train(
        model,
        slice(world.rank * rows, (world.rank + 1) * rows),
        lambda: optimizer.step(ema_momentum=MOMENTUM),
    )
    state = optimizer.state_dict()["state"]
    return {
        "params": whole(params),
        "averages": whole(averages),
        "sharded_state": all(isinstance(own["exp_avg"], DTensor) for own in state.values()),
        "local_sizes": [p.to_local().numel() for p in params.values()],
    }


def run_torch_takes_over(world: World) -> dict[str, object]:
    """Half of the steps here, the rest with torch.optim.AdamW on the same shards."""
    model = build(5)
    fully_shard(model)
    own = AdamWEMA(model.parameters(), **OPTIONS)
    rows = 8 // world.world_size
    mine = slice(world.rank * rows, (world.rank + 1) * rows)
    train(model, mine, own.step)
    torchs = torch.optim.AdamW(model.parameters())
    torchs.load_state_dict(own.state_dict())
    train(model, mine, torchs.step)
    return {"params": whole(dict(model.named_parameters()))}


def run_refusal(world: World) -> dict[str, object]:
    """A gradient with another placement than its parameter."""
    model = build(5)
    fully_shard(model)
    weight = nn.Parameter(model.first.weight.detach())
    weight.grad = distribute_tensor(torch.ones(5, 6), model.first.weight.device_mesh, [Replicate()])
    try:
        AdamWEMA([weight]).step()
    except ValueError as error:
        return {"text": str(error)}
    return {"text": "no error"}


CASES: dict[str, Callable[[World], dict[str, object]]] = {
    "adamw foreach": lambda world: run_sharded(world, "foreach"),
    "adamw triton": lambda world: run_sharded(world, "triton"),
    "adamw, then torch": run_torch_takes_over,
    "adamw refusal": run_refusal,
}
