"""The training loop: one optimizer step, and the work between steps.

Each part is implemented in its own module and called from here. The order of a step follows Chen,
Xie, He 2021 (Algorithm 1), except that the momentum update is moved to the end of the step before.
The result is bit-identical (`MoCoV3.ema_momentum`).
"""

from __future__ import annotations

import contextlib
import math
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from fastmoco.checkpoint import Checkpoint, Score
from fastmoco.checkpoint.choose import KEY as SCORE
from fastmoco.checkpoint.folder import step_of
from fastmoco.config import Config, resolve, schedule_notes
from fastmoco.config.serial import to_json
from fastmoco.distributed.mesh import World
from fastmoco.errors import EXIT_FINISHED, EXIT_STOPPED
from fastmoco.evaluation.interface import Monitor, saved_states
from fastmoco.faults.pulse import Pulse, Section
from fastmoco.faults.stop_signal import StopSignal
from fastmoco.faults.watchdog import Watchdog
from fastmoco.models.precision import choose_precision
from fastmoco.objectives.build import attention_choice, build_objective
from fastmoco.objectives.interface import Progress
from fastmoco.optim.build import build_optimizer
from fastmoco.run.curves import Panels
from fastmoco.run.drawing import CurveDrawer
from fastmoco.run.folder import RunFolder
from fastmoco.run.identity import RunIdentity
from fastmoco.run.listing import HOST
from fastmoco.run.world_sizes import NAME as RANKS
from fastmoco.run.world_sizes import with_start
from fastmoco.telemetry.recorder import Recorder
from fastmoco.telemetry.stragglers import Stragglers
from fastmoco.training import resume, setup
from fastmoco.training import state as training_state
from fastmoco.training.classes import with_classes
from fastmoco.training.forward_backward import ForwardBackward
from fastmoco.training.initial_weights import INITIAL, start_from
from fastmoco.training.rollback import Rollback
from fastmoco.training.saving import DEADLINE_S, Saving
from fastmoco.training.start import Start, find_start, finished_already, give_back
from fastmoco.training.step import StepResult, TrainStep
from fastmoco.training.step_guard import StepGuard
from fastmoco_pipelines import Batch, Loader, ShardError, SyntheticLoader
from fastmoco_pipelines.loading.arenas import keep_freed_memory
from fastmoco_pipelines.loading.step_parts import LOG, part
from fastmoco_pipelines.text import counted


class Trainer:
    """A training run on one rank. Use `build`, then `run`, then `close`.

    Attributes:
        step_count: optimizer steps done.
        resolved: values derived from config, world size and data set.
        objective: the model and its loss.
        forward_backward: runs forward and backward of a batch.
    """

    def __init__(
        self,
        *,
        config: Config,
        world: World,
        folder: RunFolder,
        loader: Loader | SyntheticLoader,
        monitors: Sequence[Monitor],
        checkpoint: Checkpoint | None,
        identity: RunIdentity,
        precision: str,
    ) -> None:
        self.config = config
        self.world = world
        self.folder = folder
        self.loader = loader
        self.monitors = monitors
        self.precision = precision
        self.identity = identity if checkpoint is None else identity.taking_over(checkpoint.run_id)
        self.resolved = resolve(
            config, world_size=world.world_size, sample_count=loader.sample_count
        )

        # Model, forward and backward. This may shard parameters, so optimizer and restore follow.
        self.objective = build_objective(config, world.device)
        self.initial = None if checkpoint else start_from(config, self.objective, world)
        self.attention = attention_choice(
            config, self.objective.encoder, self.precision, world.device
        )
        self.forward_backward = ForwardBackward(
            config,
            self.objective,
            world,
            self.precision,
            attention=self.attention.backend,
            levels=loader.spec.view_dtype == "uint8",
            reserved=setup.reserved_bytes(world, loader),
        )
        # Here the step is planned; earlier, batches would take the memory that the plan measures.
        # What follows takes seconds for a large model, in which the loader imports DALI and fills.
        loader.begin()
        self.optimizer = build_optimizer(
            config,
            self.objective.named_parameters(),
            self.objective.averages(),
            self.objective.parameter_group,
        )

        # The step of the last measurement by which checkpoints are ranked, and its figure.
        self._scored: tuple[int, Score] | None = None

        # Restore the state of the checkpoint, if there is one.
        self.step_count = 0
        if checkpoint is not None:
            self._take_state(checkpoint)
            self.step_count = checkpoint.step
            states = saved_states(checkpoint.state)
            for monitor in monitors:
                monitor.load_state_dict(states.get(monitor.name, {}))

        # Faults: signals, hangs, slow ranks, checkpoints, spikes and bad steps.
        self.pulse = Pulse(config.faults)
        self.stragglers = Stragglers(self.objective, world)
        self.saving = Saving(
            config,
            world,
            folder,
            step=self.step_count,
            pulse=self.pulse,
            identity=self.identity,
            checkpoint=checkpoint,
        )
        rolled = checkpoint.state.get("rollback", {}) if checkpoint is not None else {}
        self.rollback = Rollback(config, world, self.saving, self._take_state, rolled)
        self.guard = StepGuard(self.objective, world, patience=config.faults.max_skipped_steps)

        # The step, and the records of the run.
        self.train_step = TrainStep(
            config,
            self.resolved,
            objective=self.objective,
            forward_backward=self.forward_backward,
            optimizer=self.optimizer,
            guard=self.guard,
        )
        self.recorder = self._open_records(checkpoint)
        self.drawer = CurveDrawer(folder, active=world.rank == 0)

    @classmethod
    def build(
        cls,
        config: Config,
        out: Path,
        world: World,
        *,
        allow: Sequence[str] = (),
        trust: bool = False,
        start: Start | None = None,
    ) -> Trainer:
        """Build a run; it continues from the newest checkpoint in `out` if there is one.

        Args:
            config: of the run.
            out: folder of the run.
            world: this process's rank and device.
            allow: config fields that may differ from the run in `out` (`resume.require_same_run`).
            trust: continue from a checkpoint of another run (`run/identity.py`).
            start: of this run, if the caller has found it already; `trust` is then not used.

        Raises:
            ValueError: if config, world and data do not fit together.
            RunError: if `out` is in use, or contains a run with another config or data set, or a
                checkpoint of another run.
            CheckpointError: if `out` contains checkpoints but none verifies.
        """
        threads = setup.share_cores(config)
        if world.device.type == "cpu":
            # The steps allocate the same tensors again and again.
            keep_freed_memory()
        with contextlib.ExitStack() as undo:
            # The folder is locked, and every rank sees the same checkpoint.
            start = start or find_start(out, world, trust=trust)
            folder, who, checkpoint = start.folder, start.identity, start.checkpoint
            undo.push(lambda _kind, error, _trace: give_back(folder, error))

            # A run that learns classes knows their number before anything is compared or built.
            config = with_classes(config, world, checkpoint)

            # Build the data, and check that the checkpoint belongs to it.
            loader = setup.build_train_loader(
                config,
                world,
                threads=threads,
                start_step=checkpoint.step if checkpoint is not None else 0,
                shuffle_window=resume.shuffle_window(checkpoint),
                order_version=resume.order_version(checkpoint),
                quarantine_list=folder.quarantine,
            )
            undo.callback(loader.close)
            precision = choose_precision(config.precision, world.device)
            if checkpoint is not None:
                same = loader.has_digest(checkpoint.state["data"]["digest"])
                resume.require_same_run(checkpoint, config, precision, same, folder, allow)
                resume.require_same_order(checkpoint, loader.order_digest)

            # Build everything else.
            monitors = setup.build_monitors(
                config,
                world,
                threads=threads,
                precision=precision,
                quarantine_list=folder.quarantine,
                scratch=folder.path,
            )
            for monitor in monitors:
                undo.callback(monitor.close)
            trainer = cls(
                config=config,
                world=world,
                folder=folder,
                loader=loader,
                monitors=monitors,
                checkpoint=checkpoint,
                identity=who,
                precision=precision,
            )
            undo.pop_all()
        return trainer

    @property
    def figures(self) -> dict[str, str]:
        """Label by metric name, for all accuracies measured during training."""
        return {name: label for monitor in self.monitors for name, label in monitor.figures.items()}

    def _open_records(self, checkpoint: Checkpoint | None) -> Recorder:
        """Open the records at the step of the checkpoint, and log how the run was set up."""
        # Numbers to compare with: what knowing nothing gives.
        uninformed = self.objective.uninformed_loss(self.config.global_batch_size)
        chance = {k: v for monitor in self.monitors for k, v in monitor.chance.items()}
        lines = {name: {"chance": value} for name, value in chance.items()}
        if uninformed is not None:
            lines["loss"] = {"knows nothing": uninformed}
        saved = {
            "config": to_json(self.config),
            "resolved": self._describe(),
            "curves": Panels(figures=self.figures, lines=lines).to_json(),
            "data": {k: value for k, value in self.loader.state_dict().items() if k != "step"},
            **self.identity.to_json(),
        }

        # Remove metrics after the checkpoint; without one, all metrics, including those of step 0.
        if self.world.rank == 0:
            self.folder.trim_metrics(self.step_count if checkpoint is not None else -1)
            before = self.folder.read_config()
            ranks = with_start(before, self.step_count, self.world.world_size)
            initial = self.initial.to_json() if self.initial is not None else before.get(INITIAL)
            kept = {INITIAL: initial} if initial and self.config.model.init else {}
            self.folder.write_config(saved | {RANKS: ranks, HOST: socket.gethostname()} | kept)
        recorder = Recorder(
            self.config,
            self.resolved,
            self.folder,
            self.world,
            start_step=self.step_count,
            figures=self.figures,
            chance=chance,
            uninformed_loss=uninformed,
            run_id=self.identity.run_id,
            resumed=checkpoint is not None,
        )

        # Log the choices.
        for line in self.initial.lines() if self.initial is not None else ():
            recorder.event(line)
        recorder.event(f"attention: {self.attention}")
        chosen = self.forward_backward
        recorder.event(
            f"batch: {chosen.plan}; parallel: {chosen.strategy}; blocks: {chosen.compile}"
        )
        if (note := setup.decoder_note(self.config)) is not None:
            recorder.event(note)
        if self.config.batch.cuda_graphs:
            recorder.event(f"CUDA graphs replay {chosen.replays}")

        for note in schedule_notes(self.config, self.resolved):
            recorder.event(f"warning: {note}")

        # Loader and monitors log through the recorder from here on.
        self.loader.report = lambda text: recorder.event_of_any_rank(f"warning: {text}")
        for monitor in self.monitors:
            monitor.report = recorder.event
            recorder.known(monitor.last, monitor.best, monitor.best_step)
            for note in monitor.notes:
                recorder.event(f"warning: {note}")

        # Report what a killed run has left, and where this one continues.
        for note in self.folder.notes:
            recorder.event(note)
        unfinished = [folder.name for folder in self.saving.leftovers]
        for name in [*self.folder.take_leftovers(), *unfinished]:
            recorder.event(f"ignored {name}, left by a killed run")
        if checkpoint is not None:
            resume.announce(checkpoint, self.identity, saved["resolved"], recorder.event)
            if change := resume.schedule_changes(checkpoint, self.config, self.resolved):
                recorder.event(change)

        # Say it now if the first output of the training will take minutes.
        if self.world.rank == 0:
            notes = setup.duration_notes(
                self.config,
                self.world,
                self.resolved,
                self.objective,
                self.precision,
                monitors=self.monitors,
                steps_left=self.resolved.total_steps - self.step_count,
            )
            for note in notes:
                recorder.event(note)
        return recorder

    def _describe(self) -> dict[str, Any]:
        """The resolved values, for `config.json` and checkpoints."""
        return setup.describe(
            self.resolved,
            self.world,
            self.precision,
            self.attention,
            self.forward_backward.plan.to_json(),
            self.optimizer,
        )

    def progress(self, step: int) -> Progress:
        """The progress of the run after a number of steps."""
        resolved = self.resolved
        return Progress(step, resolved.total_steps, resolved.steps_per_epoch, self.config.epochs)

    def _last_move(self, steps: int) -> float | None:
        """EMA momentum of the update that ended step number `steps`; None without an update."""
        return self.objective.ema_momentum(self.progress(steps - 1)) if steps else None

    def _take_state(self, checkpoint: Checkpoint) -> None:
        """Restore weights, momentum encoder, buffers and the optimizer's state of a checkpoint.

        The step count does not change.
        """
        training_state.restore(
            self.objective, self.optimizer, checkpoint, self._last_move(checkpoint.step)
        )

    def step(self, batch: Batch) -> StepResult:
        """One optimizer step on this rank's part of the global batch (`TrainStep`)."""
        at = self.progress(self.step_count)
        logged = self._logs(at.step + 1)
        result = self.train_step(batch, at, accuracy=logged, figures=logged)
        self.step_count += 1
        return result

    def run(self, max_steps: int | None = None, *, process_ends: bool = False) -> int:
        """Train until the last step or a signal; save and return the exit code.

        Args:
            max_steps: stop after this number of steps without saving, for measurements.
            process_ends: leave the signals ignored once the run is marked as done or stopped.

        Returns:
            `EXIT_FINISHED`, or `EXIT_STOPPED` after a signal to stop, when the state is saved.
        """
        recorder = self.recorder
        total = self.resolved.total_steps
        last = total if max_steps is None else min(total, self.step_count + max_steps)
        if max_steps is None and self.step_count >= last:
            self.folder.mark("DONE")
            recorder.event(finished_already(self.folder, last))
            return EXIT_FINISHED

        # Train until the last step or a signal.
        stop = StopSignal(self.pulse, self.folder, self.world)
        with stop, Watchdog(self.world, self.pulse, self.config.faults):
            self.folder.mark(None)
            self._measure(force=self.step_count == 0)
            while self.step_count < last:
                if self._asked_to_stop(stop):
                    self.drawer.start()  # draws while the state is saved
                    self._save(force=True)
                    self.folder.mark("PREEMPTED")
                    if process_ends:
                        stop.finish()
                    cause = stop.received or "another rank was asked to stop"
                    recorder.event(f"{cause}: saved step {self.step_count}")
                    return EXIT_STOPPED
                self._one_step()
                self._measure(force=self.step_count == total)
                if max_steps is None:
                    self._save(force=self.step_count == last)

            # Before the signal handler is removed: a run with all steps saved is marked as done.
            if max_steps is None:
                self.folder.mark("DONE")
                if process_ends:
                    stop.finish()
                recorder.loader_summary(self.loader.figures())
                recorder.event(self._summary(last))
        return EXIT_FINISHED

    def _summary(self, steps: int) -> str:
        """The last line of a finished run: where the model is, and the best one."""
        text = f"finished after {counted(steps, 'step')}; the model is in {self.folder.checkpoints}"
        best = self.saving.best()
        if best is None:
            return text
        path, score = best
        newest = "the last one" if step_of(path) == steps else f"{path.name} there (--best)"
        return f"{text}; best {score}: {newest}"

    def _asked_to_stop(self, stop: StopSignal) -> bool:
        """Whether to stop now.

        Several CUDA processes agree at log steps only, because agreeing waits for the device.
        """
        free = self.world.world_size == 1 or self.world.device.type == "cpu"
        may_ask = free or self.step_count % self.config.log_every_steps == 0
        return may_ask and stop.agreed(self.world.device)

    def _one_step(self) -> None:
        """Fetch a batch, train on it, record. Only logged steps read numbers from the device."""
        try:
            with self.pulse.inside(Section.DATA, self.config.data.timeout_s + 60):
                batch = self.loader.next()
        except ShardError:
            if self.world.world_size == 1:
                self._save(force=True)
            raise

        # Measured from here on, to compare the ranks.
        self.stragglers.begin(self.loader.wait_seconds)
        with self.pulse.step():
            result = self.step(batch)

        # Record. Norms stay on the device until a log step.
        with part(LOG):
            self._record(result)
            if self.step_count == 1:
                self.recorder.views(1, batch.views, self.loader.spec.each_view)

    def _record(self, result: StepResult) -> None:
        """Record the step that is done, and act on what the records show."""
        number = self.step_count
        self.recorder.gradients(number, result.norms)
        self.rollback.record(number, result.norms)
        self.recorder.stepped(self.loader.wait_seconds)
        if self._logs(number):
            self.recorder.loader(self.loader.figures())
            if self.recorder.wants_histograms():
                self.recorder.gradient_values(self.train_step.gradients(), self.objective.places())
            schedules = {
                **self.objective.schedules(result.at),
                **self.objective.lengths(result.at),
            }
            decay = self.train_step.weight_decay(result.at)
            if decay is not None:
                schedules["weight_decay"] = decay
            self.recorder.log(
                number,
                result.loss,
                result.output.watch,
                lr=result.lr,
                schedules=schedules,
                figures=result.figures,
            )

        # Roll back before the guard may end the run: a spike can cause the bad steps after it.
        if self.rollback.after_step(number, self.recorder, logged=self._logs(number)):
            self.guard.forget()
        if self._logs(number):
            for slow in self.stragglers.report(number):
                self.recorder.reported(number, "slow_rank", slow)
            before = self.guard.skipped
            for skipped in self.guard.report(number):
                size = float(self.guard.skipped - before)
                self.recorder.reported(number, "steps_skipped", skipped, size=size)
            self.drawer.poll()

    def _logs(self, step: int) -> bool:
        """Whether a step is logged: multiples of `log_every_steps`, the first and the last step."""
        return step % self.config.log_every_steps == 0 or step in (1, self.resolved.total_steps)

    def _measure(self, *, force: bool) -> None:
        """Run the evaluations that are due and within their time budget; all of them if forced."""
        epoch = self.progress(self.step_count).epoch
        for monitor in self.monitors:
            if force or (self._logs(self.step_count) and monitor.is_due(epoch)):
                doing = ", ".join(monitor.figures.values())
                with (
                    self.recorder.paused(),
                    self.pulse.inside(Section.MEASUREMENT, 6 * DEADLINE_S, doing),
                ):
                    subject = monitor.subject(self.objective)
                    figures = monitor.measure(subject, epoch, self.step_count)
                self.recorder.measured(self.step_count, figures)
                self._scored = self._scored_by(monitor, figures) or self._scored

    def _scored_by(
        self, monitor: Monitor, figures: Mapping[str, float]
    ) -> tuple[int, Score] | None:
        """This step and its accuracy, by which checkpoints are ranked: the first of all figures."""
        name = next(iter(self.figures))
        if not math.isfinite(figures.get(name, math.nan)):
            return None
        return self.step_count, Score(name, monitor.figures[name], figures[name])

    def _score(self) -> Score | None:
        """The accuracy if it was measured at this step."""
        step, score = self._scored or (-1, None)
        return score if step == self.step_count else None

    def _save(self, *, force: bool) -> None:
        """Write a checkpoint if one is due. If forced, it is committed on return."""
        self.saving.after_step(
            self.step_count,
            self._state,
            self.recorder.event,
            force=force,
            score=self._score(),
            paused=self.recorder.paused,
        )

    def _state(self) -> tuple[Mapping[str, Tensor], Mapping[str, Any]]:
        """The content of a checkpoint: tensors, and JSON values."""
        score = self._score()
        return training_state.collect(self.objective, self.optimizer), {
            "config": to_json(self.config),
            "resolved": self._describe(),
            "data": self.loader.state_dict(),
            "monitors": {monitor.name: monitor.state_dict() for monitor in self.monitors},
            "rollback": self.rollback.state_dict(),
            "run_id": self.identity.run_id,
            **({SCORE: score.to_json()} if score is not None else {}),
            "twin_advanced": not self.step_count or self._last_move(self.step_count) is not None,
        }

    def close(self, *, picture_s: float = 0.0) -> None:
        """Stop the loader, close the records, release the folder. Safe to call twice.

        Args:
            picture_s: time for a picture that is being drawn, before it is given up.
        """
        with contextlib.ExitStack() as stack:
            stack.callback(self.folder.release)
            stack.callback(self.drawer.close, picture_s)
            stack.callback(self.recorder.close)
            stack.callback(self.loader.close)
            for monitor in self.monitors:
                stack.callback(monitor.close)
            stack.callback(self.saving.close, self.recorder.event)
