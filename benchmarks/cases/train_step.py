"""A whole training step at a large batch, against the step that most people run: eager, mixed precision, nothing fused.

The opponent is written from the paper with torch's own parts: every view through every block alone, attention written out,
full logits and cross entropy, fp16 autocast with a gradient scaler on GPUs (float32 on CPUs), torch's AdamW, the twin averaged
tensor by tensor. It keeps all graphs, so where the batch does not fit it takes the largest half, quarter, ... of it that does.
Both start from the same weights; loss and gradients of the first images are compared in float32 before anything is timed.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.contest import relative_error
from benchmarks.measure import interleave, ratios
from fastmoco.config import BatchConfig, Config, KnnConfig
from fastmoco.distributed.mesh import start_world
from fastmoco.objectives.reference import plain_forward
from fastmoco.recipes import get_recipe
from fastmoco.setup_run import build_objective
from fastmoco.step_costs import measure_costs
from fastmoco.trainer import Trainer

NAME = "train_step"
DEFAULTS = {
    "device": "auto",
    "recipe": "",
    "architecture": "",
    "linears": "native",
    "compile": 0,
    "batch": 0,
    "chunk": "auto",
    "rounds": 5,
    "steps": 2,
    "checked": 32,
    "tflops": 790.0,
}
LIMITS = {"loss": 1e-4, "gradients": 2e-3, "features": 0.3}
"""Relative distances in float32 that two ways of computing a step may have. Float8, which rounds to 1/16, is compared by the
features of its trunk: batch norms of fresh heads over few images make any gradient of it another one."""


def run(options: dict[str, Any]) -> dict[str, Any]:
    """Check, then measure.

    Args:
        options: ``device`` ("auto", "cpu" or "cuda"); ``recipe`` (empty: vit_s16_e300_b4096 on a GPU, quickstart_digits on a
            CPU); ``architecture`` and ``linears`` instead of the recipe's, ``compile`` 1 for blocks through torch.compile (the
            opponent stays native and eager); ``batch`` images (0: the recipe's); ``chunk`` ("auto", "none" or a number);
            ``rounds`` of ``steps`` steps; images ``checked``; ``tflops`` of the device in bf16, which the utilisation is a
            share of.

    Returns:
        ``errors`` and ``failed``; ``plan`` of the trainer; the opponent's ``eager_batch``; ``images_per_s`` by side and round;
        ``speedup`` by images/s; on CUDA ``milliseconds`` an image, ``mfu`` and ``peak_bytes`` by side.
    """
    available = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(available if options["device"] == "auto" else options["device"])
    config = _config(options, device)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        eager = EagerStep(config, device)
        trainer = Trainer.build(config, folder / "run", start_world(config.device))
        stack.callback(trainer.close)
        batch = trainer.loader.next()
        result: dict[str, Any] = {"plan": str(trainer.gradients.plan), "failed": {}, "speedup": {}}
        checked = min(options["checked"], config.global_batch_size)
        views = batch.view1[:checked].float(), batch.view2[:checked].float()
        result["errors"] = _compare(trainer, eager, *views)
        beyond = [f"{name} {error:.2g}" for name, error in result["errors"].items() if not error <= LIMITS[name]]
        if beyond:
            result["failed"] = {"eager": ", ".join(beyond)}
            return result
        result["eager_batch"] = _largest_that_fits(eager, batch.view1, batch.view2)
        some = batch.view1[: result["eager_batch"]], batch.view2[: result["eager_batch"]]
        sides: dict[str, tuple[Callable[[], object], int]] = {
            "fastmoco": (lambda: trainer.step(batch), config.global_batch_size),
            "eager": (lambda: eager(*some), result["eager_batch"]),
        }
        peaks = {name: _peak_bytes(step, device) for name, (step, _) in sides.items()}
        measures = {
            name: _images_per_s(step, images, options["steps"], device) for name, (step, images) in sides.items()
        }
        figures = interleave(measures, rounds=options["rounds"])
    result["images_per_s"] = {name: [round(x, 1) for x in values] for name, values in figures.items()}
    result["speedup"] = {"eager": ratios(figures["fastmoco"], figures["eager"])}
    if device.type == "cuda":
        flops = measure_costs(config, trainer.precision).step_flops
        medians = {name: statistics.median(values) for name, values in figures.items()}
        result["milliseconds"] = {name: round(1e3 / value, 4) for name, value in medians.items()}
        result["mfu"] = {name: round(value * flops / (options["tflops"] * 1e12), 4) for name, value in medians.items()}
        result["peak_bytes"] = peaks
    return result


def _config(options: dict[str, Any], device: torch.device) -> Config:
    recipe = options["recipe"] or ("vit_s16_e300_b4096" if device.type == "cuda" else "quickstart_digits")
    config = get_recipe(recipe)
    chunk = options["chunk"]
    model = replace(
        config.model,
        architecture=options["architecture"] or config.model.architecture,
        linears=options["linears"],
        compile=bool(options["compile"]),
    )
    return replace(
        config,
        model=model,
        device="cuda" if device.type == "cuda" else "cpu",
        global_batch_size=options["batch"] or config.global_batch_size,
        epochs=1e6,
        log_every_steps=10**6,
        batch=BatchConfig(chunk=chunk if chunk in ("auto", "none") else int(chunk)),
        data=replace(config.data, synthetic=True),
        knn=KnnConfig(every_epochs=0),
    )


class EagerStep:
    """The opponent: one step by the book on whatever it is called with.

    Attributes:
        objective: encoder, twin and predictor, from the config's seed.
    """

    def __init__(self, config: Config, device: torch.device) -> None:
        written_out = replace(config, model=replace(config.model, attention="explicit", linears="native"))
        self.objective = build_objective(written_out, device)
        self._half = device.type == "cuda"
        self._device = device
        self._momentum = config.objective.ema_momentum
        trained = [parameter for parameter in self.objective.parameters() if parameter.requires_grad]
        self._optimizer = torch.optim.AdamW(
            trained, lr=1e-6, betas=config.optim.betas, weight_decay=config.optim.weight_decay
        )
        self._scaler = torch.amp.GradScaler(device.type, enabled=self._half)

    def __call__(self, view1: Tensor, view2: Tensor) -> None:
        """Forward, backward, optimizer, average."""
        with torch.no_grad():
            pairs = zip(self.objective.momentum_encoder.parameters(), self.objective.encoder.parameters(), strict=True)
            for twin, own in pairs:
                twin.mul_(self._momentum).add_(own, alpha=1 - self._momentum)
        with torch.autocast(self._device.type, dtype=torch.float16, enabled=self._half):
            loss = plain_forward(self.objective, view1.float(), view2.float()).loss
        self._optimizer.zero_grad()
        self._scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        self._scaler.step(self._optimizer)
        self._scaler.update()


def _compare(trainer: Trainer, eager: EagerStep, view1: Tensor, view2: Tensor) -> dict[str, float]:
    """Relative distance of loss and of all gradients as one vector, both in float32; in float8 of class features instead."""
    if trainer.config.model.linears == "float8":
        with torch.no_grad():
            ours, plain = trainer.objective.encoder(view1), eager.objective.encoder(view1)
        return {"features": relative_error(plain, ours)}
    losses, gradients = [], []
    for objective, forward in ((trainer.objective, trainer.objective), (eager.objective, None)):
        output = forward(view1, view2) if forward is not None else plain_forward(objective, view1, view2)
        output.loss.backward()
        losses.append(output.loss.detach())
        gradients.append(torch.cat([p.grad.flatten() for p in objective.parameters() if p.grad is not None]))
        objective.zero_grad(set_to_none=True)
    return {"loss": relative_error(losses[1], losses[0]), "gradients": relative_error(gradients[1], gradients[0])}


def _largest_that_fits(eager: EagerStep, view1: Tensor, view2: Tensor) -> int:
    """Images of the batch, or of the first half of it again and again, that the opponent has memory for."""
    images = len(view1)
    while True:
        try:
            eager(view1[:images], view2[:images])
            return images
        except torch.OutOfMemoryError:
            eager.objective.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
            images //= 2
            if images < 2:
                raise


def _peak_bytes(step: Callable[[], object], device: torch.device) -> int:
    """Allocated at the peak of one step, all that lies there anyway included; 0 on a CPU."""
    step()  # compile, tune, make the optimizer's state
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device)


def _images_per_s(step: Callable[[], object], images: int, steps: int, device: torch.device) -> Callable[[], float]:
    def measure() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        for _ in range(steps):
            step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return steps * images / (time.perf_counter() - began)

    return measure
