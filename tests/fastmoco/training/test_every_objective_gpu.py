"""Steps of every objective on a device that is not the host's: all tensors of a step are there, and
between log steps the host never waits for it.

Where there is no GPU the device is that of tests/other_device.py. What whole runs of MoCo v3 do is in
test_step_waits_gpu.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastmoco.config import Config, ObjectiveConfig, resolve
from fastmoco.distributed.mesh import World
from fastmoco.objectives.build import OBJECTIVES, build_model
from fastmoco.objectives.chunked import ChunkedStep
from fastmoco.objectives.interface import Objective, Output, Progress
from fastmoco.optim.averaged import AveragedOptimizer
from fastmoco.optim.build import build_optimizer
from fastmoco.telemetry.histograms import GradientHistograms
from fastmoco.telemetry.stability import effective_rank, feature_std, pair_cosines
from fastmoco.training.step import StepResult, TrainStep
from fastmoco.training.step_guard import StepGuard
from fastmoco_pipelines import Batch
from fastmoco_pipelines.spec import each_view
from tests.fastmoco.objectives.test_conformance import CONFIG, CONVNEXT, RESNET, SWIN, config_of
from tests.other_device import DEVICE, Waits, moved_, other_device

IMAGES, CHUNK = 8, 4
AT = Progress(3, 12, 4)
EVERY = [pytest.param(kind, CONFIG, id=kind.kind) for kind in OBJECTIVES]
BY_KIND = {kind.kind: kind for kind in OBJECTIVES}
OTHERS = [
    pytest.param(BY_KIND[kind], base, id=f"{kind} {base.model.family}")
    for kind, base in (("moco", RESNET), ("moby", SWIN), ("esvit", SWIN), ("byol", CONVNEXT))
]
"""Other trunks, each under a few objectives."""


class Steps:
    """Steps of an objective as the trainer makes them, in chunks where it can.

    Args:
        config: of a run.
        objective: its objective, on the device.
        optimizer: of it.
        device: of both.
        autocast: makes the contexts of the forwards.
    """

    def __init__(
        self,
        config: Config,
        objective: Objective,
        optimizer: AveragedOptimizer,
        device: torch.device,
        autocast: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        self.objective, self._autocast = objective, autocast
        whole = config.model.family == "resnet"  # whose batch norms see the whole batch
        self._chunked = (
            None if whole else ChunkedStep(objective, chunk=CHUNK, kept=1, autocast=autocast)
        )
        self.step = TrainStep(
            config,
            resolve(config, world_size=1, sample_count=1000),
            objective=objective,
            forward_backward=self._forward_backward,
            optimizer=optimizer,
            guard=StepGuard(objective, World(device=device), patience=9),
        )
        views = tuple(
            torch.randn(IMAGES, 3, view.size, view.size, device=device)
            for view in each_view(config.data.views)
        )
        labels = np.arange(IMAGES) % 5 if objective.needs_labels else None
        self._batch = Batch(views=views, sample_ids=np.arange(IMAGES), step=3, labels=labels)

    def __call__(self, *, logged: bool) -> StepResult:
        return self.step(self._batch, AT, accuracy=logged, figures=logged)

    def _forward_backward(self, *views: Tensor, **rest: Any) -> Output:
        self.objective.before_step(AT)
        if self._chunked is not None:
            return self._chunked(*views, **rest)
        with self._autocast():
            output: Output = self.objective(*views, **rest)
        output.loss.backward()
        return output


class Plain(AveragedOptimizer):
    """Plain descent on averages and weights, for a device without kernels."""

    @torch.no_grad()
    def _update_weights(self, ema_momentum: float | None, skip: Tensor | None) -> None:
        moved = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        torch._foreach_add_(moved, [p.grad for p in moved], alpha=-0.1)

    def _differing_frozen(self) -> list[Any]:
        return []  # compared where they were written, which they are not


@contextmanager
def steps_on(device: str, kind: type[ObjectiveConfig], base: Config) -> Iterator[Steps]:
    config = config_of(kind, base)
    objective = build_model(config)
    if device == "cuda":
        there = torch.device("cuda", 0)
        objective.to(there)
        optimizer = build_optimizer(
            config, objective.named_parameters(), objective.averages(), objective.parameter_group
        )
        autocast = partial(torch.autocast, "cuda", dtype=torch.bfloat16)
        yield Steps(config, objective, optimizer, there, autocast)
        return
    with other_device() as mode:
        moved_(objective, mode)
        trained = [p for p in objective.parameters() if p.requires_grad]
        plain = Plain(torch.optim.SGD(trained, lr=0.1), objective.averages())
        yield Steps(config, objective, plain, DEVICE, nullcontext)


def figures_of(result: StepResult) -> dict[str, Tensor]:
    """What the recorder makes of a log step on the device."""
    watch = result.output.watch
    figures = {name: tensor for name, tensor in watch.items() if tensor.ndim == 0}
    rows = watch.get("queries", watch.get("features"))
    if rows is not None:
        figures |= {"std": feature_std(rows[0]), "rank": effective_rank(rows[0])}
        if "keys" in watch:
            figures["cosines"] = pair_cosines(rows[0], watch["keys"][-1])
    return {**figures, **result.figures, **result.norms, "loss": result.loss}


@pytest.mark.parametrize(("kind", "base"), EVERY)
def test_a_step_stays_on_its_device_and_never_waits_for_it(
    kind: type[ObjectiveConfig], base: Config
) -> None:
    with steps_on("other", kind, base) as steps:
        with Waits() as watch:
            steps(logged=False)
            result = steps(logged=True)
        # A log step waits once, for all of its numbers together.
        assert watch.found == []
        devices = {name: tensor.device.type for name, tensor in figures_of(result).items()}
        assert set(devices.values()) == {"meta"}, devices
        histograms = GradientHistograms(every=1)
        with Waits() as watch:
            histograms.take(steps.step.gradients(), steps.objective.places())
        assert watch.found == []


@pytest.mark.gpu
@pytest.mark.parametrize(("kind", "base"), [*EVERY, *OTHERS])
def test_so_it_does_on_a_gpu(
    kind: type[ObjectiveConfig], base: Config, nan_poisoned_memory: None
) -> None:
    torch.use_deterministic_algorithms(False)  # that chooses other kernels
    with steps_on("cuda", kind, base) as steps:
        for logged in (True, False, False):  # tables of pointers and tiles
            steps(logged=logged)
        torch.cuda.set_sync_debug_mode("error")
        try:
            results = [steps(logged=False) for _ in range(2)]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert all(bool(result.loss.isfinite()) for result in results)
        figures = figures_of(steps(logged=True))
        assert {tensor.device.type for tensor in figures.values()} == {"cuda"}
        assert all(bool(tensor.isfinite().all()) for tensor in figures.values()), figures


FAULTS: dict[str, Callable[[Tensor], object]] = {
    "tensor": lambda rows: torch.tensor([1.0], device=rows.device),
    "new_tensor": lambda rows: rows.new_tensor([1.0]),
    "copy from cpu to meta": lambda rows: torch.ones(3).to(rows.device),
    "copy from meta to cpu": lambda rows: rows.to("cpu", non_blocking=True),
    "indices of the host": lambda rows: rows[torch.arange(2)],
    "cpu": lambda rows: rows.cpu(),
}
REFUSED: dict[str, Callable[[Tensor], object]] = {
    "item": lambda rows: rows.sum().item(),
    "bool": lambda rows: bool(rows.isfinite().all()),
    "mask": lambda rows: rows[rows > 0],
    "equal": lambda rows: torch.equal(rows, rows),
    "host": lambda rows: rows + torch.ones(3),
    "arange": lambda rows: torch.gather(rows, 0, torch.arange(2)),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_waits_is_found(name: str) -> None:
    with other_device(), Waits() as watch:
        rows = torch.zeros(3, device=DEVICE)
        FAULTS[name](rows)
        torch.ones(3).to(DEVICE, non_blocking=True)  # of pinned memory there
    assert name in watch.found
    assert len(set(watch.found) - {name}) <= 1  # the call and its copy


@pytest.mark.parametrize("name", REFUSED)
def test_what_reads_numbers_or_meets_the_host_is_refused(name: str) -> None:
    with other_device():
        rows = torch.zeros(3, device=DEVICE)
        with pytest.raises(Exception, match=r"aten|devices|device") as refused:
            REFUSED[name](rows)
    assert type(refused.value).__name__ in (
        "DataDependentOutputException",
        "DynamicOutputShapeException",
        "FakeTensorDeviceMismatchError",
        "RuntimeError",
    )
