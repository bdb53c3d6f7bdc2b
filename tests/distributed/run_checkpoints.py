"""One of several real processes: checkpoints, every case in one process group, as in run_ranks.py.

A model whose parts do not divide evenly, under FSDP2 or whole on every rank, is trained on the same
rows everywhere, so that any number of ranks computes the same losses.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from fastmoco.checkpoint import Saver, group_for_saving, load_latest, save_checkpoint, saver, shards
from fastmoco.distributed import World, start_world, stop_world
from fastmoco.errors import RunError
from fastmoco.optim.averaged import AveragedOptimizer, HostSkipped
from fastmoco.training import state as training_state
from tests.checkpoint_content import full_disk
from tests.distributed.cases import be_exact, be_impatient

STEPS = 3
"""Taken before the save; as many again after it."""


def model_and_optimizer(seed: int, *, sharded: bool) -> tuple[nn.Module, AveragedOptimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Tanh(), nn.Linear(7, 3)).double()
    model.register_buffer("count", torch.tensor(seed))
    if sharded:
        for part in model:
            if list(part.parameters()):
                fully_shard(part)
        fully_shard(model)
    return model, HostSkipped(torch.optim.AdamW(model.parameters(), lr=0.05), {})


def train(model: nn.Module, optimizer: AveragedOptimizer, steps: range) -> list[float]:
    losses = []
    for step in steps:
        rows = torch.randn(8, 5, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        loss = model(rows).square().mean()
        model.zero_grad()
        loss.backward()
        optimizer.inner.step()
        losses.append(loss.item())
    return losses


def whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies of the unsharded tensors."""
    return {
        n: (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone()
        for n, t in tensors.items()
    }


def run_save(root: Path, *, sharded: bool) -> dict[str, object]:
    """Train, save, and return the saved state and the losses of the next steps."""
    model, optimizer = model_and_optimizer(0, sharded=sharded)
    train(model, optimizer, range(STEPS))
    torch.manual_seed(100 + (dist.get_rank() if dist.is_initialized() else 0))
    group = group_for_saving(60)
    tensors = training_state.collect(model, optimizer)
    save_checkpoint(root, step=STEPS, tensors=tensors, state={"who": "us"}, keep=1, group=group)
    saved = whole(tensors)
    return {"saved": saved, "after": train(model, optimizer, range(STEPS, 2 * STEPS))}


def run_load(root: Path, *, sharded: bool) -> dict[str, object]:
    """Restore into another model, in place, and go on."""
    model, optimizer = model_and_optimizer(1, sharded=sharded)
    before = [
        tensor.to_local().data_ptr() if sharded else tensor.data_ptr()
        for tensor in model.parameters()
    ]
    checkpoint = load_latest(root)
    assert checkpoint is not None
    training_state.restore(model, optimizer, checkpoint)
    drawn = torch.rand(1)
    after = [
        tensor.to_local().data_ptr() if sharded else tensor.data_ptr()
        for tensor in model.parameters()
    ]
    moments = [
        value
        for state in optimizer.inner.state.values()
        for key, value in state.items()
        if key != "step"
    ]
    return {
        "in place": before == after,
        "moments are sharded": all(isinstance(value, DTensor) == sharded for value in moments)
        and bool(moments),
        "drawn": drawn,
        "loaded": whole(training_state.collect(model, optimizer)),
        "after": train(model, optimizer, range(STEPS, 2 * STEPS)),
        "skipped": checkpoint.skipped,
    }


def message_of(action: Callable[[], object]) -> str:
    """The text of the error that an action must raise."""
    try:
        action()
    except RunError as error:
        return str(error)
    return "no error"


def left(root: Path) -> list[str]:
    """The files after every rank has finished."""
    dist.barrier()
    return sorted(path.name for path in root.iterdir())


def some(step: int) -> dict[str, Tensor]:
    """Two large tensors, so that every rank has something to write, and one
    that only the last rank has.
    """
    tensors = {name: torch.full((3000,), float(step)) for name in "ab"}
    if dist.get_rank() == dist.get_world_size() - 1:
        tensors["mine"] = torch.full((3000,), -float(step))
    return tensors


def run_full_disk_on_one(root: Path) -> dict[str, object]:
    """The disk of the last rank is full, and then it is not."""
    group, last = group_for_saving(60), dist.get_rank() == dist.get_world_size() - 1

    def save(step: int) -> Path:
        return save_checkpoint(root, step=step, tensors=some(step), state={}, keep=2, group=group)

    save(1)
    if last:
        with full_disk():
            message = message_of(lambda: save(2))
    else:
        message = message_of(lambda: save(2))
    after = left(root)
    save(2)
    return {"message": message, "left": after, "then": left(root)}


def run_refused_on_one(root: Path) -> dict[str, object]:
    """One rank's state is not finite, or cannot be stored: no rank saves, and none waits."""
    last = dist.get_rank() == dist.get_world_size() - 1
    group = group_for_saving(60)
    subject = Saver(root, keep=1, group=group, check=training_state.require_finite)
    poisoned = some(1) | {"mine": torch.full((2,), float("nan") if last else 1.0)}
    sparse = some(1) | ({"mine": torch.eye(2).to_sparse()} if last else {})
    return {
        "poisoned": message_of(lambda: subject.save(step=1, tensors=poisoned, state={})),
        "sparse": message_of(
            lambda: save_checkpoint(root, step=1, tensors=sparse, state={}, keep=1, group=group)
        ),
        "exists": root.exists() and any(root.iterdir()),
    }


def run_background(root: Path) -> dict[str, object]:
    """A background save during communication between ranks; then one that fails
    on one rank and is reported on all.
    """
    subject, held = Saver(root, keep=1, group=group_for_saving(60)), threading.Event()
    inner = saver.save_checkpoint

    def later(*arguments: object, **options: object) -> Path:
        assert held.wait(30)
        return inner(*arguments, **options)  # type: ignore[arg-type]

    model, optimizer = model_and_optimizer(0, sharded=True)
    train(model, optimizer, range(STEPS))
    with mock.patch.object(saver, "save_checkpoint", later):
        tensors = training_state.collect(model, optimizer)
        saved = whole(tensors)
        subject.save_in_background(step=STEPS, tensors=tensors, state={})
        train(model, optimizer, range(STEPS, STEPS + 2))
        held.set()
        train(model, optimizer, range(STEPS + 2, STEPS + 20))
        first = subject.wait()
    checkpoint = load_latest(root)
    assert checkpoint is not None
    with full_disk() if dist.get_rank() == 0 else mock.MagicMock():
        big = some(9)
        subject.save_in_background(step=9, tensors=big, state={})
        second = subject.wait()
    return {
        "errors": (first, str(second)),
        "saved": saved,
        "loaded": checkpoint.tensors,
        "left": left(root),
        "step": subject.saved_step,
    }


def run_hung_rank(root: Path) -> dict[str, object]:
    """The last rank comes long after the deadline."""
    group = group_for_saving(60)
    save_checkpoint(root, step=1, tensors=some(1), state={}, keep=1, group=group)
    be_impatient(group, 2)
    if dist.get_rank() == dist.get_world_size() - 1:
        time.sleep(4)
    message = message_of(
        lambda: save_checkpoint(root, step=2, tensors=some(2), state={}, keep=1, group=group)
    )
    return {"message": message, "left": left(root)}


def run_dead_rank(root: Path) -> dict[str, object]:
    """The last rank ends before its write, with the folder of an earlier step
    present. This case must be the last.
    """
    group = group_for_saving(20)
    save_checkpoint(root, step=1, tensors=some(1), state={}, keep=1, group=group)
    if dist.get_rank() == dist.get_world_size() - 1:
        shards.write_shards = lambda *arguments: os._exit(0)  # type: ignore[assignment]
    message = message_of(
        lambda: save_checkpoint(root, step=2, tensors=some(2), state={}, keep=1, group=group)
    )
    return {"message": message, "left": sorted(p.name for p in root.iterdir())}


CASES: dict[str, Callable[[Path], dict[str, object]]] = {
    "save sharded": lambda out: run_save(out / "sharded", sharded=True),
    "save plain": lambda out: run_save(out / "plain", sharded=False),
    **{
        f"load {kind} into {target}": (
            lambda out, kind=kind, target=target: run_load(out / kind, sharded=target == "shards")  # type: ignore[misc]
        )
        for kind in ("sharded", "plain", "one file")
        for target in ("shards", "whole")
    },
    "full disk on one": lambda out: run_full_disk_on_one(out / "full"),
    "refused on one": lambda out: run_refused_on_one(out / "refused"),
    "background": lambda out: run_background(out / "background"),
    "hung rank": lambda out: run_hung_rank(out / "hung"),
    "dead rank": lambda out: run_dead_rank(out / "dead"),
}


def main() -> None:
    """Run the cases named on the command line and leave the results in the folder given first."""
    be_exact()
    out = Path(sys.argv[1])
    world: World = start_world("cpu", timeout_s=60)
    if world.world_size == 1:  # FSDP2 needs a group, even of one
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    results: dict[str, object] = {}
    for name in sys.argv[2:]:
        torch.save(results, out / f"rank{world.rank}.pt")  # for the rank that dies
        results[name] = CASES[name](out)
    torch.save(results, out / f"rank{world.rank}.pt")
    if "dead rank" not in sys.argv:
        stop_world()


if __name__ == "__main__":
    main()
