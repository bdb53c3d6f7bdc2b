"""Training steps of a tiny encoder: chunks against the whole batch, no host wait, and a skipped
step that changes nothing.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks.contest import relative_error
from benchmarks.gpu.checks import Check, Place
from fastmoco.config import BatchConfig, Config, KnnConfig
from fastmoco.distributed.mesh import start_world
from fastmoco.objectives import Output
from fastmoco.recipes import quickstart_digits
from fastmoco.training.trainer import Trainer

Errors = dict[str, tuple[float, float]]


def _config(
    place: Place, chunk: Literal["none"] | int, precision: Literal["fp32", "bf16"] = "fp32"
) -> Config:
    config = quickstart_digits()
    return replace(
        config,
        device="cpu" if place.device.type == "cpu" else "gpu",
        precision=precision,
        threads=1 if place.dry else 0,
        global_batch_size=16 if place.dry else 64,
        epochs=1e6,
        log_every_steps=10**6,
        model=replace(config.model, compile=False),
        batch=BatchConfig(chunk=chunk, kept="auto" if chunk == "none" else 1),
        data=replace(config.data, synthetic=True),
        knn=KnnConfig(every_epochs=0),
    )


@contextmanager
def _trainer(config: Config) -> Iterator[Trainer]:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        trainer = Trainer.build(config, folder, start_world(config.device))
        stack.callback(trainer.close)
        yield trainer


@contextmanager
def _no_waiting(place: Place) -> Iterator[None]:
    """Raise an error if the host waits for the device."""
    if place.device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if place.device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")


def _gradients(trainer: Trainer) -> Tensor:
    found: list[Tensor] = []

    def keep() -> None:
        grads = (p.grad for p in trainer.objective.parameters())
        found.append(torch.cat([grad.flatten().float() for grad in grads if grad is not None]))

    _step(trainer, keep)
    return found[0]


def _step(trainer: Trainer, act: Callable[[], None]) -> None:
    """One step, and something done between its backward and its pass over the gradients."""
    plain = trainer.train_step.forward_backward

    def forward_backward(*views: Tensor, **options: Any) -> Output:
        output = plain(*views, **options)
        act()
        return output

    trainer.train_step.forward_backward = forward_backward
    trainer.step(trainer.loader.next())
    trainer.train_step.forward_backward = plain


def _chunks_equal_the_whole(place: Place) -> Errors:
    with _trainer(_config(place, "none")) as trainer:
        whole = _gradients(trainer)
    with _trainer(_config(place, 4 if place.dry else 16)) as trainer:
        chunked = _gradients(trainer)
    # In float32, because initial batch norms over few images amplify rounding
    # about ten thousand times.
    return {"gradients": (relative_error(chunked, whole), 1e-2)}


def _steps_do_not_wait(place: Place) -> Errors:
    with _trainer(
        _config(place, 4 if place.dry else 16, "fp32" if place.dry else "bf16")
    ) as trainer:
        for _ in range(3):  # the first is logged; then allocators and tables of pointers are stable
            trainer.step(trainer.loader.next())
        batches = [trainer.loader.next() for _ in range(3)]
        with _no_waiting(place):
            losses = [trainer.step(batch).loss for batch in batches]
    return {
        "losses that are not finite": (float(sum(not torch.isfinite(loss) for loss in losses)), 0.0)
    }


def _a_bad_step_leaves_no_trace(place: Place) -> Errors:
    with _trainer(_config(place, "none")) as trainer:
        trainer.step(trainer.loader.next())
        before = [p.detach().clone() for p in trainer.objective.encoder.parameters()]

        def poison() -> None:
            grad = trainer.objective.encoder.cls_token.grad
            assert grad is not None  # noqa: S101 - a type: after a backward
            grad[..., 0] = float("inf")

        _step(trainer, poison)
        after = list(trainer.objective.encoder.parameters())
        moved = sum(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
        trainer.step(trainer.loader.next())
        # The learning rate is still so small that weights near 1 do not change.
        stuck = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    return {"tensors that moved": (float(moved), 0.0), "stuck after it": (float(stuck), 0.0)}


STEP_CHECKS: dict[tuple[str, str], Check] = {
    ("step: chunks = whole", "step"): _chunks_equal_the_whole,
    ("step: no host wait", "step"): _steps_do_not_wait,
    ("step: a bad step leaves no trace", "step"): _a_bad_step_leaves_no_trace,
}
"""Checks by name and op."""
