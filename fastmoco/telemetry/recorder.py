"""The records of a run: speed, signs of instability, and metrics for sinks and console."""

from __future__ import annotations

import contextlib
import math
import secrets
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from fastmoco.config import Config, Resolved
from fastmoco.config.serial import flatten
from fastmoco.distributed.agree import mean
from fastmoco.distributed.mesh import World
from fastmoco.errors import say
from fastmoco.run.events import Event
from fastmoco.run.folder import RunFolder
from fastmoco.run.metrics_file import SPIKE
from fastmoco.telemetry.accuracies import Accuracies
from fastmoco.telemetry.console import Console
from fastmoco.telemetry.detectors import SpikeEvents
from fastmoco.telemetry.health import Health
from fastmoco.telemetry.histograms import GradientHistograms
from fastmoco.telemetry.memory import memory_figures
from fastmoco.telemetry.metrics import Throughput
from fastmoco.telemetry.sinks import JsonlSink
from fastmoco.telemetry.stability import (
    GradientRecorder,
    effective_rank,
    feature_std,
    pair_cosines,
)
from fastmoco.telemetry.trackers.interface import TrackedRun
from fastmoco.telemetry.trackers.trackers import Trackers
from fastmoco.telemetry.view_pairs import pair_grid
from fastmoco_pipelines.files.small import UnfitFileError
from fastmoco_pipelines.loading.stages import StageFigures
from fastmoco_pipelines.spec import ViewSpec
from fastmoco_pipelines.text import counted, escaped

WARM_STEPS = 100
"""Steps before a loss is judged, however short the warm-up is."""
SLOW_LOADER = 0.2
"""Share of an interval spent waiting for data above which the recorder logs an event."""


def _left_out(config: Config, resolved: Resolved) -> str:
    """The images that no batch of an epoch has; "" if the batches divide the set."""
    count = resolved.sample_count
    rest = count - resolved.steps_per_epoch * config.global_batch_size
    if rest == 0 or config.data.synthetic:
        return ""
    are = "is" if rest == 1 else "are"
    return (
        f"{rest:,} of {count:,} images {are} left out of each epoch, chosen at random each "
        f"time: {count:,} is no multiple of the batch of {config.global_batch_size:,}"
    )


def _peak_line(config: Config) -> str:
    """How the peak learning rate comes about: `lr = 0.00015 x 4096 / 256 = 0.0024`."""
    lr, batch = config.optim.lr, config.global_batch_size
    scaled = {"linear": f" x {batch} / 256 =", "sqrt": f" x sqrt({batch}) =", "none": ""}
    factor = scaled[config.optim.lr_scaling]
    return f"lr = {lr:g}{factor} {config.peak_lr:g}" if factor else f"lr = {lr:g}"


class Recorder:
    """The records of one run on one rank; only rank 0 writes.

    Call `stepped` after every step and `log` at log steps.

    Args:
        config: of the run.
        resolved: its resolved numbers.
        folder: of the run; gets `metrics.jsonl`, and files of trackers.
        world: this process among its peers.
        start_step: steps done before this process began.
        figures: metric name -> label of the accuracies that `measured` will get.
        chance: the accuracies that knowing nothing gives, where they are known.
        uninformed_loss: the loss of knowing nothing (`Objective.uninformed_loss`).
        run_id: of the run, for its trackers; "": a new one.
        resumed: whether the run continues from a checkpoint.
    """

    def __init__(
        self,
        config: Config,
        resolved: Resolved,
        folder: RunFolder,
        world: World,
        *,
        start_step: int,
        figures: Mapping[str, str] | None = None,
        chance: Mapping[str, float] | None = None,
        uninformed_loss: float | None = None,
        run_id: str = "",
        resumed: bool = False,
    ) -> None:
        self.resolved = resolved
        self.world = world
        self.meter = Throughput(
            global_batch_size=config.global_batch_size,
            total_steps=resolved.total_steps,
            first_step=start_step,
        )

        # Figures, and their detectors.
        warmup = round(config.optim.warmup_epochs * resolved.steps_per_epoch)
        self._health = Health(warm=max(warmup, WARM_STEPS), uninformed_loss=uninformed_loss)
        self._gradients = GradientRecorder()
        self._spikes = SpikeEvents()
        self._accuracies = Accuracies(figures or {}, chance or {})
        self._loader = self._loader_before = StageFigures()
        self._loader_was_slow = False

        # What an event about a step refers to.
        self._run = folder.path
        self._synthetic = config.data.synthetic
        self._told_of_images = False

        # Outputs.
        self._file: JsonlSink | None = None
        self._refused = False
        self._not_shown: set[str] = set()
        labels = self._accuracies.labels
        self.console = Console(rank=world.rank, figures=labels)
        if world.rank == 0:
            self._file = JsonlSink(folder.metrics)
        tracked = replace(
            _tracked(config, folder, run_id or secrets.token_hex(7)),
            measures=tuple(labels),
            first_step=start_step + 1 if resumed or start_step else 0,
            total_steps=resolved.total_steps,
            resumed=resumed,
        )
        names = config.trackers.use if world.rank == 0 else ()
        self._trackers = Trackers(names, tracked, tell=self.console.event)
        self._histograms = GradientHistograms(
            every=config.trackers.histogram_every if self._trackers.active else 0
        )
        self.console.start(
            resolved.total_steps,
            f"{config.recipe}  {counted(resolved.sample_count, 'image')}, "
            f"{counted(resolved.steps_per_epoch, 'step')} per epoch, "
            f"batch {config.global_batch_size} on {world.world_size} x {world.device.type}, "
            f"{_peak_line(config)}",
            facts={
                "run": str(folder.path),
                "recipe": config.recipe,
                "step": start_step,
                "images": resolved.sample_count,
                "steps_per_epoch": resolved.steps_per_epoch,
                "global_batch_size": config.global_batch_size,
                "world_size": world.world_size,
                "device": world.device.type,
            },
        )
        if start_step and self.console.is_live:
            with contextlib.suppress(OSError, UnfitFileError):
                for name in labels:
                    past = folder.read_metric(name)
                    self.console.remember(name, (value for step, value in past if step))

        if start_step == 0 and (rest := _left_out(config, resolved)):
            self.event(rest)
        known = [f"loss {uninformed_loss:.3f}"] if uninformed_loss is not None else []
        known += self._accuracies.uninformed()
        if known:
            self.event(f"an encoder that knows nothing has {' and '.join(known)}")

    def known(
        self,
        last: Mapping[str, float],
        best: Mapping[str, float],
        best_step: Mapping[str, int] | None = None,
    ) -> None:
        """Show accuracies from before a resume: the last and the best by metric name."""
        self._accuracies.known(last, best, best_step or {})

    def gradients(self, step: int, norms: Mapping[str, Tensor]) -> None:
        """Keep the gradient norms of a step (`gradient_norms`) on their device. No host sync."""
        self._gradients.record(step, norms)

    def wants_histograms(self) -> bool:
        """Whether the log step that comes next has histograms of the gradients, on this rank; to be
        called before each `log`, once."""
        return self._histograms.due()

    def gradient_values(
        self, gradients: Iterable[tuple[str, Tensor]], places: Mapping[str, tuple[str, ...]]
    ) -> None:
        """Count the gradients of a step on their device, for the `log` that follows. No host sync.

        Args:
            gradients: name -> gradient; of a sharded one this rank's part.
            places: parameter name -> places in which it counts (`Objective.places`).
        """
        with self._shown("the histograms of the gradients"):
            self._histograms.take(gradients, places)

    def views(self, step: int, views: Sequence[Tensor], specs: Sequence[ViewSpec]) -> None:
        """Send a picture of view pairs to the trackers. Waits for the device.

        Args:
            step: of the batch.
            views: of the batch; on this rank.
            specs: of these views.
        """
        if self._trackers.active:
            with self._shown("the picture of the views"):
                self._trackers.picture(step, "views", pair_grid(views, specs))

    @contextmanager
    def _shown(self, what: str) -> Iterator[None]:
        """A context whose errors are a warning, the first time: what is only shown ends no run."""
        try:
            yield
        except Exception as error:
            if what not in self._not_shown:
                self._not_shown.add(what)
                self.event(f"warning: {what} failed ({type(error).__name__}: {error})")

    def rolled_back(self, step: int, to: int) -> None:
        """Record that the state is that of an earlier step again."""
        self._write(step, {"epoch": step / self.resolved.steps_per_epoch, "rolled_back_to": to})
        text = f"the state is that of step {to} again"
        self._write_event(Event(step, "rolled_back", None, float(step - to), text))

    def stepped(self, wait_seconds: float) -> None:
        """Count one finished step."""
        self.meter.step(wait_seconds)
        self.console.stepped()

    def loader(self, figures: StageFigures) -> None:
        """Take the loader's figures so far; `log` writes the change between two calls."""
        self._loader_before = self._loader
        self._loader = figures

    def loader_summary(self, figures: StageFigures) -> None:
        """Log whether the loader was the bottleneck of the training; call it at the end."""
        if figures.steps:
            self.event(figures.summary())

    def paused(self) -> AbstractContextManager[None]:
        """A context whose time counts neither as training nor as waiting."""
        return self.meter.paused()

    def log(
        self,
        step: int,
        loss: Tensor,
        watch: Mapping[str, Tensor],
        *,
        lr: float,
        schedules: Mapping[str, float],
        figures: Mapping[str, Tensor] | None = None,
    ) -> float:
        """Write one line of metrics. Only this call waits for the device.

        Args:
            step: optimizer steps done.
            loss: this rank's loss, a scalar on the device; its mean over ranks is written.
            watch: what the objective reports (`Output.watch`). The cosines of "queries" and "keys"
                show whether pairs, or all images, have equal features; "accuracy" contains the
                shares of queries whose positive ranks first, and among the first five. "features" are
                those that no loss reads: they are logged as queries are, and not judged.
            lr: learning rate of this step.
            schedules: the objective's own numbers of this step (`Objective.schedules`).
            figures: scalars on the device, the same on all ranks (`StepResult.figures`).

        Returns:
            The mean loss over ranks, equal on all of them.
        """
        # All scalars in one tensor: one exchange, and one wait for the device.
        shown = {"loss": loss.detach(), **_figures(watch), **(figures or {})}
        means = mean(torch.stack([figure.double() for figure in shown.values()]))
        values = dict(zip(shown, means.tolist(), strict=True))
        mean_loss = values.pop("loss")

        # Events of the detectors.
        peaks = self._gradient_peaks()
        dim = watch["queries"].shape[-1] if "queries" in watch else None
        for event in self._health.observe(step, mean_loss, values, dim=dim):
            self.occurred(event)

        # The line, for the file, the trackers and the console.
        speed = self.meter.report()
        metrics = {
            "epoch": step / self.resolved.steps_per_epoch,
            "loss": mean_loss,
            "lr": lr,
            **schedules,
            "images_per_s": speed.images_per_s,
            "wait_share": speed.wait_share,
            **values,
            **{f"gradient_norm/{name}": value for name, value in peaks.items()},
            **self._loader_metrics(step),
            **memory_figures(self.world.device),
        }
        self._write(step, metrics)
        if histograms := self._histograms.fetched():
            self._trackers.histograms(step, histograms)
        self._trackers.news()
        eta = None if math.isnan(speed.eta_s) else speed.eta_s
        row: dict[str, float | None] = {"step": step, **metrics, "eta_s": eta}
        row["quarantined"] = self._loader.left_out or None
        self.console.log({**row, **self._accuracies.metrics()})
        return float(mean_loss)

    def _loader_metrics(self, step: int) -> dict[str, float]:
        """The loader's figures since the last log step; logs a summary when it is first slow."""
        recent = self._loader - self._loader_before
        if not recent.steps:
            return {}
        slow = recent.wait_share > SLOW_LOADER and self._loader_before.steps > 0
        if slow and not self._loader_was_slow:
            self._loader_was_slow = True
            self.occurred(Event(step, "slow_loader", None, recent.wait_share, recent.summary()))
        return recent.metrics()

    def _gradient_peaks(self) -> dict[str, float]:
        """The largest norm of each place since the last log step, so that the curve shows a spike
        between two lines."""
        peaks: dict[str, float] = {}
        for step, norms in self._gradients.flush():
            spikes, events = self._spikes.observe(step, norms)
            for event in events:
                self.occurred(event)
            if spikes:
                self._write(step, {f"{SPIKE}{spike.name}": spike.value for spike in spikes})
                self._tell_of_images(step)
            for name, value in norms.items():
                before = peaks.get(name, value)
                # NaN survives: max() would drop it or keep it depending on the order.
                peaks[name] = math.nan if math.isnan(value + before) else max(value, before)
        return peaks

    def _tell_of_images(self, step: int) -> None:
        """Name the command that lists the images of a step, once."""
        if not self._told_of_images and not self._synthetic:
            self._told_of_images = True
            run = shlex.quote(str(self._run))
            self.event(f"the images of that step: fastmoco run images {run} --step {step}")

    def measured(self, step: int, figures: Mapping[str, float]) -> None:
        """Write the figures of an evaluation; the constructor got the names of all of them."""
        self._write(step, {"epoch": step / self.resolved.steps_per_epoch, **figures})
        finite = {name: value for name, value in figures.items() if math.isfinite(value)}
        if not finite:
            return
        dips = self._accuracies.observe(step, finite)
        self._trackers.summary(step, self._accuracies.metrics())
        self.console.keep({"step": step, **finite})
        self.event(f"step {step}: {self._accuracies.text(step, finite)}")
        for dip in dips:
            self.occurred(dip)

    def occurred(self, event: Event) -> None:
        """Write an event to the files, and show it as a warning."""
        self._write_event(event)
        self.event(f"warning: {event}", _facts(event))

    def reported(self, step: int, name: str, text: str, *, size: float | None = None) -> None:
        """Log the text of another part of the trainer, and write it as an event of the run."""
        said = text.removeprefix("warning: ").removeprefix(f"step {step}: ")
        event = Event(step, name, None, size, said)
        self._write_event(event)
        self.event(text, _facts(event))

    def event(self, text: str, facts: Mapping[str, object] | None = None) -> None:
        """Log an event; a text that begins with `warning: ` is shown as one. `facts`: the same for
        programs (`Console.event`)."""
        self.console.event(text, facts)

    def event_of_any_rank(self, text: str) -> None:
        """Log an event that only this rank may know."""
        if self.world.rank == 0:
            self.event(text)
        else:
            say(f"rank {self.world.rank}: {text}")

    def close(self) -> None:
        """Close trackers, console and file; may be called more than once. Trackers have some seconds
        to send what they have."""
        self._trackers.close()
        self.console.close()
        if self._file is not None:
            self._file.close()

    def _write_event(self, event: Event) -> None:
        self._to_file(lambda file: file.event(event))
        self._trackers.event(event)

    def _write(self, step: int, metrics: dict[str, float]) -> None:
        self._to_file(lambda file: file.write(step, metrics))
        self._trackers.write(step, metrics)

    def _to_file(self, write: Callable[[JsonlSink], None]) -> None:
        """Write a line. What cannot be written is lost, and does not end the run."""
        if self._file is None:
            return
        refused = ""
        try:
            write(self._file)
        except OSError as error:
            refused = f"JsonlSink: {error.strerror or error}"
        if refused and not self._refused:
            self.event(f"warning: metrics cannot be written and are lost meanwhile ({refused})")
        self._refused = bool(refused)


def _figures(watch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Scalars on the device from what an objective reports, by metric name."""
    figures: dict[str, Tensor] = {}
    features = watch.get("queries", watch.get("features"))
    if features is not None:
        queries = features[0]
        figures["feature_std"] = feature_std(queries)
        figures["effective_rank"] = effective_rank(queries)
        if "keys" in watch:
            figures["cosine/positive"], figures["cosine/negative"] = pair_cosines(
                queries, watch["keys"][-1]
            ).unbind()
    if "accuracy" in watch:
        figures["contrast/top1"], figures["contrast/top5"] = watch["accuracy"].unbind()
    others = {
        name: tensor
        for name, tensor in watch.items()
        if name not in ("queries", "keys", "features", "accuracy")
    }
    return figures | {name: tensor for name, tensor in others.items() if tensor.ndim == 0}


def _tracked(config: Config, folder: RunFolder, run_id: str) -> TrackedRun:
    """What trackers get to know of a run, without where it stands. Bytes of a path that are no UTF-8
    are escaped in what is shown: trackers refuse them."""
    own = config.trackers
    fields = {
        name: escaped(value) if isinstance(value, str) else value
        for name, value in flatten(config).items()
    }
    return TrackedRun(
        name=escaped(own.name or folder.path.absolute().name),
        id=run_id,
        folder=str(folder.path.absolute()),
        project=own.project,
        mode=own.mode,
        uri=own.uri,
        config=fields,
    )


def _facts(event: Event) -> dict[str, object]:
    """An event for programs."""
    return {"step": event.step, "name": event.name, "layer": event.layer, "size": event.size}
