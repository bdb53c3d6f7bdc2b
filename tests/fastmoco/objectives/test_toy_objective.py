"""A dry run of a new objective: all of it is in this file, and no file of ours is touched.

It predicts the mean colors of an image from the encoder's class feature. Nothing couples its
images, so losses of chunks add up. It has a part of each kind that a sibling may have: a buffer
that moves after a step, another on each rank, a parameter that is frozen at first, an evaluated
encoder, numbers that a log shows, a group of parameters with rates of its own, and every hook.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import fastmoco
from fastmoco.config import BatchConfig, Config, ObjectiveConfig
from fastmoco.config.serial import from_json, to_json
from fastmoco.distributed.mesh import World
from fastmoco.distributed.parallelize import _digest
from fastmoco.objectives import build
from fastmoco.objectives.chunked import ChunkedStep
from fastmoco.objectives.interface import (
    Coupling,
    Features,
    Inputs,
    Objective,
    Output,
    ParameterGroup,
    Progress,
)
from fastmoco.planning.costs import measure_costs
from fastmoco.planning.plan import chunked_bytes, plan_step
from fastmoco.run.folder import RunFolder
from fastmoco.training import state as training_state
from fastmoco.training.load_run import load_run
from fastmoco.training.trainer import Trainer
from fastmoco_pipelines.spec import each_view
from tests.distributed.run_trainer import CONFIG
from tests.fastmoco.objectives import test_conformance as conformance

CALLS: list[str] = []


@dataclass(frozen=True, slots=True, kw_only=True)
class ToyConfig(ObjectiveConfig):
    """The toy's numbers."""

    kind: ClassVar[str] = "toy"
    rate: float = 0.5


class Toy(Objective):
    """Mean colors of all views from the class feature of the first, less a moving centre."""

    coupling = Coupling.NONE
    per_rank = frozenset({"seen"})
    centre: Tensor
    seen: Tensor

    def __init__(self, encoder: Any, colors: int, rate: float) -> None:
        super().__init__()
        self.encoder, self.decoder, self.rate = encoder, nn.Linear(encoder.embed_dim, colors), rate
        self.register_buffer("centre", torch.zeros(colors))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self._mean = torch.zeros(colors)

    @classmethod
    def build(cls, config: Config, build_encoder: Callable[[], Any]) -> Toy:
        assert isinstance(config.objective, ToyConfig)
        return cls(build_encoder(), 3 * len(each_view(config.data.views)), config.objective.rate)

    def before_step(self, at: Progress) -> None:
        CALLS.append("before_step")
        self._mean = torch.zeros_like(self._mean)

    def features(self, inputs: Inputs, at: Progress, *, target: bool = True) -> Features:
        online = self.encoder(inputs.views[0])
        return Features(
            (online,),
            (torch.cat([view.mean((2, 3)) for view in inputs.views], dim=1),) if target else (),
        )

    def compare(self, features: Features, at: Progress, *, accuracy: bool = False) -> Output:
        CALLS.append("compare")
        colors = features.target[0]
        self._mean = self._mean.to(colors) + colors.detach().sum(0)
        loss = (self.decoder(features.online[0]) - (colors - self.centre)).square().mean()
        return Output(loss, {"error": loss.detach()})

    def reference(self, inputs: Inputs, at: Progress, *, accuracy: bool = False) -> Output:
        class_rows = self.encoder.encode_plain(self.encoder.patch_tokens(inputs.views[0]))
        colors = torch.cat([view.mean(3).mean(2) for view in inputs.views], dim=1)
        loss = torch.nn.functional.mse_loss(self.decoder(class_rows), colors - self.centre)
        return Output(loss, {"error": loss.detach()})

    def after_backward(self, at: Progress) -> None:
        CALLS.append("after_backward")
        assert all(p.grad is not None for p in self.decoder.parameters())

    @torch.no_grad()
    def after_step(self, skipped: Tensor | None, at: Progress) -> None:
        CALLS.append("after_step")
        kept = torch.zeros(()) if skipped is None else skipped
        self.centre.copy_(
            torch.where(
                kept > 0, self.centre, 0.9 * self.centre + 0.01 * self._mean.to(self.centre)
            )
        )
        self.seen.add_((kept == 0).to(torch.int64))

    def frozen(self, at: Progress) -> frozenset[str]:
        return frozenset({"decoder.weight"}) if at.step == 0 else frozenset()

    def parameter_group(self, name: str, parameter: nn.Parameter) -> ParameterGroup:
        if name.startswith("decoder."):
            return ParameterGroup(lr_scale=0.5, constant_lr=True, weight_decay_scale=0.0)
        return ParameterGroup()

    def schedules(self, at: Progress) -> Mapping[str, float]:
        return {"rate": self.rate * (1 - at.step / at.total_steps)}


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    """The line of registration."""
    CALLS.clear()
    with mock.patch.dict(build.OBJECTIVES, {ToyConfig: Toy.build}):
        yield


def config_of(**changes: Any) -> Config:
    return replace(CONFIG, objective=ToyConfig(), **changes)


def test_it_trains_saves_and_resumes_through_the_trainer(tmp_path: Path) -> None:
    conformance.run_whole(config_of(), tmp_path / "whole")
    assert CALLS[:4] == ["before_step", "compare", "after_backward", "after_step"]
    rates = RunFolder(tmp_path / "whole").read_metric("rate")
    assert rates == [(step + 1, pytest.approx(0.5 * (1 - step / 6))) for step in range(6)]
    errors = dict(RunFolder(tmp_path / "whole").read_metric("error"))
    assert errors == dict(RunFolder(tmp_path / "whole").read_metric("loss"))
    assert errors[6] < errors[1]

    # Stopped after three steps, and continued.
    trainer = Trainer.build(config_of(), tmp_path / "run", World())
    try:
        start = {n: p.detach().clone() for n, p in trainer.objective.named_parameters()}
        trainer.step(trainer.loader.next())
        after = dict(trainer.objective.named_parameters())
        assert torch.equal(
            after["decoder.weight"], start["decoder.weight"]
        )  # frozen in the first step
        assert not torch.equal(after["decoder.bias"], start["decoder.bias"])
        for _ in range(2):
            trainer.step(trainer.loader.next())
        assert not torch.equal(after["decoder.weight"], start["decoder.weight"])
        encoder, decoder = trainer.optimizer.param_groups
        assert decoder["param_names"] == ["decoder.weight", "decoder.bias"]
        scheduled, peak = (
            trainer.train_step.learning_rate(trainer.progress(2)),
            trainer.resolved.peak_lr,
        )
        assert 0 < scheduled < peak
        assert (encoder["lr"], decoder["lr"]) == (scheduled, 0.5 * peak)
        assert (encoder["weight_decay"], decoder["weight_decay"]) == (
            CONFIG.optim.weight_decay,
            0.0,
        )
        trainer._save(force=True)
    finally:
        trainer.close()
    conformance.run_whole(config_of(), tmp_path / "run")
    conformance.assert_same_end(tmp_path / "run", tmp_path / "whole")
    objective, saved, _ = load_run(tmp_path / "run")
    assert isinstance(objective, Toy)
    assert saved.objective == ToyConfig()
    assert int(objective.seen) == 6


def test_a_save_while_a_parameter_is_frozen_continues_to_the_same_bits(tmp_path: Path) -> None:
    conformance.run_whole(config_of(), tmp_path / "whole")
    trainer = Trainer.build(config_of(), tmp_path / "run", World())
    try:
        trainer.step(trainer.loader.next())
        tensors = training_state.collect(trainer.objective, trainer.optimizer)
        assert not [name for name in tensors if name.startswith("optimizer.decoder.weight")]
        assert [name for name in tensors if name.startswith("optimizer.decoder.bias")]
        trainer._save(force=True)
    finally:
        trainer.close()
    conformance.run_whole(config_of(), tmp_path / "run")
    conformance.assert_same_end(tmp_path / "run", tmp_path / "whole")


def test_what_differs_between_ranks_on_purpose_may_differ_at_the_start() -> None:
    one = conformance.rough(config_of())
    other = copy.deepcopy(one)
    other.seen += 3
    assert torch.equal(_digest(one), _digest(other))
    other.centre += 1
    assert not torch.equal(_digest(one), _digest(other))


def test_it_passes_the_suite_of_every_objective(tmp_path: Path) -> None:
    config = config_of()
    assert from_json(to_json(config)) == config
    conformance.check_reference(config)
    conformance.check_chunks(config)
    conformance.check_features(config)
    conformance.check_names(config, {"encoder": conformance.ENCODER, "decoder": ["weight", "bias"]})
    conformance.check_skip(config, tmp_path)


def test_it_takes_a_third_view_where_moco_v3_refuses_it(tmp_path: Path) -> None:
    data = replace(CONFIG.data, more_views=(CONFIG.data.view2,))
    with pytest.raises(
        ValueError, match=r"data: 3 views of an image, and moco_v3 takes 2; change data.more_views"
    ):
        build.build_objective(replace(CONFIG, data=data), torch.device("cpu"))
    trainer = Trainer.build(config_of(data=data), tmp_path, World())
    try:
        assert trainer.objective.decoder.out_features == 9
        assert trainer.step(trainer.loader.next()).loss.isfinite()
    finally:
        trainer.close()


def test_in_chunks_no_image_is_computed_twice_and_a_plan_says_so(tmp_path: Path) -> None:
    objective = conformance.rough(config_of())
    views = conformance.views_of(config_of())
    with mock.patch.object(objective, "features", wraps=objective.features) as features:
        ChunkedStep(objective, chunk=4)(*views)
    assert [len(call.args[0].views[0]) for call in features.call_args_list] == [4, 4, 4, 1]
    costs = measure_costs(config_of(), "fp32")
    assert costs.separate
    whole, chunks = (chunked_bytes(costs, 4096, chunk) for chunk in (4096, 64))
    assert chunks < 0.2 * whole
    plan = plan_step(costs, images=4096, budget=1.5 * chunks, tokens=17)
    assert plan.fits
    assert plan.chunk < 4096
    assert plan.overhead == 0
    run = Trainer.build(config_of(batch=BatchConfig(chunk=3)), tmp_path / "run", World())
    whole_run = Trainer.build(config_of(), tmp_path / "whole", World())
    try:
        losses = [trainer.step(trainer.loader.next()).loss.item() for trainer in (run, whole_run)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-12)
    finally:
        run.close()
        whole_run.close()


def test_what_each_rank_has_for_itself_is_saved_by_rank(tmp_path: Path) -> None:
    trainer = Trainer.build(config_of(), tmp_path / "run", World())
    try:
        trainer.objective.seen.fill_(7)
        with mock.patch.object(training_state, "group_rank", return_value=1):
            tensors = training_state.collect(trainer.objective, trainer.optimizer)
        assert "model.seen.rank1" in tensors
        assert "model.seen" not in tensors
        saved = copy.deepcopy(training_state.collect(trainer.objective, trainer.optimizer))
        saved["model.seen.rank1"] = torch.tensor(9)
        checkpoint = mock.Mock(entries=saved, path=tmp_path)
        for rank, expected in (
            (0, 7),
            (1, 9),
            (2, 7),
        ):  # a rank beyond those that saved takes the first one's
            checkpoint.read_into = lambda targets: [
                tensor.copy_(saved[name]) for name, tensor in targets.items()
            ]
            with mock.patch.object(training_state, "group_rank", return_value=rank):
                training_state.restore_model(trainer.objective, checkpoint)
            assert int(trainer.objective.seen) == expected
    finally:
        trainer.close()


def test_no_file_of_ours_knows_it_and_few_know_byol() -> None:
    """What adding an objective touches: its own two files, a form of heads if it has one, and two
    registrations."""
    package = Path(fastmoco.__file__).parent
    texts = {
        path.relative_to(package).as_posix(): path.read_text() for path in package.rglob("*.py")
    }
    assert not [path for path, text in texts.items() if "class Toy" in text or "ToyConfig" in text]
    naming = {
        path
        for path, text in texts.items()
        if "BYOLConfig" in text or "recipes.byol import" in text
    }
    assert naming == {
        "objectives/byol.py",
        "objectives/build.py",
        "recipes/byol.py",
        "recipes/__init__.py",
    }
