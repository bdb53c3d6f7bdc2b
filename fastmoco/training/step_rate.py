"""The speed of some steps of a config in a process of its own, for `fastmoco tune`.

    python -m fastmoco.training.step_rate RESULT < REQUEST

Variables that libraries read once, such as those of OpenMP and of malloc, need a fresh process for
each measurement. The request is JSON with the names of the arguments of `step_rate`; the result is
JSON, also of a config that was refused or ran out of memory.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import fastmoco  # noqa: F401 (before torch: it sets how long OpenMP's threads spin)

from fastmoco_pipelines.processes import follow_parent  # isort: skip

if __name__ == "__main__":
    follow_parent()  # before torch, which takes seconds

import torch  # isort: skip
from torch import Tensor

from fastmoco.config import Config
from fastmoco.config.serial import from_json
from fastmoco.distributed.mesh import start_world
from fastmoco.errors import RunError
from fastmoco.training.setup import versions
from fastmoco.training.short_run import peak_bytes, settle, short_run
from fastmoco.training.trainer import Trainer
from fastmoco_pipelines import BadImageError, ShardError

COMPARED = 4
"""First steps whose losses and gradient norms are reported."""
SELDOM = 10**9
"""Steps between two log lines: none waits for the device."""


def step_rate(
    config: Config,
    *,
    warm_up: int,
    steps: int,
    at_rest: bool = False,
    within: Path | None = None,
) -> dict[str, Any]:
    """Train some steps of a config and measure all but the first ones.

    Losses are tensors until the end, so no step waits for the device.

    Args:
        config: of the run. Evaluations are left out.
        warm_up: steps before the clock starts: they compile, fill caches and use up the batches
            that the loader has made meanwhile.
        steps: that are measured, at least 1.
        at_rest: whether the clocks start and end while the loader rests: it then makes as many
            batches as are trained on, whose processor time counts. Otherwise the rate is that of a
            long run, in which the loader is not ahead if it is the slower one.
        within: folder of the run's folder, as of `short_run`.

    Returns:
        `images_per_s`, `images_per_cpu_s` (processor time of all threads), `step_s` (mean),
        `wait_share` (of the time, for the loader), `others_share` (of all cores, taken by other
        processes; None where the system does not report it), `peak_bytes` (of the device; on a CPU
        the largest resident set), `losses` and `gradient_norms` of the first `COMPARED` steps,
        `precision`, `device`, `versions`, and what the config has resolved to.

    Raises:
        ValueError: for a config that is refused, or a run with fewer steps.
    """
    config = replace(config, log_every_steps=SELDOM)
    with short_run(config, start_world(config.device), within=within) as trainer:
        return _measured(trainer, warm_up, steps, at_rest=at_rest)


def _measured(trainer: Trainer, warm_up: int, steps: int, *, at_rest: bool) -> dict[str, Any]:
    """`step_rate` of a run that is built."""
    device = trainer.world.device
    total = trainer.resolved.total_steps
    if warm_up + steps > total:
        raise ValueError(
            f"epochs={trainer.config.epochs:g}: the run has {total} steps, and {warm_up + steps} "
            "are to be measured; take more epochs"
        )
    losses: list[Tensor] = []
    norms: list[Tensor] = []
    waited = 0.0

    def train(count: int) -> None:
        nonlocal waited
        for _ in range(count):
            batch = trainer.loader.next()
            waited += trainer.loader.wait_seconds
            result = trainer.step(batch)
            if len(losses) < COMPARED:
                losses.append(result.loss.detach())
                norms.append(result.norms["total"].detach())
        settle(trainer, loader=at_rest)

    # The clocks start after the warm-up, with the device idle.
    train(warm_up)
    waited = 0.0
    busy, used, began = _busy_seconds(), time.process_time(), time.perf_counter()
    train(steps)
    seconds, used = time.perf_counter() - began, time.process_time() - used
    others = None
    if busy is not None and (after := _busy_seconds()) is not None:
        others = max(0.0, after - busy - used) / seconds / (os.cpu_count() or 1)

    images = steps * trainer.resolved.local_batch_size
    return {
        "images_per_s": images / seconds,
        "images_per_cpu_s": images / used,
        "step_s": seconds / steps,
        "wait_share": waited / seconds,
        "others_share": others,
        "peak_bytes": peak_bytes(device),
        "losses": [float(loss) for loss in losses],
        "gradient_norms": [float(norm) for norm in norms],
        "precision": trainer.precision,
        "device": _name(device),
        "device_type": device.type,
        "attention_backend": trainer.attention.backend,
        "chunk": trainer.forward_backward.plan.chunk,
        "plan": str(trainer.forward_backward.plan),
        "compiled": trainer.forward_backward.compile.compiled,
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }


def _busy_seconds(stat: Path = Path("/proc/stat")) -> float | None:
    """Seconds that all cores of the machine have worked; None where the system does not report
    it."""
    try:
        words = stat.read_text().split("\n", 1)[0].split()[1:]
    except OSError:
        return None
    user, nice, system, _, _, interrupts, soft, steal = map(int, words[:8])
    return (user + nice + system + interrupts + soft + steal) / os.sysconf("SC_CLK_TCK")


def _name(device: torch.device) -> str:
    """The name of the GPU; "cpu" for the CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def answer(request: Mapping[str, Any], *, within: Path | None = None) -> dict[str, Any]:
    """`step_rate` of a request, or `{"refused": reason}`, `{"failed": reason}`.

    Args:
        request: `config` (JSON of a config), `patterns` (dotted names of its fields that may be
            URLs with keys, which that JSON does not have), and the others of `step_rate`.
        within: of `step_rate`.
    """
    try:
        config = from_json(dict(request["config"]))
        for name, value in request["patterns"].items():
            group, _, field = name.partition(".")
            part = replace(getattr(config, group), **{field: value})
            config = replace(config, **{group: part})
        counts = {name: request[name] for name in ("warm_up", "steps", "at_rest")}
        return step_rate(config, **counts, within=within)
    except (ValueError, RunError, ShardError, BadImageError) as error:
        return {"refused": str(error)}
    except (torch.OutOfMemoryError, MemoryError) as error:
        return {"failed": f"out of memory: {str(error).splitlines()[0] if str(error) else ''}"}


def main(path: Path) -> None:
    """Answer the request on standard input.

    The run is stored beside the result: the caller removes both if this process is killed.
    """
    result = answer(json.load(sys.stdin), within=path.parent)
    path.write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
