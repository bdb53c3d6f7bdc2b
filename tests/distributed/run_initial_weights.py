"""A case of run_trainer.py: `model.init` from one file, from files that differ, and from one that a
rank lacks."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from fastmoco.distributed import World
from fastmoco.errors import RunError
from fastmoco.objectives.build import build_objective
from fastmoco.training.initial_weights import start_from
from tests.official_checkpoints import official_checkpoint
from tests.step_runs import short_run


def started(world: World, path: Path) -> str:
    """Hash of the weights of this rank, or the error."""
    config = short_run("cpu", init=str(path))
    objective = build_objective(config, world.device)
    try:
        start_from(config, objective, world)
    except RunError as error:
        return str(error)
    digest = hashlib.sha256()
    for tensor in objective.state_dict().values():
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def starts(out: Path, world: World) -> dict[str, str]:
    """Each rank has its own folder of files."""
    folder = out / f"files{world.rank}"
    folder.mkdir()
    content = dict(official_checkpoint("vit", patch=4))
    torch.save(content, folder / "same")
    torch.save({**content, "epoch": world.rank}, folder / "other")
    if world.rank == 0:
        torch.save(content, folder / "absent")
    return {name: started(world, folder / name) for name in ("same", "other", "absent")}
