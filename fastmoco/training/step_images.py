"""Which images were in a step of a run: computed from the order of the run, its set and its lists of
bad images. No image is read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastmoco.checkpoint import list_checkpoints, read_state
from fastmoco.checkpoint.folder import step_of
from fastmoco.config import Config
from fastmoco.config.serial import from_json
from fastmoco.errors import RunError
from fastmoco.run.folder import RunFolder
from fastmoco.run.metrics_file import last_step
from fastmoco.run.world_sizes import world_size_at
from fastmoco_pipelines import ShardSet
from fastmoco_pipelines.healing.delivered import DeliveredSamples, RankSamples
from fastmoco_pipelines.sampling.order import ORDER_VERSIONS
from fastmoco_pipelines.sampling.stand_ins import Plan


@dataclass(frozen=True, kw_only=True)
class StepImages:
    """The images of one step.

    Attributes:
        step: from 1, as the console and `metrics.jsonl` count.
        epoch: passes over the set at its end.
        ranks: the images of each rank.
        world_size: of the run in this step.
    """

    step: int
    epoch: float
    ranks: list[RankSamples]
    world_size: int


class RunImages:
    """The images of the steps of a run. Close it after use.

    Args:
        run: folder of the run.
        shards: the training set, where it is not where the run had it; "": there.

    Attributes:
        shards: the training set.
        notes: what a user should know, in sentences.
        total_steps: of the run.
        bad: reason by sample, of the images that are in a list.
        unreadable: the same of images that could not be read for some time.

    Raises:
        RunError: if the folder is not that of a run, or the set is not the run's.
        ValueError, ShardError: if the set cannot be opened.
    """

    def __init__(self, run: Path, shards: str = "") -> None:
        self._folder = RunFolder(run)
        self._saved = self._folder.read_config()
        config, order = self._read()
        resolved = self._saved["resolved"]
        where = f"{run / 'config.json'}: resolved"
        self.total_steps = _whole(resolved, "total_steps", where)
        self._steps_per_epoch = _whole(resolved, "steps_per_epoch", where)
        self._ranks_at_last = _whole(resolved, "world_size", where)
        version = order.get("order_version", 1)
        data = f"{run / 'config.json'}: data"
        if type(version) is not int or version not in ORDER_VERSIONS:
            raise RunError(
                f"{run}: the run shuffles its images by version {version!r} of the order, which "
                "this fastmoco does not know: use the one that trained it"
            )

        # The set, which must be the very one of the run.
        self.shards = ShardSet.open(shards or config.data.shards, cache=config.data)
        try:
            windows = self.shards.windows(
                _whole({"shuffle_window": 0} | order, "shuffle_window", data, least=0), config.data
            )
            same = order["digest"] in (self.shards.digest, self.shards.digest_1)
            if not same or windows.digest != order.get("order_digest", ""):
                raise RunError(
                    f"{run} was trained on other images than those now in "
                    f"{shards or 'data.shards'}, or on the same ones in other shards: give the "
                    "original set with --shards"
                )
            plan = Plan(
                seed=_whole(order, "seed", data, least=0),
                windows=windows,
                global_batch_size=_whole(order, "global_batch_size", data),
                order_version=version,
            )
            self._delivered = DeliveredSamples(self.shards, plan, run_list=self._folder.quarantine)
        except BaseException:
            self.shards.close()
            raise
        self.bad = self._delivered.bad
        self.unreadable = self._delivered.unreadable
        self.notes = list(self._delivered.problems)

    def of_step(self, step: int, rank: int | None = None) -> StepImages:
        """The images of a step.

        Args:
            step: from 1.
            rank: of the run in that step; None: all ranks.

        Raises:
            ValueError: if there is no such step or rank.
        """
        if not 1 <= step <= self.total_steps:
            raise ValueError(f"step={step}: the steps of this run are 1 to {self.total_steps}")
        world_size = self._world_size(step)
        if rank is not None and not 0 <= rank < world_size:
            most = f"0 to {world_size - 1}" if world_size > 1 else "0 alone"
            raise ValueError(f"rank={rank}: the ranks of step {step} were {most}")
        ranks = self._delivered.of_step(step - 1, world_size=world_size)
        return StepImages(
            step=step,
            epoch=step / self._steps_per_epoch,
            ranks=ranks if rank is None else [ranks[rank]],
            world_size=world_size,
        )

    def steps_done(self) -> int:
        """Steps that the run has trained for certain."""
        saved = [step_of(path) for path in list_checkpoints(self._folder.checkpoints)]
        logged = last_step(self._folder.metrics) if self._folder.metrics.exists() else 0
        return max(logged, *saved, 0)

    def close(self) -> None:
        """Close the files of the set."""
        self.shards.close()

    def _read(self) -> tuple[Config, dict[str, Any]]:
        """The config of the run, and what the order of its images depends on. A run of an earlier
        version has the latter in its checkpoints alone."""
        run = self._folder.path
        if not {"config", "resolved"} <= self._saved.keys():
            raise RunError(
                f"{run} contains no config.json of a run; is it the folder given to fastmoco train "
                "--out?"
            )
        config = from_json(self._saved["config"])
        if config.data.synthetic:
            raise RunError(f"{run} was trained on synthetic images, which have no files")
        order = self._saved.get("data")
        if not isinstance(order, dict):
            checkpoints = list_checkpoints(self._folder.checkpoints)
            if not checkpoints:
                raise RunError(
                    f"{run} contains neither the order of its images nor a checkpoint with it: an "
                    "earlier version of fastmoco trained it; continue it once to have it written"
                )
            order = read_state(checkpoints[-1]).get("data", {})
        if not {"digest", "seed", "global_batch_size"} <= order.keys():
            raise RunError(f"{run}: its config.json is damaged: it lacks the order of the images")
        return config, order

    def _world_size(self, step: int) -> int:
        """The ranks that trained a step; of a run of an earlier version those that wrote the first
        checkpoint after it."""
        known = world_size_at(self._saved, step)
        if known is not None:
            return known
        for path in list_checkpoints(self._folder.checkpoints):
            if step_of(path) >= step:
                return int(read_state(path)["resolved"]["world_size"])
        return self._ranks_at_last


def _whole(values: Any, name: str, where: str, least: int = 1) -> int:
    """A whole number of a `config.json`, which anybody may have edited.

    Raises:
        RunError: naming the file and the field.
    """
    value = values.get(name) if isinstance(values, dict) else None
    if type(value) is not int or not least <= value < 2**63:
        raise RunError(
            f"{where}.{name}={value!r:.80}: must be a whole number from {least} on; the "
            "file is damaged: restore it from a copy"
        )
    return value
