"""The sides of the training-step benchmark. Each can run in its own process, because it may fill
the memory of a GPU.

`python -m benchmarks.step_sides '{"side": "eager", ...}'` measures one and
prints its figures as JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from benchmarks.baseline.trainer import Baseline
from benchmarks.contest import relative_error
from fastmoco.config import BatchConfig, Config, KnnConfig
from fastmoco.distributed.mesh import start_world
from fastmoco.objectives.build import build_model
from fastmoco.objectives.reference import plain_forward
from fastmoco.recipes import get_recipe
from fastmoco.training.profiling.events import by_part
from fastmoco.training.trainer import Trainer
from fastmoco_pipelines.loading.step_parts import collecting

SIDES = ("fastmoco", "eager", "compiled")
"""`fastmoco`: the step of the trainer. `eager`: that of the baseline with explicit attention.
`compiled`: that of the baseline with torch's fused attention, through torch.compile."""
COMPILED_IMAGES = 1024
"""Largest batch of the compiled opponent, because every batch that does not fit
costs a compilation first."""
LARGEST = 40
"""Kernels that are listed."""
SEGMENTS = "expandable_segments:True"
"""Setting of torch's allocator: a large step with changing shapes then does not return its memory
and allocate it again."""


def device_of(options: dict[str, Any]) -> torch.device:
    """Device of a case."""
    available = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(available if options["device"] == "auto" else options["device"])


def config_of(options: dict[str, Any]) -> Config:
    """The config of the options: a recipe on synthetic images without logging and evaluation."""
    device = device_of(options)
    config = get_recipe(
        options["recipe"]
        or ("vit_s16_e300_b4096" if device.type == "cuda" else "quickstart_digits")
    )
    chunk, kept = options["chunk"], options["kept"]
    model = replace(
        config.model,
        architecture=options["architecture"] or config.model.architecture,
        attention=options["attention"] or config.model.attention,
        linears=options["linears"],
        momentum_linears=options["momentum_linears"],
        blocks=options["blocks"],
        # With fused blocks, which are not compiled, a run compiles the rest.
        compile="auto" if options["blocks"] == "fused" else bool(options["compile"]),
    )
    return replace(
        config,
        model=model,
        device="gpu" if device.type == "cuda" else "cpu",
        global_batch_size=options["batch"] or config.global_batch_size,
        epochs=1e6,
        log_every_steps=10**6,
        batch=BatchConfig(
            chunk=chunk if chunk in ("auto", "none") else int(chunk),
            kept=kept if kept == "auto" else int(kept),
            cuda_graphs=bool(options["cuda_graphs"]),
            activation_budget=options["activation_budget"] or "auto",
        ),
        data=replace(config.data, synthetic=True),
        knn=KnnConfig(every_epochs=0),
    )


@contextmanager
def trainer_of(config: Config) -> Iterator[Trainer]:
    """A trainer in a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer.build(config, Path(folder) / "run", start_world(config.device))
        try:
            yield trainer
        finally:
            trainer.close()


def _profiled(step: Callable[[], object], device: torch.device) -> dict[str, Any]:
    """The kernels of one call after warm-up, on a CPU its operators: their number, the sum of
    their times, that of each part of the step, and the largest.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with (
        collecting(ranges=True),
        torch.profiler.profile(activities=activities, acc_events=True) as profiler,
    ):
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    found = by_part(profiler.events(), largest=10**6)
    busy = sum(ms for _, ms, _ in found.top)
    return {
        "launches": sum(calls for _, _, calls in found.top),
        "busy_ms": round(busy, 2),
        "parts_ms": {part or "rest": round(ms, 2) for part, ms in found.device_ms.items()},
        "largest_kernels": [
            f"{ms:.2f} ms {ms / max(busy, 1e-9):.1%} x{calls} {name[:80]}"
            for name, ms, calls in found.top[:LARGEST]
        ],
    }


class Side:
    """One implementation of a step.

    Attributes:
        images: per step.
        result: fields of the result besides the times.
    """

    def __init__(
        self, step: Callable[[], object], images: int, device: torch.device, result: dict[str, Any]
    ) -> None:
        self._step = step
        self.images = images
        self._device = device
        self.result = result

    def warm(self, *, profile: bool) -> None:
        """Two untimed steps, of which the first compiles, tunes and creates the optimizer's state;
        then the peak of one.
        """
        began = time.perf_counter()
        self._step()
        self._wait()
        self.result["first_step_s"] = round(time.perf_counter() - began, 2)
        self._step()
        self._wait()
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        self._step()
        self._wait()
        peak = torch.cuda.max_memory_allocated(self._device) if self._device.type == "cuda" else 0
        self.result["peak_bytes"] = peak
        if profile:
            self.result |= _profiled(self._step, self._device)

    def images_per_s(self, steps: int) -> float:
        """Time of some consecutive steps."""
        self._wait()
        began = time.perf_counter()
        for _ in range(steps):
            self._step()
        self._wait()
        return steps * self.images / (time.perf_counter() - began)

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


@contextmanager
def open_side(name: str, options: dict[str, Any]) -> Iterator[Side]:
    """Build a side; `fastmoco` is also checked.

    Args:
        name: one of `SIDES`.
        options: of the case `train_step`.
    """
    device, config = device_of(options), config_of(options)
    if name == "fastmoco":
        with trainer_of(config) as trainer:
            batch = trainer.loader.next()
            checked = min(options["checked"], config.global_batch_size)
            result = {
                "plan": str(trainer.forward_backward.plan),
                **check(trainer, *(view[:checked] for view in batch.views)),
            }
            yield Side(lambda: trainer.step(batch), config.global_batch_size, device, result)
        return
    plain = Baseline(
        config,
        device,
        attention="sdpa" if name == "compiled" else "explicit",
        compiled=name == "compiled",
        precision="fp16" if device.type == "cuda" else config.precision,
    )
    side, images = config.model.image_size, config.global_batch_size
    if name == "compiled":
        images = min(images, COMPILED_IMAGES)
    generator = torch.Generator(device).manual_seed(0)
    views = [
        torch.randn(images, 3, side, side, device=device, generator=generator) for _ in range(2)
    ]
    images = _largest_that_fits(plain, *views)
    some = [view[:images].clone() for view in views]
    del views
    yield Side(lambda: plain.step(*some), images, device, {"batch": images})


def check(trainer: Trainer, view1: Tensor, view2: Tensor) -> dict[str, Any]:
    """Errors of the trainer's objective and of the reference, both in float32,
    relative to float64 on some images.

    Initial batch norms over few images amplify rounding about ten thousand times, so no fixed limit
    is possible; the error of the reference is the measure. Blocks run uncompiled here, because a
    graph for this batch would take longer than the check.

    Returns:
        `errors` and `plain_errors` of loss and gradients; of the features in float8, whose
        reference is float64 too.
    """
    objective = trainer.objective
    views = [as_float(trainer, view) for view in (view1, view2)]
    model = trainer.config.model
    written_out = replace(
        model, attention="explicit", linears="native", momentum_linears="native", blocks="modules"
    )
    exact = build_model(replace(trainer.config, model=written_out)).to(view1.device).double()
    exact.load_state_dict(objective.state_dict(), strict=model.linears == "native")
    with torch.compiler.set_stance("force_eager"):
        if model.linears == "float8":
            with torch.no_grad():
                truth = exact.encoder(views[0].double())
                return {
                    "errors": {"features": relative_error(objective.encoder(views[0]), truth)},
                    "plain_errors": {},
                }
        truth = _loss_and_gradients(exact, plain_forward, [view.double() for view in views])
        del exact
        plain = _loss_and_gradients(objective, plain_forward, views)
        ours = _loss_and_gradients(objective, lambda model, one, two: model(one, two), views)
    if view1.device.type == "cuda":
        torch.cuda.empty_cache()
    names = ("loss", "gradients")
    return {
        "errors": {
            name: relative_error(mine, exact)
            for name, mine, exact in zip(names, ours, truth, strict=True)
        },
        "plain_errors": {
            name: relative_error(mine, exact)
            for name, mine, exact in zip(names, plain, truth, strict=True)
        },
    }


def as_float(trainer: Trainer, view: Tensor) -> Tensor:
    """A view in the objective's dtype, from either dtype of the loader."""
    if view.is_floating_point():
        return view.float()
    return trainer.forward_backward.prepare((view, view))[0].float()


def _loss_and_gradients(
    objective: Any, forward: Callable[..., Any], views: list[Tensor]
) -> tuple[Tensor, Tensor]:
    output = forward(objective, *views)
    output.loss.backward()
    grads = [p.grad.flatten() for p in objective.parameters() if p.grad is not None]
    objective.zero_grad(set_to_none=True)
    return output.loss.detach(), torch.cat(grads)


def _largest_that_fits(baseline: Baseline, view1: Tensor, view2: Tensor) -> int:
    """The largest of batch, half, quarter, ... of it for which the opponent has memory."""
    images = len(view1)
    while True:
        try:
            baseline.step(view1[:images], view2[:images])
            return images
        except torch.OutOfMemoryError:
            baseline.model.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
            images //= 2
            if images < 2:
                raise


def measure(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Build, warm and time a side in this process."""
    with open_side(name, options) as side:
        side.warm(profile=bool(options["profile"]))
        graphs = _graphs()
        rates = [side.images_per_s(options["steps"]) for _ in range(options["rounds"])]
        compiled = {"warm": graphs, "timed": _graphs() - graphs}
        return side.result | {"images_per_s": rates, "graphs": compiled}


def _graphs() -> int:
    """Graphs that torch.compile has made in this process."""
    counters: Any = getattr(sys.modules.get("torch._dynamo.utils"), "counters", None)
    return int(counters["stats"]["unique_graphs"]) if counters else 0


def _pass_on(errors: IO[str], words: deque[str]) -> None:
    """Copy to our own standard error line by line, so that a killed process has printed something;
    keep the last lines.
    """
    for line in errors:
        sys.stderr.write(line)
        sys.stderr.flush()
        words.append(line)


def measure_apart(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """The same in a separate process with expandable segments.

    Raises:
        RuntimeError: with its last lines, if it fails.
    """
    environment = {
        **os.environ,
        "PYTORCH_CUDA_ALLOC_CONF": SEGMENTS,
        "PYTORCH_ALLOC_CONF": SEGMENTS,
    }
    command = [sys.executable, "-m", "benchmarks.step_sides", json.dumps({"side": name, **options})]
    words: deque[str] = deque(maxlen=20)
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None  # noqa: S101 - a type: it was opened with a pipe
        assert process.stderr is not None  # noqa: S101 - a type: likewise
        (
            reader := threading.Thread(target=_pass_on, args=(process.stderr, words), daemon=True)
        ).start()
        lines = [line for line in process.stdout if line.startswith("{")]
        reader.join(timeout=10)
    if process.returncode != 0 or not lines:
        raise RuntimeError(f"{name}: exit {process.returncode}: {''.join(words)[-600:]}")
    found: dict[str, Any] = json.loads(lines[-1])
    return found


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    print(json.dumps(measure(asked.pop("side"), asked)), flush=True)
