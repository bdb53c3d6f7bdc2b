"""MoCo v3 with token dropping against golden numbers, and runs with phases.

What every objective must do with it is in test_conformance.py.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

from fastmoco.config import Config
from fastmoco.config.phases import phases_of
from fastmoco.distributed.mesh import World
from fastmoco.models import VisionTransformer
from fastmoco.models.token_drop import TokenDraws, kept_ids, taken
from fastmoco.objectives import MoCoV3
from fastmoco.objectives.build import build_objective
from fastmoco.objectives.chunk_graphs import ChunkGraphs
from fastmoco.objectives.chunked import ChunkedStep
from fastmoco.objectives.interface import Progress
from fastmoco.objectives.reference import plain_forward
from fastmoco.optim import build_adamw
from fastmoco.run.folder import RunFolder
from fastmoco.training.trainer import Trainer
from tests.distributed.run_trainer import CONFIG
from tests.fastmoco.objectives import test_conformance as conformance
from tests.golden_objective import FLOAT64, Data, Gates, error, read_sibling
from tests.spikes import ROLLING

PHASES = {"keep_tokens": "0.25@0,0.5@0.4,1@0.9", "patch_schedule": "4@0,2@0.2"}
"""In a run of 6 steps they begin with steps 0, 1, 2 and 5; it is saved after step 2."""
NOISE = ("norm.bias", "attn.qkv.bias", "head.1.running_mean")
"""Without a true gradient, in part or whole: AdamW makes steps of rounding errors there."""
GATES = {
    torch.float64: FLOAT64,
    torch.float32: Gates(loss=3 * 2e-6, parameter=3 * 3e-6, gradient=3 * 2e-5, adamw_noise=True),
}


@pytest.fixture(scope="module")
def data() -> Data:
    return read_sibling("flip")


class GivenNoise(TokenDraws):
    """Draws from the noise of a file."""

    def __init__(self, noise: np.ndarray) -> None:
        super().__init__(0)
        self.noise = torch.from_numpy(noise)

    def __call__(self, images: int, view: int, *, kept: int, step: int, **_: Any) -> Tensor:
        return kept_ids(self.noise[step, view], kept)


def golden_objective(data: Data, dtype: torch.dtype) -> MoCoV3:
    _, size, patch, width, depth, heads, hidden, dim = data["moco/cfg"].tolist()
    build = partial(
        VisionTransformer,
        image_size=size,
        patch_size=patch,
        embed_dim=width,
        depth=depth,
        num_heads=heads,
    )
    objective = MoCoV3(
        build, projection_dim=dim, hidden_dim=hidden, temperature=float(data["moco/T"])
    ).to(dtype)
    objective.phases = phases_of(f"{1 - float(data['moco/ratio'])}@0", "", patch)
    objective.token_draws = GivenNoise(data["moco/noise"])
    weights = {
        our_name(key.removeprefix("moco/init/")): torch.from_numpy(value)
        for key, value in data.items()
        if key.startswith("moco/init/")
    }
    missing, unexpected = objective.load_state_dict(weights, strict=False)
    assert missing == ["encoder.pos_embed", "momentum_encoder.pos_embed"]
    assert unexpected == []
    assert error(objective.encoder.pos_embed, data["moco/pos"]) == 0
    return objective


def our_name(name: str) -> str:
    return name.replace("twin.", "momentum_encoder.", 1) if name.startswith("twin.") else name


@pytest.mark.parametrize("case", range(3))
def test_tokens_that_stay_match_golden(data: Data, case: int) -> None:
    def of(name: str) -> Tensor:
        return torch.from_numpy(data[f"c{case}_{name}"])

    phases = phases_of(f"{1 - float(data[f'c{case}_ratio'])}@0", "", 16)
    ids = kept_ids(of("noise"), phases.items[0].kept(of("noise").shape[1]))
    assert error(taken(of("tokens"), ids), data[f"c{case}_kept"]) == 0
    dropped = torch.ones(of("noise").shape).scatter(1, ids, 0)
    assert torch.equal(dropped.to(torch.int8), of("mask"))
    whole = kept_ids(of("noise"), of("noise").shape[1])
    assert torch.equal(whole.argsort(dim=1), of("ids_restore"))


@pytest.mark.parametrize("dtype", GATES)
@pytest.mark.parametrize("way", ["fast", "plain", "chunks"])
def test_three_steps_match_golden(data: Data, dtype: torch.dtype, way: str) -> None:
    objective, gate = golden_objective(data, dtype), GATES[dtype]
    optimizer = build_adamw(
        objective.named_parameters(), lr=0.0, weight_decay=float(data["moco/wd"])
    )
    for step in range(3):
        at = Progress(step, 3)
        views = tuple(torch.from_numpy(data[f"moco/x{n}"][step]).to(dtype) for n in (1, 2))
        kept = objective.inputs(views, at=at).kept
        assert np.array_equal(torch.stack(kept).numpy(), data["moco/keep"][step])
        objective.update_momentum_encoder(float(data["moco/m"][step]))
        optimizer.param_groups[0]["lr"] = float(data["moco/lr"][step])
        optimizer.zero_grad()
        if way == "chunks":
            loss = ChunkedStep(objective, chunk=4)(*views, at=at).loss
        else:
            forward = objective if way == "fast" else partial(plain_forward, objective)
            loss = forward(*views, at=at).loss
            loss.backward()
        assert error(loss.detach()[None], data["moco/loss"][step : step + 1]) <= gate.loss
        if step == 0:
            check_gradients(objective, data, gate)
        optimizer.step()
        if step == 0:
            check_parameters(objective, data, "moco/step0/param/", gate)
    check_parameters(objective, data, "moco/final/param/", gate)
    check_parameters(objective, data, "moco/final/buf/", gate)


def check_gradients(objective: MoCoV3, data: Data, gate: Gates) -> None:
    prefix = "moco/step0/grad/"
    own = {name: p.grad for name, p in objective.named_parameters() if p.grad is not None}
    assert {f"{prefix}{name}" for name in own} == {key for key in data if key.startswith(prefix)}
    for name, gradient in own.items():
        wider = 3 if name.endswith("qkv.bias") and gate.adamw_noise else 1
        assert error(gradient, data[prefix + name]) <= wider * gate.gradient, name


def check_parameters(objective: MoCoV3, data: Data, prefix: str, gate: Gates) -> None:
    state, found = objective.state_dict(), 0
    for key in data:
        name = our_name(key.removeprefix(prefix))
        if key.startswith(prefix) and not name.endswith(NOISE):
            assert gate.parameter is not None
            assert error(state[name], data[key]) <= gate.parameter, name
            found += 1
    assert found


def with_phases(config: Config, **model: Any) -> Config:
    return replace(config, model=replace(config.model, **{**PHASES, **model}))


def test_a_run_passes_its_phases(tmp_path: Path) -> None:
    config = with_phases(replace(CONFIG, log_every_steps=1))
    trainer = Trainer.build(config, tmp_path / "run", World())
    try:
        widths = []
        encode = trainer.objective.encoder._encoded
        with mock.patch.object(
            trainer.objective.encoder,
            "_encoded",
            side_effect=lambda tokens, paths: (
                widths.append(tokens.shape[1]) if torch.is_grad_enabled() else None,
                encode(tokens, paths),
            )[1],
        ):
            assert trainer.run() == 0
        total = trainer.resolved.total_steps
        phases, side = config.model.phases, config.model.image_size
    finally:
        trainer.close()
    expected = []
    for step in range(total):
        phase = phases.at(step, total)
        expected.append(1 + int((side // (phase.patch_size or 2)) ** 2 * phase.keep))
    assert widths == expected
    assert expected == [2, 5, 9, 9, 9, 17]
    folder = RunFolder(tmp_path / "run")
    of_steps = [phases.at(step, total) for step in range(total)]
    assert [v for _, v in folder.read_metric("keep_tokens")] == [p.keep for p in of_steps]
    assert [v for _, v in folder.read_metric("patch_size")] == [
        float(p.patch_size or 2) for p in of_steps
    ]


def test_a_run_that_stopped_in_a_phase_continues_to_the_same_bits(tmp_path: Path) -> None:
    conformance.check_continued(with_phases(CONFIG), tmp_path)


def test_a_rollback_into_another_phase_takes_steps_back(tmp_path: Path) -> None:
    conformance.check_rollback(with_phases(ROLLING), tmp_path)


def test_graphs_of_chunks_are_made_again_at_each_phase() -> None:
    config = with_phases(CONFIG)
    objective = conformance.rough(config)
    graphs = ChunkGraphs(objective, 4, capture=False)
    step = ChunkedStep(objective, chunk=4, graphs=graphs)
    views = conformance.views_of(config)
    with mock.patch.object(graphs, "_build", wraps=graphs._build) as build:
        built = []
        for number in range(10):
            at = Progress(number, 10, 4)
            whole = float(objective(*views, at=at).loss.detach())
            assert float(step(*views, at=at).loss.detach()) == pytest.approx(whole, rel=1e-12)
            built.append(build.call_count)
    assert [b - a for a, b in zip([0, *built], built, strict=False)] == [
        1, 0, 1, 0, 1, 0, 0, 0, 0, 1,
    ]  # fmt: skip


def test_what_would_have_no_effect_is_refused() -> None:
    config = conformance.config_of(conformance.SupervisedConfig)
    frozen = replace(config, objective=replace(config.objective, train_from="head", mixup=0.0))
    for name, value in (("keep_tokens", "0.5"), ("patch_schedule", "4@0,2@0.5")):
        wrong = replace(frozen, model=replace(frozen.model, **{name: value}))
        with pytest.raises(ValueError, match=rf"model\.{name}=.*no effect on a frozen"):
            build_objective(wrong, torch.device("cpu"))
