"""Runs with a momentum encoder in float8: what they save, what a plan counts, and everything that
is refused."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastmoco.config import Config, ModelConfig, ParallelConfig
from fastmoco.config.serial import differences
from fastmoco.distributed.mesh import World
from fastmoco.models import ARCHITECTURES, float8, float8_inference
from fastmoco.models.float8_inference import (
    float8_layers,
    forward_speed,
    require_gain,
    require_whole,
    use_float8_inference_,
)
from fastmoco.objectives.build import build_objective
from fastmoco.planning.costs import measure_costs
from fastmoco.recipes import quickstart_digits
from fastmoco.training.forward_backward import ForwardBackward
from fastmoco.training.load_run import load_run
from fastmoco.training.trainer import Trainer
from tests.fastmoco.models.test_float8_momentum import LAYERS, encoder, needs_scaled_mm, objectives


@pytest.fixture
def anywhere(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Config]:
    """A run on a CPU, with a small encoder, nothing compiled, products emulated."""
    monkeypatch.setattr(float8, "require_support", lambda device, precision, field: None)
    monkeypatch.setattr(float8_inference, "require_gain", lambda encoder: None)
    use = functools.partial(use_float8_inference_, emulate=True)
    monkeypatch.setattr(float8_inference, "use_float8_inference_", use)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    recipe = quickstart_digits()
    model = replace(
        recipe.model, momentum_linears="float8", compile=True, hidden_dim=32, projection_dim=16
    )
    config = replace(
        recipe,
        model=model,
        data=replace(recipe.data, synthetic=True),
        knn=replace(recipe.knn, every_epochs=0),
        optim=replace(recipe.optim, warmup_epochs=0),
        precision="bf16",
        global_batch_size=16,
        device="cpu",
    )
    return lambda: config


def test_a_run_saves_what_a_native_model_reads(
    anywhere: Callable[[], Config], tmp_path: Path
) -> None:
    config = anywhere()
    trainer = Trainer.build(config, tmp_path / "run", World())
    try:
        assert len(float8_layers(trainer.objective)) == len(LAYERS)
        trainer.run(max_steps=2)
        trainer._save(force=True)
        weights = {n: t.clone() for n, t in trainer.objective.state_dict().items()}
    finally:
        trainer.close()
    objective, saved, checkpoint = load_run(tmp_path / "run")
    assert (saved.model.momentum_linears, checkpoint.step) == ("float8", 2)
    assert not float8_layers(objective)
    assert all(torch.equal(weights[n], t) for n, t in objective.state_dict().items())
    native = replace(config, model=replace(config.model, momentum_linears="native"))
    assert differences(config, native) == ["model.momentum_linears: 'float8' -> 'native'"]
    other = Trainer.build(native, tmp_path / "run", World(), allow=["model.momentum_linears"])
    other.close()
    assert all(torch.equal(weights[n], t) for n, t in other.objective.state_dict().items())


@needs_scaled_mm
def test_the_planner_counts_the_float8_step(
    anywhere: Callable[[], Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(float8_inference, "use_float8_inference_", use_float8_inference_)
    config = anywhere()
    native = replace(config, model=replace(config.model, momentum_linears="native"))
    ours, usual = measure_costs(config, "bf16"), measure_costs(native, "bf16")
    assert (ours.step_flops, ours.parameters) == (usual.step_flops, usual.parameters)
    assert (ours.graph, ours.train, ours.heads) == (usual.graph, usual.train, usual.heads)


# Refused


@pytest.mark.parametrize(
    ("name", "speed", "fused"),
    [
        ("vit_tiny", 0.70, 1.45),
        ("vit_small", 1.04, 2.06),
        ("vit_base", 1.41, 2.13),
        ("vit_large", 1.52, 2.09),
        ("vit_huge", 1.60, 2.07),
    ],
)
def test_encoders_that_lose_by_their_casts_are_refused(
    name: str, speed: float, fused: float
) -> None:
    with torch.device("meta"):
        module = ARCHITECTURES[name](image_size=224, patch_size=14 if name == "vit_huge" else 16)
    assert round(forward_speed(module), 2) == speed
    assert round(forward_speed(module, fused=True), 2) == fused
    if speed > 1:
        require_gain(module)
        return
    with pytest.raises(
        ValueError, match=rf"192 channels .* at {speed:.2f} of the speed of bf16 .*, not measured"
    ):
        require_gain(module)
    assert forward_speed(encoder(depth=1)) == 0  # no layer to take


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"compile": False}, "compile=False: momentum_linears=float8 requires --model.compile"),
        (
            {"compile": True, "linears": "float8"},
            "linears=float8 already covers the momentum encoder",
        ),
    ],
)
def test_settings_that_lose_are_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        ModelConfig(architecture="vit_large", momentum_linears="float8", **options)


def test_devices_without_float8_and_shards_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(
        quickstart_digits(),
        device="cpu",
        precision="bf16",
        parallel=ParallelConfig(strategy="fsdp"),
    )
    config = replace(config, model=replace(config.model, momentum_linears="float8", compile=True))
    with pytest.raises(
        ValueError, match=r"momentum_linears='float8': device 'cpu' has no fast float8 products"
    ):
        build_objective(config, torch.device("cpu"))
    _, ours, _ = objectives()
    with pytest.raises(
        ValueError, match=r"momentum_linears='float8': .* use parallel.strategy ddp"
    ):
        ForwardBackward(config, ours, World(rank=0, world_size=2), "bf16")
    require_whole(False)
