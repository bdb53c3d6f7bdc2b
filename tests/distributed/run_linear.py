"""Run by test_linear_fast.py on two ranks: a linear classifier on digits; results go to
OUT/rank<r>.pt."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from fastmoco.distributed.mesh import start_world, stop_world
from fastmoco.training import embed_run
from tests.fastmoco.training.test_linear_fast import build_eval_loader, measure, options


def main(out: Path, *digits: str) -> None:
    """Measure, and count the batches that this process embeds."""
    world = start_world("cpu")
    batches: list[int] = []

    def counted(*args: Any, **others: Any) -> Any:
        loader = build_eval_loader(*args, **others)
        plain = loader._show

        def show(encoded: Any, ids: Any) -> torch.Tensor:
            batches.append(len(ids))
            return plain(encoded, ids)

        loader._show = show
        return loader

    embed_run.build_eval_loader = counted
    result = measure(digits, options(out / "cache", copies=2), world)
    torch.save({"result": result, "batches": len(batches)}, out / f"rank{world.rank}.pt")
    stop_world()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
