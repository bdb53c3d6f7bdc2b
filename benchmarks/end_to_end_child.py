"""One contender of the case `end_to_end` in a process of its own, which obeys its standard input.

    python -m benchmarks.end_to_end_child '{"contender": "fastmoco", "size": 96, ...}'

reads one word a line (`check`, `turn`, `parts`, `memory`, `end`) and answers each by a line of
JSON.
"""

from __future__ import annotations

import io
import json
import logging
import os
import resource
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.baseline import data
from benchmarks.baseline.trainer import IMAGENET, Baseline
from benchmarks.cpu_time import cpu_seconds, settle
from benchmarks.loading import Feed
from benchmarks.ranks import status_bytes
from fastmoco.config import Config, DataConfig, KnnConfig, MoCoV3Config, ModelConfig, OptimConfig
from fastmoco.distributed.mesh import start_world
from fastmoco.models.vit import ARCHITECTURES, ViTArchitecture
from fastmoco.objectives.build import build_objective
from fastmoco.training.trainer import Trainer
from fastmoco_pipelines import Batch, build_loader
from fastmoco_pipelines.loading.step_parts import AUGMENT, DECODE, READ, PartFigures, collecting
from fastmoco_pipelines.spec import moco_v3_views

FASTMOCO = ("fastmoco", "fastmoco compiled")
BASELINE = ("baseline eager", "baseline sdpa", "baseline compiled")
CONTENDERS = FASTMOCO + BASELINE
CPU = torch.device("cpu")
OF_LOADER = (READ, DECODE, AUGMENT)
"""Parts of a step in a loader."""


def config_of(options: dict[str, Any]) -> Config:
    """A small ViT on the views of MoCo v3; `vit_tiny` with the asked width, depth and heads."""
    shape = (options["width"], options["depth"], options["heads"])
    ARCHITECTURES["vit_tiny"] = ViTArchitecture(*shape)
    size = options["size"]
    view1, view2 = moco_v3_views(size)
    return Config(
        recipe="end_to_end",
        device="cpu",
        precision=options["precision"],
        threads=options["threads"],
        global_batch_size=options["batch"],
        model=ModelConfig(
            architecture="vit_tiny",
            image_size=size,
            patch_size=16,
            hidden_dim=options["hidden"],
            projection_dim=256,
            compile=options["contender"] == "fastmoco compiled",
        ),
        objective=MoCoV3Config(),
        optim=OptimConfig(),
        data=DataConfig(
            shards=options["shards"], view1=view1, view2=view2, threads=options["threads"]
        ),
        knn=KnnConfig(every_epochs=0),
    )


class Side(ABC):
    """A contender: whole steps from shards, and single steps on given views.

    Attributes:
        feed: its loader, for the idle moments between measurements.
    """

    feed: Feed

    @abstractmethod
    def first_losses(self, steps: int) -> list[float]:
        """Losses of the first steps."""

    @abstractmethod
    def train(self, steps: int) -> None:
        """Some steps of its training loop."""

    def train_here(self, steps: int) -> None:
        """The same with all work in this process."""
        self.train(steps)

    @abstractmethod
    def take_here(self) -> None:
        """One batch without a step, made in this process."""

    @abstractmethod
    def step(self, view1: Tensor, view2: Tensor) -> None:
        """One step on given views."""


class FastmocoSide(Side):
    """fastmoco's trainer."""

    def __init__(self, config: Config, stack: ExitStack) -> None:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        self.trainer = Trainer.build(config, Path(folder) / "run", start_world("cpu"))
        stack.callback(self.trainer.close)
        loader = self.trainer.loader
        self.feed = Feed(
            name="", next=lambda: None, resting=lambda: getattr(loader, "resting", True)
        )

    def first_losses(self, steps: int) -> list[float]:
        """By single steps."""
        loader = self.trainer.loader
        return [self.trainer.step(loader.next()).loss.item() for _ in range(steps)]

    def train(self, steps: int) -> None:
        """The trainer's own loop."""
        self.trainer.run(max_steps=steps)

    def take_here(self) -> None:
        """From the loader's threads."""
        self.trainer.loader.next()

    def step(self, view1: Tensor, view2: Tensor) -> None:
        """The trainer's step."""
        ids = torch.arange(len(view1)).numpy()
        self.trainer.step(Batch(views=(view1, view2), sample_ids=ids, step=0))


class BaselineSide(Side):
    """The plain PyTorch trainer and its DataLoader."""

    def __init__(self, config: Config, contender: str, workers: int) -> None:
        self.config = config
        # Workers are forked, so start them before anything has threads.
        self.batches = None if config.data.synthetic else data.batches(config, workers)
        self.here: Iterator[tuple[Tensor, Tensor, Tensor]] | None = None
        self.baseline = Baseline(
            config,
            CPU,
            attention="explicit" if contender == "baseline eager" else "sdpa",
            compiled=contender == "baseline compiled",
            sample_count=(IMAGENET if config.data.synthetic else data.sample_count(config)),
        )
        self.baseline.load_from(build_objective(config, CPU))
        self.feed = Feed(name="", next=lambda: None)

    def first_losses(self, steps: int) -> list[float]:
        """By single steps."""
        assert self.batches is not None  # noqa: S101 - a type: begun before steps are asked for
        pairs = (next(self.batches)[:2] for _ in range(steps))
        return [self.baseline.step(*pair).item() for pair in pairs]

    def train(self, steps: int) -> None:
        """The loop of the baseline."""
        assert self.batches is not None  # noqa: S101 - a type: begun before steps are asked for
        self.baseline.train(self.batches, steps)

    def train_here(self, steps: int) -> None:
        """Without worker processes."""
        self.baseline.train(self._batches_here(), steps)

    def take_here(self) -> None:
        """Without worker processes."""
        next(self._batches_here())

    def _batches_here(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        if self.here is None:
            self.here = data.batches(self.config)
        return self.here

    def step(self, view1: Tensor, view2: Tensor) -> None:
        """The step of the baseline."""
        self.baseline.step(view1, view2)


def open_side(options: dict[str, Any], stack: ExitStack, *, synthetic: bool = False) -> Side:
    """Build the contender of the options."""
    config = config_of(options)
    if synthetic:
        config = replace(config, data=replace(config.data, shards="", synthetic=True))
    if options["contender"] in FASTMOCO:
        return FastmocoSide(config, stack)
    return BaselineSide(config, options["contender"], options["threads"])


def check(side: Side, options: dict[str, Any]) -> dict[str, Any]:
    """First losses, and what the first step cost."""
    cpu, wall = _cpu_with_compilers(), time.perf_counter()
    losses = side.first_losses(1)
    first = {
        "first_step_cpu_s": round(_cpu_with_compilers() - cpu, 2),
        "first_step_s": round(time.perf_counter() - wall, 2),
    }
    return {"losses": losses + side.first_losses(options["checked"] - 1), **first}


def turn(side: Side, options: dict[str, Any]) -> dict[str, Any]:
    """Images per CPU-second of some steps, workers included, between two idle moments."""
    settle(side.feed, quiet_s=0.2)
    before = cpu_seconds()
    side.train(options["steps"])
    settle(side.feed, quiet_s=0.2)
    images = options["steps"] * options["batch"]
    return {"images_per_cpu_s": images / (cpu_seconds() - before)}


def parts(side: Side, options: dict[str, Any]) -> dict[str, Any]:
    """CPU milliseconds per image of the parts of a step, with all work in this process.

    The loader is measured alone first, because threads of DALI have no marks: while nothing else
    runs, what they take belongs to the parts of the loader.
    """
    steps = options["steps"]
    scale = 1e3 / (steps * options["batch"])

    def measured(work: Callable[[], None], *, helpers: bool) -> tuple[float, dict[str, float]]:
        """Milliseconds per image of some steps: all, and by part."""
        with collecting(helpers=helpers) as collector:
            work()  # threads are known from their first mark on
            settle(side.feed, quiet_s=0.2)
            total, before = collector.cpu_s, _seconds(collector.figures())
            for _ in range(steps):
                work()
            settle(side.feed, quiet_s=0.2)
            total, after = collector.cpu_s - total, _seconds(collector.figures())
        by_part = {name: (after[name] - before.get(name, 0.0)) * scale for name in after}
        return total * scale, by_part

    loading, figures = measured(side.take_here, helpers=True)
    found = {name: figures[name] for name in OF_LOADER if name in figures}
    found["hand over"] = loading - sum(found.values())

    # Whole steps, in which the loader takes as long.
    total, figures = measured(lambda: side.train_here(1), helpers=False)
    found |= {name: value for name, value in figures.items() if name not in OF_LOADER}
    found["rest"] = total - sum(found.values())
    rounded = {name: round(value, 4) for name, value in found.items()}
    return {"parts": rounded, "total": round(total, 4)}


def _seconds(figures: Mapping[str, PartFigures]) -> dict[str, float]:
    """Processor seconds by part."""
    return {name: own.cpu_s for name, own in figures.items()}


def memory(options: dict[str, Any]) -> dict[str, Any]:
    """Bytes by which a warm step and a loader raise the resident set.

    The step has given views. Of a loader with worker processes the private memory of these is
    reported apart.
    """
    with ExitStack() as stack:
        grown = _loader_bytes(options, stack)
    with ExitStack() as stack:
        side = open_side(options, stack, synthetic=True)
        size = options["size"]
        views = torch.randn(2, options["batch"], 3, size, size)
        for _ in range(2):
            side.step(views[0], views[1])
        Path("/proc/self/clear_refs").write_text("5")
        before = status_bytes("VmRSS")
        side.step(views[0], views[1])
        return {"step_bytes": status_bytes("VmHWM") - before, **grown}


def _loader_bytes(options: dict[str, Any], stack: ExitStack) -> dict[str, int]:
    """Growth of this process by a loader, and the private memory of its workers."""
    config = config_of(options)
    before = status_bytes("VmRSS")
    take: Callable[[], Any]
    if options["contender"] in FASTMOCO:
        spec = config.loader_spec(device="cpu", threads=options["threads"])
        loader = stack.enter_context(build_loader(spec))
        take, feed = loader.next, Feed(name="", next=lambda: None, resting=lambda: loader.resting)
    else:
        batches = data.batches(config, options["threads"])
        take, feed = lambda: next(batches), Feed(name="", next=lambda: None)
    for _ in range(3):
        take()
    settle(feed, quiet_s=0.2)
    private = 0
    for worker in torch.multiprocessing.active_children():
        for line in Path(f"/proc/{worker.pid}/smaps_rollup").read_text().splitlines():
            if line.startswith(("Private_Clean:", "Private_Dirty:")):
                private += 1024 * int(line.split()[1])
    return {"loader_bytes": status_bytes("VmRSS") - before, "workers_bytes": private}


def _cpu_with_compilers() -> float:
    """Processor time of this process, its workers, and the compilers that it has started."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return cpu_seconds() + ended.ru_utime + ended.ru_stime


def main() -> None:
    """Answer the words of standard input."""
    options = json.loads(sys.argv[1])
    # Whatever the contender prints goes to standard error; answers have the output alone.
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)
        logging.basicConfig(stream=io.StringIO(), level=logging.INFO)
        torch.set_num_threads(options["threads"])
        with ExitStack() as stack:
            side: Side | None = None
            for line in sys.stdin:
                word = line.strip()
                if word == "end":
                    break
                if word == "memory":
                    answer = memory(options)
                else:
                    side = side or open_side(options, stack)
                    answer = {"check": check, "turn": turn, "parts": parts}[word](side, options)
                print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
