"""Cost of a checkpoint: seconds that training waits, in units of one step, for
foreground and background saves.

A run of a small ViT on one constant batch alternates between some steps, a save in the foreground
and as many steps, and a save in the background and as many steps. `blocked` is the duration of the
call of the save; `added` is the additional time until it is committed, including steps that a
background save slows down on a shared processor. If disk flushes vary, use the range.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import interleave
from benchmarks.shown import Bars, Chart, low_high, markdown, number
from fastmoco.checkpoint import Saver
from fastmoco.checkpoint.folder import list_checkpoints
from fastmoco.checkpoint.loading import load_checkpoint
from fastmoco.config import KnnConfig
from fastmoco.distributed.mesh import start_world
from fastmoco.recipes import get_recipe, with_image_size
from fastmoco.training import state as training_state
from fastmoco.training.trainer import Trainer
from fastmoco_pipelines import pack_digits

NAME = "checkpoint_stall"
DEFAULTS = {
    "recipe": "quickstart_digits",
    "device": "auto",
    "architecture": "vit_tiny",
    "image_size": 64,
    "hidden_dim": 1024,
    "batch": 32,
    "steps": 3,
    "rounds": 5,
    "folder": "",
}
QUICK = {"architecture": "vit_nano", "image_size": 32, "hidden_dim": 256, "steps": 2, "rounds": 2}


def run(options: dict[str, Any]) -> dict[str, Any]:
    """Measure.

    Args:
        options: `recipe`, `device`, `architecture`, `image_size`, `hidden_dim` and `batch` of the
            run; `steps` after each save, long enough for the background save to end within them;
            `rounds`; `folder` on the disk to be measured (empty: the temporary folder).

    Returns:
        `failed`, for each kind of save whose checkpoint differs from the state, and then nothing
        else; `state_mb`; `step_s`, the median second of a step; `blocked` and `added`, each for `sync`
        and `async`, in steps: median, smallest and largest; `async_over_sync` of the blocked time;
        `share_of_a_run`, the blocked time of a save over the default interval between two.
    """
    with ExitStack() as stack:
        folder = Path(
            stack.enter_context(tempfile.TemporaryDirectory(dir=options["folder"] or None))
        )
        trainer = _trainer(options, folder)
        stack.callback(trainer.close)
        batch = trainer.loader.next()
        savers = {
            name: Saver(folder / name, keep=1, check=training_state.require_finite)
            for name in ("sync", "async")
        }
        blocked: dict[str, list[float]] = {name: [] for name in savers}
        number = iter(range(10**9))

        def segment(name: str) -> Callable[[], float]:
            def seconds() -> float:
                began = time.perf_counter()
                if name in savers:
                    saver = savers[name]
                    save = saver.save if name == "sync" else saver.save_in_background
                    tensors, rest = trainer._state()
                    save(step=next(number), tensors=tensors, state=rest)
                    blocked[name].append(time.perf_counter() - began)
                for _ in range(options["steps"]):
                    trainer.step(batch).loss.item()
                if name in savers:
                    error = savers[name].wait()
                    if error is not None:
                        raise error
                return time.perf_counter() - began

            return seconds

        measures = {name: segment(name) for name in ("none", "sync", "async")}
        for measure in measures.values():
            measure()  # fills caches and allocates the memory of the copy
        blocked = {name: [] for name in savers}
        figures = interleave(measures, rounds=options["rounds"])
        for name, saver in savers.items():
            tensors, rest = trainer._state()
            (saver.save if name == "sync" else saver.save_in_background)(
                step=next(number), tensors=tensors, state=rest
            )
            saver.settle()
        failed = {name: fault for name in savers if (fault := _fault(folder / name, trainer))}
        if failed:
            return {"failed": failed}
        megabytes = sum(tensor.nbytes for tensor in trainer._state()[0].values()) / 1e6
    step = statistics.median(figures["none"]) / options["steps"]
    added = {
        name: [
            (with_save - none) / step
            for with_save, none in zip(figures[name], figures["none"], strict=True)
        ]
        for name in savers
    }
    interval = get_recipe(options["recipe"]).checkpoint.every_minutes * 60
    return {
        "failed": failed,
        "state_mb": round(megabytes, 1),
        "step_s": round(step, 3),
        "blocked": {
            name: _spread([value / step for value in values]) for name, values in blocked.items()
        },
        "added": {name: _spread(values) for name, values in added.items()},
        "async_over_sync": round(
            statistics.median(blocked["async"]) / statistics.median(blocked["sync"]), 3
        ),
        "share_of_a_run": {
            name: float(f"{statistics.median(v) / interval:.3g}") for name, v in blocked.items()
        },
    }


def _fault(folder: Path, trainer: Trainer) -> str:
    """What differs between the state of a run and the checkpoint of it; "" if nothing."""
    saved = load_checkpoint(list_checkpoints(folder)[-1]).tensors
    state = trainer._state()[0]
    if saved.keys() != state.keys():
        return "the names of tensors differ from the state"
    wrong = [name for name, tensor in state.items() if not torch.equal(saved[name], tensor.cpu())]
    return f"differs from the state in {', '.join(wrong[:3])}" if wrong else ""


def table(result: Mapping[str, Any]) -> str:
    """A row for each kind of save."""
    rows = [
        (
            name,
            *(
                f"{number(spread['median'])} ({' to '.join(map(number, low_high(spread)))})"
                for spread in (result["blocked"][name], result["added"][name])
            ),
            number(100 * result["share_of_a_run"][name]),
        )
        for name in result.get("blocked", {})
    ]
    head = ("save", "steps that the call takes", "steps until it is committed", "% of a run")
    return markdown(head, rows)


def charts(result: Mapping[str, Any]) -> list[Chart]:
    """How long training waits for a save."""
    bars = {name: (s["median"], *low_high(s)) for name, s in result.get("blocked", {}).items()}
    return (
        [] if not bars else [Bars(title="Training waits for a checkpoint", unit="steps", bars=bars)]
    )


def _trainer(options: Mapping[str, Any], folder: Path) -> Trainer:
    """A run on one constant batch that never saves by itself."""
    config = get_recipe(options["recipe"])
    config = replace(
        config,
        epochs=1e6,
        device=options["device"],
        global_batch_size=options["batch"],
        log_every_steps=10**6,
        model=replace(
            config.model, architecture=options["architecture"], hidden_dim=options["hidden_dim"]
        ),
        knn=KnnConfig(every_epochs=0),
        data=replace(config.data, shards=pack_digits(folder / "data")[0], synthetic=True),
    )
    config = with_image_size(config, options["image_size"], patch_size=16)
    return Trainer.build(config, folder / "run", start_world(config.device))


def _spread(values: list[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(values), 3),
        "smallest": round(min(values), 3),
        "largest": round(max(values), 3),
    }
