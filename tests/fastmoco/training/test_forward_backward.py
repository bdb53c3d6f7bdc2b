"""Which way a run takes its batch, and that a run in chunks is the run it would have been."""

from __future__ import annotations

import json
from dataclasses import replace
from unittest import mock

import pytest
import torch

from fastmoco.config import BatchConfig, Config, ModelConfig
from fastmoco.config.serial import differences, from_json, to_json
from fastmoco.distributed.mesh import World
from fastmoco.objectives.build import build_objective
from fastmoco.optim.build import build_optimizer
from fastmoco.planning.choose import choose_plan
from fastmoco.planning.plan import HEADROOM
from fastmoco.planning.plan import plan_step as plan_step_itself
from fastmoco.recipes import quickstart_digits, with_image_size
from fastmoco.run.folder import RunFolder
from fastmoco.training import state as training_state
from fastmoco.training.forward_backward import ForwardBackward
from fastmoco.training.trainer import Trainer

WORLD = World()


def _config(**batch: object) -> Config:
    recipe = quickstart_digits()
    model = replace(recipe.model, hidden_dim=32, projection_dim=8)
    return replace(recipe, model=model, batch=BatchConfig(**batch), precision="fp32")  # type: ignore[arg-type]


def _plan(config: Config, free: float) -> tuple[int, int, str]:
    objective = build_objective(config, WORLD.device)
    with mock.patch("fastmoco.planning.choose.free_bytes", return_value=int(free)):
        plan = choose_plan(config, objective, WORLD, "fp32")
    return plan.chunk, plan.kept, plan.reason


def test_auto_takes_the_whole_batch_where_it_fits_and_chunks_where_not() -> None:
    config = _config()
    with mock.patch("fastmoco.planning.choose.measure_costs") as counting:
        assert _plan(config, 1e10) == (0, 0, "small compared with the free memory")
        assert not counting.called  # the bound is enough
    chunk, _, reason = _plan(config, 150e6)
    assert chunk == 0
    assert reason.startswith("about 0.0")
    chunk, kept, reason = _plan(config, 32e6)
    assert 0 < chunk < 256
    assert 0 <= kept < 256 // chunk
    assert "all at once would take" in reason


def test_the_bound_of_a_small_step_is_one() -> None:
    from fastmoco.planning.choose import _at_most
    from fastmoco.planning.costs import measure_costs
    from fastmoco.planning.plan import whole_bytes

    config = _config()
    objective = build_objective(config, WORLD.device)
    assert whole_bytes(measure_costs(config, "fp32", attention="explicit"), 256) < _at_most(
        config, objective, 256
    )


def test_a_copy_for_saves_in_the_background_lies_in_the_same_memory_on_a_cpu() -> None:
    config = _config()
    copies = {}
    for background in (True, False):
        chosen = replace(config, checkpoint=replace(config.checkpoint, async_save=background))
        with mock.patch("fastmoco.planning.choose.plan_step", wraps=plan_step_itself) as plan_step:
            _plan(chosen, 100e6)
        copies[background] = plan_step.call_args.kwargs["budget"]
    objective = build_objective(config, WORLD.device)
    trained = sum(p.nbytes for p in objective.parameters() if p.requires_grad)
    everything = sum(p.nbytes for p in objective.parameters())
    assert copies[False] - copies[True] == everything + 2 * trained
    assert (
        copies[False] == 100e6 * HEADROOM - 3 * trained
    )  # gradient and moments; the weights are there already


def test_where_a_run_continues_memory_is_looked_at_before_the_optimizer_is_there(
    brief_run, tmp_path
) -> None:
    """Its state is subtracted from what is free then: it must not be missing there already."""
    first = Trainer.build(brief_run, tmp_path, WORLD)
    try:
        first.run(max_steps=3)
        first._save(force=True)
    finally:
        first.close()
    calls = mock.Mock()
    calls.free_bytes.return_value = 10**10
    calls.restore.side_effect = training_state.restore
    calls.build_optimizer.side_effect = build_optimizer
    with (
        mock.patch("fastmoco.planning.choose.free_bytes", calls.free_bytes),
        mock.patch("fastmoco.training.state.restore", calls.restore),
        mock.patch("fastmoco.training.trainer.build_optimizer", calls.build_optimizer),
        mock.patch("fastmoco.checkpoint.Checkpoint.tensors", None),  # nobody reads them whole
    ):
        Trainer.build(brief_run, tmp_path, WORLD).close()
    assert [name for name, _, _ in calls.mock_calls] == ["free_bytes", "build_optimizer", "restore"]


def test_none_and_numbers_are_taken_as_given() -> None:
    assert _plan(_config(chunk="none"), 1e6) == (0, 0, "requested")
    assert _plan(_config(chunk=48, kept=2), 1e10)[:2] == (48, 2)
    assert _plan(_config(chunk=48), 1e10)[:2] == (48, 6)


def test_a_conv_stem_is_refused_in_chunks_and_whole_under_auto() -> None:
    config = with_image_size(_config(chunk=4), 32, patch_size=16)
    config = replace(
        config,
        global_batch_size=8,
        model=replace(config.model, architecture="vit_conv_small", patch_size=16),
    )
    objective = build_objective(config, WORLD.device)
    with pytest.raises(
        ValueError,
        match=r"batch.chunk=4: this trunk cannot go in chunks, because its convolutional stem",
    ):
        ForwardBackward(config, objective, WORLD, "fp32")
    config = replace(config, batch=BatchConfig())
    with mock.patch("fastmoco.planning.choose.free_bytes", return_value=10**6):
        plan = choose_plan(config, objective, WORLD, "fp32")
    assert plan.chunk == 0
    assert "chunks would help, but its convolutional stem" in plan.reason


@pytest.mark.parametrize(
    ("field", "value"),
    [("chunk", 0), ("chunk", "all"), ("chunk", True), ("kept", -1), ("kept", "none")],
)
def test_batch_fields_are_checked(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{field}={value!r}"):
        BatchConfig(**{field: value})  # type: ignore[arg-type]


def test_checkpointing_is_checked() -> None:
    with pytest.raises(ValueError, match="checkpointing='some'"):
        ModelConfig(checkpointing="some")  # type: ignore[arg-type]


def test_a_config_from_before_loads_and_its_run_may_go_on_in_chunks() -> None:
    config = _config()
    old = json.loads(json.dumps(to_json(config)))
    del old["batch"], old["model"]["checkpointing"]
    assert from_json(old) == config
    now = replace(
        config, batch=BatchConfig(chunk=16), model=replace(config.model, checkpointing="full")
    )
    assert differences(from_json(old), now) == []


def test_a_run_in_chunks_has_the_losses_of_the_whole_and_says_so(
    brief_run, tmp_path, capsys
) -> None:
    config = replace(
        brief_run, epochs=1.0, optim=replace(brief_run.optim, warmup_epochs=0.5), precision="fp64"
    )
    losses = {}
    for name, batch in (
        ("whole", BatchConfig(chunk="none")),
        ("chunks", BatchConfig(chunk=12, kept=2)),
    ):
        trainer = Trainer.build(replace(config, batch=batch), tmp_path / name, WORLD)
        try:
            assert trainer.run() == 0
        finally:
            trainer.close()
        losses[name] = [value for _, value in RunFolder(tmp_path / name).read_metric("loss")]
    assert len(losses["whole"]) == 5
    assert max(abs(a - b) for a, b in zip(*losses.values(), strict=True)) <= 1e-11
    assert "6 chunks of 12 images, 24 images keep their graphs" in "".join(capsys.readouterr())
    resolved = json.loads((tmp_path / "chunks" / "config.json").read_text())["resolved"]
    assert resolved["chunk"] == 12
    assert resolved["plan"]["kept"] == 2
    assert torch.get_default_dtype() == torch.float32
