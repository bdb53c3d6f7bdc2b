"""One run of the learning benchmark, in a process of its own: kNN on a grid of images seen.

`python -m benchmarks.learning.side JSON` trains one side on one task with one seed and prints the
curve. CPU-seconds are those of training: all threads of the process, the loader's among them, and
processes that it starts. Start, measurements of kNN and watching the baseline are not in them.
"""

from __future__ import annotations

import itertools
import json
import math
import resource
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save
from torch import Tensor, nn

from benchmarks.cpu_time import cpu_seconds, settle
from benchmarks.learning.runs import END, START
from benchmarks.learning.tasks import Data, config_of
from benchmarks.loading import Feed
from fastmoco.config import Config
from fastmoco.distributed.mesh import World, start_world
from fastmoco.evaluation.monitor import KnnMonitor
from fastmoco.models.encoder import trunk_of
from fastmoco.models.encoder_file import describe_run
from fastmoco.models.precision import choose_precision
from fastmoco.objectives.build import build_objective
from fastmoco.run.metrics_file import SPIKE
from fastmoco.telemetry.detectors import DipDetector, SpikeDetector
from fastmoco.training.trainer import Trainer
from fastmoco_pipelines import Loader, ShardSet

WATCHED = "first_block"
"""The place whose gradient norm is stored: the trained layer nearest to the input, where the
instability of MoCo v3 shows first."""


FIRST = 5
"""Steps of an exact run before the cost of a step is known."""


class Side(Protocol):
    """A trainer of one config.

    Attributes:
        losses: (step, loss) of some steps.
        norms: (step, largest gradient norm since the row before).
        events: signs of instability, as sentences.
        uncounted_s: CPU-seconds that `advance` has spent on watching.
    """

    losses: list[tuple[int, float]]
    norms: list[tuple[int, float]]
    events: list[str]
    uncounted_s: float

    @property
    def encoder(self) -> nn.Module:
        """Images to features, for an evaluation."""
        ...

    def advance(self, steps: int) -> None:
        """Train."""

    def resting(self) -> bool:
        """Whether no thread of this process prefetches."""
        ...

    def close(self) -> None:
        """End the run; afterwards the records are complete."""


class FastmocoSide:
    """The trainer of `fastmoco train`."""

    uncounted_s = 0.0

    def __init__(self, config: Config, folder: Path, world: World) -> None:
        self._trainer = Trainer.build(config, folder / "run", world)
        self.losses: list[tuple[int, float]] = []
        self.norms: list[tuple[int, float]] = []
        self.events: list[str] = []

    @property
    def encoder(self) -> nn.Module:
        """The one that an evaluation uses."""
        objective = self._trainer.objective
        encoder: nn.Module = getattr(objective, "evaluation_encoder", objective.encoder)
        return encoder

    def advance(self, steps: int) -> None:
        """Train."""
        self._trainer.run(max_steps=steps)

    def resting(self) -> bool:
        """Whether the loader's threads wait."""
        loader = self._trainer.loader
        return not isinstance(loader, Loader) or loader.resting

    def close(self) -> None:
        """End the run, and read what it has recorded."""
        trainer = self._trainer
        skipped = trainer.guard.skipped
        trainer.close()
        self.losses = trainer.folder.read_metric("loss")
        self.norms = trainer.folder.read_metric(f"gradient_norm/{WATCHED}")
        spikes = trainer.folder.read_metric(f"{SPIKE}{WATCHED}")
        self.events = [f"step {step}: gradient spike {value:.3g}" for step, value in spikes]
        if skipped:
            self.events.append(f"{skipped} skipped steps")


class BaselineSide:
    """The plain PyTorch trainer, with the same first weights, images and draws."""

    def __init__(self, config: Config, samples: int, given: Mapping[str, Any]) -> None:
        from benchmarks.baseline.data import batches
        from benchmarks.baseline.trainer import Baseline

        device = torch.device("cpu")
        self._baseline = Baseline(
            config, device, attention=given["attention"], sample_count=samples
        )
        objective = build_objective(config, device)
        self._baseline.load_from(objective)
        self._batches = batches(config, workers=given["workers"])
        # Parameters of both have the same names.
        places = objective.places()
        self._watched = [
            parameter
            for name, parameter in self._baseline.model.named_parameters()
            if WATCHED in places.get(name, ())
        ]
        self._log_every = config.log_every_steps
        self._spikes = SpikeDetector()
        self.losses: list[tuple[int, float]] = []
        self.norms: list[tuple[int, float]] = []
        self.events: list[str] = []
        self.uncounted_s = 0.0

    @property
    def encoder(self) -> nn.Module:
        """The query side, without its projector."""
        return _Features(self._baseline.encoder)

    def advance(self, steps: int) -> None:
        """Train."""
        for _ in range(steps):
            view1, view2, *_ = next(self._batches)
            loss = self._baseline.step(view1, view2)
            before = time.process_time()
            self._watch(loss)
            self.uncounted_s += time.process_time() - before

    def _watch(self, loss: Tensor) -> None:
        step = self._baseline.steps
        gradients = [p.grad for p in self._watched if p.grad is not None]
        norm = float(torch.stack([g.double().norm() for g in gradients]).norm())
        if step % self._log_every == 0 or step == 1:  # those of which a run writes the loss
            self.losses.append((step, float(loss)))
        self.norms.append((step, norm))
        self.events += [str(spike) for spike in self._spikes.observe(step, {WATCHED: norm})]

    def resting(self) -> bool:
        """Its workers are processes, which `settle` watches itself."""
        return True

    def close(self) -> None:
        """End the workers."""
        del self._batches


class _Features(nn.Module):
    """An encoder of the baseline as evaluations call it."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.encoder.features(images)  # type: ignore[operator]
        return features


def run_side(given: Mapping[str, Any]) -> dict[str, Any]:
    """Train one side and measure its kNN every `every` steps.

    Args:
        given: `task`, `side`, `seed`, `data` (`Data` as a dict), `every` steps between two points,
            `points` at least, `budget_s` CPU-seconds, `attention` and `workers` of the baseline;
            perhaps `config`, arguments of `tasks.config_of` by name, `until`, a kNN, `encoders`, a
            folder that gets the encoder before and after the run as `runs.START` and `runs.END`, and
            `exact`. The run ends at the first point with so many points and seconds, or with that
            kNN; an exact one at the first step with so many seconds, which is a point.

    Returns:
        Lists with one value for each point: `images`, `cpu_s`, `knn`, `loss` (mean since the point
        before) and `gradient` (largest norm of the first block since then), the last two None at
        the start; `events`, signs of instability.
    """
    torch.set_num_threads(1)
    data = Data(**given["data"])
    shards = ShardSet.open(data.train)
    samples = len(shards)
    shards.close()
    more = given.get("config", {})
    config = config_of(given["task"], data, seed=given["seed"], samples=samples, **more)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fastmoco-side-")))
        world = start_world("cpu")
        precision = choose_precision(config.precision, world.device)
        monitor = KnnMonitor(config, world, threads=1, device="cpu", precision=precision)
        stack.callback(monitor.close)
        side: Side
        side = (
            FastmocoSide(config, folder, world)
            if given["side"] == "fastmoco"
            else BaselineSide(config, samples, given)
        )
        stack.callback(side.close)
        if kept := given.get("encoders", ""):
            write_encoder(side.encoder, config, Path(kept) / START)
        curve = train(side, monitor, given, config.global_batch_size)
        if kept:
            write_encoder(side.encoder, config, Path(kept) / END)

    # The trainer's own records are complete once it is closed.
    steps = [images // config.global_batch_size for images in curve["images"]]
    for before, after in itertools.pairwise(steps):
        of = range(before + 1, after + 1)
        losses = [value for step, value in side.losses if step in of]
        norms = [value for step, value in side.norms if step in of]
        curve["loss"].append(round(sum(losses) / len(losses), 4) if losses else None)
        curve["gradient"].append(float(f"{max(norms):.3g}") if norms else None)
    curve["events"] += side.events
    return curve


def write_encoder(encoder: nn.Module, config: Config, path: Path) -> None:
    """Write an encoder as a file that `fastmoco eval` takes."""
    trunk = {name: value.contiguous() for name, value in trunk_of(encoder.state_dict()).items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(save(trunk, describe_run(config).to_metadata()))


def train(side: Side, monitor: KnnMonitor, given: Mapping[str, Any], batch: int) -> dict[str, Any]:
    """The points of a run, without what the trainer has recorded."""
    feed = Feed(name=given["side"], next=lambda: None, resting=side.resting)
    curve: dict[str, Any] = {
        "seed": given["seed"],
        **{name: [] for name in ("images", "cpu_s", "knn", "loss", "gradient", "events")},
    }
    curve["loss"].append(None)
    curve["gradient"].append(None)
    dips = DipDetector("kNN")
    steps, used, each = 0, 0.0, math.inf
    exact = given.get("exact", False)
    while True:
        # Off the clock.
        accuracy = monitor.evaluate(side.encoder)["knn"]
        curve["images"].append(steps * batch)
        curve["cpu_s"].append(round(used, 2))
        curve["knn"].append(round(accuracy, 5))
        if (dip := dips.observe(steps, accuracy)) or not math.isfinite(accuracy):
            curve["events"].append(str(dip) if dip else f"step {steps}: kNN is {accuracy}")
        enough = exact or steps >= given["every"] * given["points"]
        done = enough and used >= given["budget_s"]
        if done or (steps and accuracy >= given.get("until", math.inf)):
            return curve

        # An exact run approaches the budget by the cost of the last steps, which varies.
        ahead = given["every"]
        if exact:
            left = given["budget_s"] - used
            ahead = min(ahead, max(1, int(0.8 * left / each)) if steps else FIRST)

        # On the clock, between two moments with full buffers.
        settle(feed)
        before, uncounted = _clock(), side.uncounted_s
        side.advance(ahead)
        settle(feed)
        seconds = _clock() - before - (side.uncounted_s - uncounted)
        each = max(seconds / ahead, 1e-6)
        used += seconds
        steps += ahead


def _clock() -> float:
    """CPU-seconds of this process, its workers, and its processes that have ended."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return cpu_seconds() + ended.ru_utime + ended.ru_stime


if __name__ == "__main__":
    print(json.dumps(run_side(json.loads(sys.argv[1]))))
