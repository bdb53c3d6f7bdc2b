"""Whole trainings on 2 and 4 real gloo processes, under DDP, FSDP2 and HSDP, against one process;
and every mutant of T33."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastmoco.distributed import World
from tests.distributed.launching import launch
from tests.distributed.run_sharded import (
    CASES,
    GRADIENTS_OF,
    OPTIONS,
    STEPS,
    Case,
    cases_of,
    run_steps,
)

pytestmark = pytest.mark.slow
references: dict[str, Case] = {}
Ranks = list[dict[str, Any]]
results: dict[int, Ranks] = {}


@pytest.fixture
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    """Results of all cases. Kept here: pytest would start the processes anew for each test's own
    list of parameters."""
    size = request.param
    if size not in results:
        out = tmp_path_factory.mktemp("sharded")
        module = "tests.distributed.run_sharded"
        results[size] = launch(size, out, *cases_of(size), module=module)  # type: ignore[assignment]
    return results[size]


def over(*chosen: str) -> pytest.MarkDecorator:
    """A test for each number of ranks, strategy and case of these names that `CASES` has."""
    rows = [
        pytest.param(world, strategy, name, id=f"{world} ranks-{strategy}-{name}")
        for world, by_strategy in CASES.items()
        for strategy, names in by_strategy.items()
        for name in names
        if name in chosen
    ]
    assert {row.values[2] for row in rows} == set(chosen)  # a name that is gone would pass unseen
    return pytest.mark.parametrize(("ranks", "strategy", "name"), rows, indirect=["ranks"])


def reference(name: str) -> Case:
    """The same training in this process: the whole batches, never in chunks, and blocks of
    modules."""
    options = {
        key: value
        for key, value in OPTIONS[name].items()
        if key not in ("chunk", "kept", "recompute", "fused")
    }
    key = str(options)
    if key not in references:
        references[key] = run_steps(World(), **options)
    return references[key]


def gap(ours: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Largest difference, over the largest number where that exceeds 1."""
    assert ours.keys() == other.keys()
    largest = max(1.0, *(t.abs().max().item() for t in other.values()))
    return (
        max((ours[n].double() - t.double()).abs().max().item() for n, t in other.items()) / largest
    )


def distances(cases: list[Case], one: Case, steps: int = STEPS) -> dict[str, float]:
    """How far the first steps of a training over ranks are from those of one process; after all
    steps, the state as well."""
    found = {"loss": 0.0, "gradients": 0.0, "norms": 0.0}
    for step in range(steps):
        mean = sum(case["losses"][step] for case in cases) / len(cases)
        found["loss"] = max(found["loss"], abs(mean - one["losses"][step]).item())
        found["norms"] = max(
            found["norms"], *(gap(case["norms"][step], one["norms"][step]) for case in cases)
        )
    for i, step in enumerate(GRADIENTS_OF):
        if step < steps:
            worst = max(gap(case["gradients"][i], one["gradients"][i]) for case in cases)
            found["gradients"] = max(found["gradients"], worst)
    if steps == STEPS:
        found["state"] = max(gap(case["state"], one["state"]) for case in cases)
        features = torch.cat([case["features"] for case in cases])
        found["features"] = gap({"": features}, {"": one["features"]})
    return found


def run_by(ranks: Ranks, name: str) -> list[Case]:
    """A case on all ranks."""
    return [rank[name] for rank in ranks]


@over(*(name for name in OPTIONS if not name.startswith("bf16")))
def test_three_steps_equal_one_process(ranks: Ranks, strategy: str, name: str) -> None:
    """Losses, every gradient, their norms; encoder, twin, batch norms' buffers and the optimizer's
    state afterwards."""
    cases = run_by(ranks, f"{strategy} {name}")
    first, all_steps = (distances(cases, reference(name), steps) for steps in (1, STEPS))
    if "fp32" in name:
        assert max(first.values()) <= 1e-5, first
        assert max(all_steps.values()) <= 1e-4, (
            all_steps
        )  # each step multiplies the rounding of the one before
        return
    assert max(first.pop("norms"), all_steps.pop("norms")) <= 1e-6  # kept in float32
    assert max(first.values()) <= 1e-12, first
    # A gradient that is zero but for rounding still moves its weight: Adam divides it by its own
    # size.
    assert max(all_steps.values()) <= (1e-9 if name.startswith(("adamw", "sweep")) else 1e-12), (
        all_steps
    )


@over("fp64")
def test_what_is_sharded_and_what_is_common(ranks: Ranks, strategy: str, name: str) -> None:
    cases = run_by(ranks, f"{strategy} {name}")
    for case in cases:
        assert case["shares"] == reference("fp64")["shares"]
        for entry, tensor in cases[0]["state"].items():
            assert torch.equal(case["state"][entry], tensor), entry
        if strategy == "ddp":
            assert not case["sharded"]
            continue
        models = {n for n in case["state"] if n.startswith("model.")}
        common = models - case["sharded"]
        assert all(
            "running_" in n or "num_batches" in n or "pos_embed" in n or "patch_embed" in n
            for n in common
        )
        assert {
            "model.encoder.cls_token",
            "model.momentum_encoder.head.0.weight",
            "model.predictor.0.weight",
        } <= case["sharded"]
        assert "optimizer.predictor.0.weight.momentum_buffer" in case["sharded"]


@over("conv fp64")
def test_the_conv_stem_is_sharded_and_shares_no_tokens(
    ranks: Ranks, strategy: str, name: str
) -> None:
    for case in run_by(ranks, f"{strategy} {name}"):
        assert "model.encoder.patch_embed.proj.0.weight" in case["sharded"]
        assert not any(case["shares"])


@over("fp64", "chunked fp64")
def test_a_twin_leaves_no_notes_for_a_backward_that_never_comes(
    ranks: Ranks, strategy: str, name: str
) -> None:
    for case in run_by(ranks, f"{strategy} {name}"):
        assert case["notes"] <= 1  # its head's


@over("bf16", "bf16 chunked", "bf16 fused")
def test_bf16_over_float32_shards(ranks: Ranks, strategy: str, name: str) -> None:
    """Weights that cross ranks in bf16 give what autocast gives; master weights, twin and optimizer
    stay float32."""
    cases, exact = run_by(ranks, f"{strategy} {name}"), reference("fp32")
    usual = distances([reference("bf16")], exact, 1)
    assert usual["gradients"] > 1e-3  # it was bf16
    for what, distance in distances(cases, exact, 1).items():
        assert distance <= 1.5 * usual[what] + 0.02, what
    for case in cases:
        assert case["dtypes"] == {torch.float32}


@over("wrong offset", "local norms", "mixed start")
@pytest.mark.faults
def test_mutants_are_far_from_one_process(ranks: Ranks, strategy: str, name: str) -> None:
    cases = run_by(ranks, f"{strategy} {name}")
    found = distances(cases, reference("fp64"))
    assert found["gradients"] > 1e-3
    assert found["loss"] > 1e-4
    if name == "mixed start":
        for case in cases:
            assert case["message"].startswith(
                f"ranks=[{len(ranks) - 1}]: parameters or buffers differ from rank 0's"
            )


@over("unsynced trunk")
def test_a_trunk_that_is_never_summed_gives_no_gradients(
    ranks: Ranks, strategy: str, name: str
) -> None:
    cases = run_by(ranks, f"{strategy} {name}")
    missing = [n for n in reference("fp64")["gradients"][0] if n not in cases[0]["gradients"][0]]
    assert any("blocks" in n for n in missing)


@over("default roots")
def test_roots_as_torch_makes_them_do_not_pass(ranks: Ranks, strategy: str, name: str) -> None:
    cases = run_by(ranks, f"{strategy} {name}")
    for case in cases:
        assert "message" in case or gap(case["state"], reference("fp64")["state"]) > 1e-3


@over("uneven")
@pytest.mark.faults
def test_uneven_parts_end_in_a_named_error_on_every_rank(
    ranks: Ranks, strategy: str, name: str
) -> None:
    rows = [3] * (len(ranks) - 1) + [2]
    for case in run_by(ranks, f"{strategy} {name}"):
        assert case["message"].startswith(
            f"keys per rank={rows}: every rank must have the same number of images"
        )


@over("flipped bit")
@pytest.mark.faults
def test_a_flipped_bit_is_found_and_its_rank_named(ranks: Ranks, strategy: str, name: str) -> None:
    last = len(ranks) - 1
    everyone = "among ranks=[0, 1]" if len(ranks) == 2 else f"on ranks=[{last}] from the others"
    for case in run_by(ranks, f"{strategy} {name}"):
        messages = case["messages"]
        for common in ("encoder.head.1.running_var", "momentum_encoder.pos_embed"):
            assert messages[common].startswith(f"{common} differs {everyone}")
        weight = messages["predictor.0.weight"]
        if strategy == "fsdp":
            assert weight == "no error"  # each number is there once
        else:
            where = f"among ranks=[{last - 2}, {last}]" if strategy == "hsdp" else everyone
            assert weight.startswith(f"predictor.0.weight differs {where}")


@pytest.mark.parametrize("ranks", [2], indirect=True, ids=["2 ranks"])
def test_groups_that_do_not_fit_are_refused(ranks: Ranks) -> None:
    for case in run_by(ranks, "bad shard size"):
        assert [m[:21] for m in case["messages"]] == [
            "parallel.shard_size=2",
            "parallel.shard_size=3",
        ]


@pytest.mark.parametrize("ranks", [2], indirect=True, ids=["2 ranks"])
def test_compiled_blocks_compute_the_same(ranks: Ranks) -> None:
    cases = run_by(ranks, "fsdp compiled fp32")
    assert max(distances(cases, reference("fp32"), 1).values()) <= 1e-5
