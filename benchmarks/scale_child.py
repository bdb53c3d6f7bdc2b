"""One rank of the case `scale`: collectives, FSDP2 units and training steps, in turn.

`python -m benchmarks.scale_child OPTIONS` prints one JSON line with seconds by name. All ranks take
each measurement together, every measurement once per round, and the rounds' medians are the result.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from fastmoco.config import BatchConfig, Config, KnnConfig, ParallelConfig
from fastmoco.distributed.gather import all_gather_single
from fastmoco.distributed.mesh import World, start_world, stop_world
from fastmoco.recipes import quickstart_digits
from fastmoco.training.trainer import Trainer
from fastmoco_pipelines.loading.batch import Batch

UNITS = 4
"""FSDP2 units of the stack whose gathers are measured."""


def config_of(name: str, ranks: int) -> Config:
    """The config of a step by its name: `architecture/pixels/images of a rank/hidden/strategy`."""
    architecture, side, images, hidden, strategy = name.split("/")
    recipe = quickstart_digits()
    model = replace(
        recipe.model,
        architecture=architecture,  # type: ignore[arg-type]
        image_size=int(side),
        patch_size={"vit_nano": 2, "vit_micro": 4, "vit_tiny": 16}[architecture],
        hidden_dim=int(hidden),
        projection_dim=64,
        attention="sdpa",
    )
    views = {
        field: replace(getattr(recipe.data, field), size=int(side)) for field in ("view1", "view2")
    }
    return replace(
        recipe,
        global_batch_size=int(images) * ranks,
        precision="fp32",
        device="cpu",
        threads=1,
        model=model,
        batch=BatchConfig(chunk="none"),
        parallel=ParallelConfig(strategy=strategy, verify_replicas_every=0),  # type: ignore[arg-type]
        data=replace(recipe.data, synthetic=True, **views),
        knn=KnnConfig(every_epochs=0),
        log_every_steps=10**6,
    )


def _collective(kind: str, size: int, ranks: int) -> Callable[[], Any]:
    """A collective of float32 elements, `size` bytes of the whole."""
    whole = torch.ones(max(1, size // 4 // ranks) * ranks)
    part = torch.ones(whole.numel() // ranks)
    scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    return {
        "all_gather": lambda: all_gather_single(whole, part),
        "reduce_scatter": lambda: scatter(part, whole),
        "all_reduce": lambda: dist.all_reduce(whole),
    }[kind]


def _stack(width: int, *, sharded: bool, train: bool) -> Callable[[], Any]:
    """A pass through linear layers, each an FSDP2 unit, of one row."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    layers = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(UNITS)))
    if sharded:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in layers:
            fully_shard(layer, mesh=mesh, reshard_after_forward=True)
        fully_shard(layers, mesh=mesh, reshard_after_forward=True)
    rows = torch.ones(1, width)

    def forward() -> None:
        with torch.no_grad():
            layers(rows)

    def forward_backward() -> None:
        layers(rows).sum().backward()
        layers.zero_grad(set_to_none=True)

    return forward_backward if train else forward


def _step(name: str, world: World, closing: ExitStack) -> Callable[[], Any]:
    """A training step on one random batch."""
    config = config_of(name, world.world_size)
    folder = closing.enter_context(tempfile.TemporaryDirectory())
    trainer = Trainer.build(config, Path(folder), world)
    closing.callback(trainer.close)
    side, images = config.model.image_size, config.global_batch_size // world.world_size
    views = torch.randn(2, images, 3, side, side).unbind()
    ids = torch.arange(images).numpy()
    steps = iter(range(10**9))
    return lambda: trainer.step(Batch(views=views, sample_ids=ids, step=next(steps)))


def measure(options: dict[str, Any], world: World, meet: Callable[[], None]) -> dict[str, Any]:
    """Medians over rounds of wall seconds and of CPU seconds of this process.

    Args:
        options: `collectives`, `stacks` and `steps`: names; `rounds`; `seconds`: of a measurement.
        world: this process among its peers.
        meet: waits until all processes call it.
    """
    with ExitStack() as closing:
        calls: dict[str, Callable[[], Any]] = {}
        for name in options["collectives"]:
            kind, size = name.split("/")
            calls[name] = _collective(kind, int(size), world.world_size)
        for name in options["stacks"]:
            width, sharded, train = name.split("/")[1:]
            calls[name] = _stack(int(width), sharded=sharded == "sharded", train=train == "train")
        for name in options["steps"]:
            calls[name] = _step(name, world, closing)

        # The same number of calls on all ranks, from the time of one on rank 0.
        repeats = {}
        for name, call in calls.items():
            for _ in range(2):
                call()
            meet()
            began = time.perf_counter()
            call()
            took = time.perf_counter() - began
            repeats[name] = max(1, min(50, round(options["seconds"] / max(took, 1e-6))))
        repeats = _of_rank_0(repeats, world)

        wall: dict[str, list[float]] = {name: [] for name in calls}
        cpu: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(options["rounds"]):
            for name, call in calls.items():
                meet()
                used = time.process_time()
                for _ in range(repeats[name]):
                    began = time.perf_counter()
                    call()
                    wall[name].append(time.perf_counter() - began)
                cpu[name].append((time.process_time() - used) / repeats[name])
        meet()
    return {
        name: {"wall_s": statistics.median(wall[name]), "cpu_s": statistics.median(cpu[name])}
        for name in calls
    }


def _of_rank_0(repeats: dict[str, int], world: World) -> dict[str, int]:
    if not dist.is_initialized():
        return repeats
    numbers = torch.tensor(list(repeats.values()))
    dist.broadcast(numbers, src=0)
    return dict(zip(repeats, numbers.tolist(), strict=True))


def main(options: dict[str, Any]) -> None:
    """Measure, and print the result as one JSON line."""
    torch.set_num_threads(1)
    if options["connected"]:
        world = start_world("cpu")
        meet: Callable[[], None] = dist.barrier if world.world_size > 1 else lambda: None
        found = measure(options, world, meet)
        stop_world()
    else:  # processes that compute at the same time, each alone
        ranks, rank = int(os.environ.pop("WORLD_SIZE")), int(os.environ.pop("RANK"))
        store = dist.TCPStore(  # type: ignore[attr-defined]
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), ranks, rank == 0
        )
        for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"):
            os.environ.pop(name)
        met = iter(range(10**9))

        def meet() -> None:
            name = f"met/{next(met)}"
            if store.add(name, 1) == ranks:
                store.set(f"{name}/all", "")
            store.wait([f"{name}/all"])

        found = measure(options, World(device=torch.device("cpu")), meet)
    print(json.dumps(found))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
