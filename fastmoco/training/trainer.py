"""The loop: one step, and what happens between steps. Each part is in a module of its own.

The order of a step follows Chen, Xie, He 2021 (Algorithm 1). The average is taken at the end of the
step before. That equals taking it between the two forwards, bit for bit (`MoCoV3.ema_momentum`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from fastmoco.checkpoint import Checkpoint, load_latest
from fastmoco.config import Config, resolve
from fastmoco.config.serial import to_json
from fastmoco.distributed.mesh import World
from fastmoco.errors import EXIT_FINISHED, EXIT_STOPPED
from fastmoco.evaluation.interface import Monitor, saved_states
from fastmoco.faults import restarts
from fastmoco.faults.pulse import Pulse, Section
from fastmoco.faults.stop_signal import StopSignal
from fastmoco.faults.watchdog import Watchdog
from fastmoco.models.precision import choose_precision
from fastmoco.objectives.build import attention_choice, build_objective
from fastmoco.objectives.interface import Progress
from fastmoco.optim.build import build_optimizer
from fastmoco.run.folder import RunFolder
from fastmoco.run.identity import RunIdentity, identify
from fastmoco.telemetry.recorder import Recorder
from fastmoco.telemetry.stragglers import Stragglers
from fastmoco.training import resume, setup
from fastmoco.training import state as training_state
from fastmoco.training.forward_backward import Gradients
from fastmoco.training.rollback import Rollback
from fastmoco.training.saving import DEADLINE_S, Saving
from fastmoco.training.step import StepResult, TrainStep
from fastmoco.training.step_guard import StepGuard
from fastmoco_pipelines import Batch, Loader, ShardError, SyntheticLoader


class Trainer:
    """A run on one process of a world. Made by `build`, driven by `run`, ended by `close`.

    Attributes:
        step_count: optimizer steps done.
        resolved: what the config became on this world and data set.
        objective: what is trained.
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
        self.resolved = resolve(config, world_size=world.world_size, sample_count=loader.sample_count)

        # The objective and its gradients, before optimizer and restore: parameters may get sharded.
        self.objective = build_objective(config, world.device)
        self.attention = attention_choice(config, self.objective.encoder, self.precision, world.device)
        self.gradients = Gradients(
            config,
            self.objective,
            world,
            self.precision,
            attention=self.attention.backend,
            levels=loader.spec.view_dtype == "uint8",
            reserved=setup.reserved_bytes(world, loader),
        )
        self.optimizer = build_optimizer(
            config,
            self.objective.named_parameters(),
            self.objective.averages(),
            self.objective.parameter_group,
        )

        # The state of the checkpoint, if there is one.
        self.step_count = 0
        if checkpoint is not None:
            self._take_state(checkpoint)
            self.step_count = checkpoint.step
            states = saved_states(checkpoint.state)
            for monitor in monitors:
                monitor.load_state_dict(states.get(monitor.name, {}))

        # What goes on around the steps.
        self.pulse = Pulse(config.faults)
        self.stragglers = Stragglers(self.objective, world)
        self.saving = Saving(config, world, folder, step=self.step_count, pulse=self.pulse, identity=self.identity)
        rolled = checkpoint.state.get("rollback", {}) if checkpoint is not None else {}
        self.rollback = Rollback(config, world, self.saving, self._take_state, rolled)
        self.guard = StepGuard(self.objective, world, patience=config.faults.max_skipped_steps)
        self.train_step = TrainStep(
            config,
            self.resolved,
            objective=self.objective,
            forward_backward=self.gradients,
            optimizer=self.optimizer,
            guard=self.guard,
        )
        self.recorder = self._open_records(checkpoint)

    @classmethod
    def build(
        cls, config: Config, out: Path, world: World, *, allow: Sequence[str] = (), trust: bool = False
    ) -> Trainer:
        """Everything a run needs, continued from the newest checkpoint in ``out`` if there is one.

        ``allow`` names fields that may differ from the run's in ``out`` (`resume.require_same_run`); ``trust`` takes
        over a checkpoint of another run (`run/identity.py`).

        Raises:
            ValueError: if config, world and data do not fit together.
            RunError: if ``out`` is in use, or holds a run of another config or data set, or the checkpoint of another run.
            CheckpointError: if ``out`` holds checkpoints and none verifies.
        """
        threads = setup.share_cores(config)
        folder = RunFolder(out)
        with contextlib.ExitStack() as undo:
            undo.callback(folder.release)
            if world.rank == 0:
                folder.acquire()
            who = identify(folder, world, trust_all=trust)
            checkpoint = load_latest(folder.checkpoints, admit=who.admit)
            if world.rank == 0:
                restarts.require_progress(folder, checkpoint.step if checkpoint is not None else 0)
            resume.require_run(checkpoint)
            resume.require_same_step(checkpoint, world)
            loader = setup.build_train_loader(
                config,
                world,
                threads=threads,
                start_step=checkpoint.step if checkpoint is not None else 0,
                shuffle_window=resume.shuffle_window(checkpoint),
                quarantine_list=folder.quarantine,
            )
            undo.callback(loader.close)
            precision = choose_precision(config.precision, world.device)
            if checkpoint is not None:
                resume.require_same_run(checkpoint, config, precision, loader.digest, folder, allow)
                resume.require_same_order(checkpoint, loader.order_digest)
            monitors = setup.build_monitors(
                config, world, threads=threads, precision=precision, quarantine_list=folder.quarantine
            )
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
            loader.begin()  # not before the step is planned: what batches take would be missing from the free memory
            undo.pop_all()
        return trainer

    @property
    def figures(self) -> dict[str, str]:
        """Metric name -> label of all accuracies that are measured while training."""
        return {name: label for monitor in self.monitors for name, label in monitor.figures.items()}

    def _open_records(self, checkpoint: Checkpoint | None) -> Recorder:
        """Open the records at the step of the checkpoint, and report what a user should know of it."""
        saved = {"config": to_json(self.config), "resolved": self._describe(), **self.identity.to_json()}
        if self.world.rank == 0:
            # Without a checkpoint nothing of what a killed run wrote still holds, its step 0 included.
            self.folder.trim_metrics(self.step_count if checkpoint is not None else -1)
            self.folder.write_config(saved)
        recorder = Recorder(
            self.config,
            self.resolved,
            self.folder,
            self.world,
            start_step=self.step_count,
            figures=self.figures,
        )
        recorder.event(f"attention: {self.attention}")
        plan, strategy, blocks = self.gradients.plan, self.gradients.strategy, self.gradients.compile
        recorder.event(f"batch: {plan}; parallel: {strategy}; blocks: {blocks}")
        if self.config.batch.cuda_graphs:
            recorder.event(f"CUDA graphs replay {self.gradients.replays}")
        self.loader.report = recorder.event_of_any_rank
        for monitor in self.monitors:
            monitor.report = recorder.event
            recorder.known(monitor.last, monitor.best)
        for name in [*self.folder.take_leftovers(), *(folder.name for folder in self.saving.leftovers)]:
            recorder.event(f"ignored {name}, which a killed run left behind")
        if checkpoint is not None:
            resume.announce(checkpoint, self.identity, saved["resolved"], recorder.event)
        return recorder

    def _describe(self) -> dict[str, Any]:
        """What was resolved, for ``config.json`` and checkpoints."""
        return setup.describe(
            self.resolved, self.world, self.precision, self.attention, self.gradients.plan.to_json(), self.optimizer
        )

    def progress(self, step: int) -> Progress:
        """Where the run is after a number of steps."""
        resolved = self.resolved
        return Progress(step, resolved.total_steps, resolved.steps_per_epoch, self.config.epochs)

    def _last_move(self, steps: int) -> float | None:
        """Momentum of the move of averages that ended the last of some steps; None without one."""
        return self.objective.ema_momentum(self.progress(steps - 1)) if steps else None

    def _take_state(self, checkpoint: Checkpoint) -> None:
        """Make weights, twin, buffers and the optimizer's state those of a checkpoint; the step count stays."""
        training_state.restore(self.objective, self.optimizer, checkpoint, self._last_move(checkpoint.step))

    def step(self, batch: Batch) -> StepResult:
        """One optimizer step on this rank's part of the global batch (`TrainStep`)."""
        at = self.progress(self.step_count)
        result = self.train_step(batch, at, accuracy=self._logs(at.step + 1))
        self.step_count += 1
        return result

    def run(self, max_steps: int | None = None) -> int:
        """Train until the last step or a signal; save and return the exit code.

        Args:
            max_steps: stop after this many steps of this call, saving nothing: for measurements.

        Returns:
            `EXIT_FINISHED`, or `EXIT_STOPPED` after a signal to stop, with the state saved.
        """
        recorder, total = self.recorder, self.resolved.total_steps
        last = total if max_steps is None else min(total, self.step_count + max_steps)
        if max_steps is None and self.step_count >= last:
            self.folder.mark("DONE")
            recorder.event(f"this run is finished already; its {last} steps are in {self.folder.checkpoints}")
            return EXIT_FINISHED
        stop = StopSignal(self.pulse, self.folder, self.world)
        with stop, Watchdog(self.world, self.pulse, self.config.faults):
            self.folder.mark(None)
            self._measure(force=self.step_count == 0)
            while self.step_count < last:
                if self._asked_to_stop(stop):
                    self._save(force=True)
                    self.folder.mark("PREEMPTED")
                    recorder.event(f"{stop.received or 'a peer was asked to stop'}: saved step {self.step_count}")
                    return EXIT_STOPPED
                self._one_step()
                self._measure(force=self.step_count == total)
                if max_steps is None:
                    self._save(force=self.step_count == last)
            if max_steps is None:  # while signals are still heard: what is saved to the end was not stopped
                self.folder.mark("DONE")
                recorder.loader_verdict(self.loader.figures())
                recorder.event(f"finished after {last} steps; the model is in {self.folder.checkpoints}")
        return EXIT_FINISHED

    def _asked_to_stop(self, stop: StopSignal) -> bool:
        """Whether to stop here. Several CUDA processes agree at log steps only, because asking waits for the device."""
        free = self.world.world_size == 1 or self.world.device.type == "cpu"
        return (free or self.step_count % self.config.log_every_steps == 0) and stop.agreed(self.world.device)

    def _one_step(self) -> None:
        """Fetch, step, record. Only logged steps read numbers back from the device."""
        try:
            with self.pulse.inside(Section.DATA, self.config.data.timeout_s + 60):
                batch = self.loader.next()
        except ShardError:
            if self.world.world_size == 1:
                self._save(force=True)
            raise
        self.stragglers.begin(self.loader.wait_seconds)
        with self.pulse.step():
            result = self.step(batch)

        # Norms stay on the device until a log step.
        number = self.step_count
        self.recorder.gradients(number, result.norms)
        self.rollback.record(number, result.norms)
        self.recorder.stepped(self.loader.wait_seconds)
        if self._logs(number):
            self.recorder.loader(self.loader.figures())
            schedules = self.objective.schedules(result.at)
            self.recorder.log(number, result.loss, result.output.watch, lr=result.lr, schedules=schedules)

        # Before the guard may end the run: a spike can be what made the steps after it bad.
        if self.rollback.after_step(number, self.recorder, logged=self._logs(number)):
            self.guard.forget()
        if self._logs(number):
            for event in (*self.stragglers.report(number), *self.guard.report(number)):
                self.recorder.event(event)

    def _logs(self, step: int) -> bool:
        """Whether a step is logged: every so many, the first and the last."""
        return step % self.config.log_every_steps == 0 or step in (1, self.resolved.total_steps)

    def _measure(self, *, force: bool) -> None:
        """The evaluations that are due and within their time budget; all of them if forced."""
        epoch = self.progress(self.step_count).epoch
        for monitor in self.monitors:
            if force or (self._logs(self.step_count) and monitor.is_due(epoch)):
                doing = ", ".join(monitor.figures.values())
                with self.recorder.paused(), self.pulse.inside(Section.MEASUREMENT, 6 * DEADLINE_S, doing):
                    figures = monitor.measure(self.objective.encoder, epoch)
                self.recorder.measured(self.step_count, figures)

    def _save(self, *, force: bool) -> None:
        """Write a checkpoint if one is due; a forced one is on the disk, of all ranks, when this returns."""
        report, paused = self.recorder.event, self.recorder.paused
        self.saving.after_step(self.step_count, self._state, report, force=force, paused=paused)

    def _state(self) -> tuple[Mapping[str, Tensor], Mapping[str, Any]]:
        """All that a checkpoint holds: tensors, and what is none."""
        return training_state.collect(self.objective, self.optimizer), {
            "config": to_json(self.config),
            "resolved": self._describe(),
            "data": self.loader.state_dict(),
            "monitors": {monitor.name: monitor.state_dict() for monitor in self.monitors},
            "rollback": self.rollback.state_dict(),
            "run_id": self.identity.run_id,
            "twin_advanced": not self.step_count or self._last_move(self.step_count) is not None,
        }

    def close(self) -> None:
        """Stop the loader, close the records, give the folder back. Safe to call twice."""
        with contextlib.ExitStack() as stack:
            stack.callback(self.folder.release)
            stack.callback(self.recorder.close)
            stack.callback(self.loader.close)
            stack.callback(self.saving.close, self.recorder.event)
