"""Two, four and eight real gloo processes against one: every number equal, every mutant caught.

All cases of one world size share one process group (see run_ranks.py); starting one costs seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from fastmoco.objectives import MoCoV3
from fastmoco.objectives.reference import plain_forward
from tests.distributed.launching import Results, launch
from tests.distributed.run_ranks import UNEVEN, norm_and_inputs, objective_and_views, rows_of
from tests.golden_objective import our_name

Golden = Callable[[str], dict[str, np.ndarray]]


@pytest.fixture(
    scope="module",
    params=[pytest.param(2, id="2 ranks"), pytest.param(4, id="4 ranks", marks=pytest.mark.slow)],
)
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Results of all cases, once a world size."""
    return launch(request.param, tmp_path_factory.mktemp("ranks"))


def one_process(stem: str, dtype: torch.dtype) -> tuple[MoCoV3, tuple[torch.Tensor, ...]]:
    """The whole global batch in this process: objective after backward, and its output."""
    objective, pair = objective_and_views(stem, dtype)
    output = objective(*pair)
    output.loss.backward()
    return objective, rows_of(output)


def distance(case: dict[str, object], objective: MoCoV3) -> float:
    """Largest difference of any gradient from one process's, over the largest gradient where that
    exceeds 1."""
    gradients = case["gradients"]
    assert isinstance(gradients, dict)
    expected = {n: p.grad for n, p in objective.named_parameters() if p.grad is not None}
    assert gradients.keys() == expected.keys()
    largest = max(1.0, *(g.abs().max().item() for g in expected.values()))
    return max((gradients[n] - g).abs().max().item() for n, g in expected.items()) / largest


def test_every_process_knows_its_place(ranks: Results) -> None:
    assert [rank["world"] for rank in ranks] == [(r, len(ranks)) for r in range(len(ranks))]


@pytest.mark.parametrize("stem", ["patch", "conv"])
@pytest.mark.parametrize(("dtype", "tolerance"), [("fp64", 1e-12), ("fp32", 1e-5)])
def test_loss_gradients_and_buffers_equal_one_process(
    ranks: Results, stem: str, dtype: str, tolerance: float
) -> None:
    objective, output = one_process(stem, torch.float64 if dtype == "fp64" else torch.float32)
    cases = [rank[f"{stem} {dtype}"] for rank in ranks]
    mean = sum(case["output"][0] for case in cases) / len(ranks)
    assert abs(mean - output[0]) <= tolerance
    for i, whole in enumerate(output[1:], start=1):
        error = (torch.cat([case["output"][i] for case in cases]) - whole).abs().max()
        assert error <= tolerance * max(1.0, whole.abs().max().item())
    for case in cases:
        assert distance(case, objective) <= tolerance
        for name, buffer in objective.named_buffers():
            assert (case["buffers"][name] - buffer).abs().max() <= tolerance, name
            assert torch.equal(case["buffers"][name], cases[0]["buffers"][name]), name


def test_forward_by_the_book_agrees_on_every_rank(ranks: Results) -> None:
    objective, pair = objective_and_views("patch", torch.float64)
    output = plain_forward(objective, *pair)
    output.loss.backward()
    for rank in ranks:
        for ours, book in zip(rank["patch fp64"]["output"], rank["plain"]["output"], strict=True):
            assert (ours - book).abs().max() <= 1e-12
    for name, parameter in objective.named_parameters():
        if parameter.grad is not None:
            mean = sum(rank["plain"]["gradients"][name] for rank in ranks) / len(ranks)
            assert (mean - parameter.grad).abs().max() <= 1e-12, name


@pytest.mark.faults
@pytest.mark.parametrize("mutant", ["wrong offset", "local norms"])
def test_mutants_are_far_from_one_process(ranks: Results, mutant: str) -> None:
    objective, output = one_process("patch", torch.float64)
    mean = sum(rank[mutant]["output"][0] for rank in ranks) / len(ranks)
    assert abs(mean - output[0]) > 1e-3
    assert distance(ranks[0][mutant], objective) > 1e-3
    if mutant == "local norms":
        first, last = ranks[0][mutant]["buffers"], ranks[-1][mutant]["buffers"]
        assert (
            first["encoder.head.1.running_mean"] - last["encoder.head.1.running_mean"]
        ).abs().max() > 1e-3


@pytest.mark.faults
def test_rank_dependent_start_is_refused_on_every_rank(ranks: Results) -> None:
    for rank in ranks:
        assert (
            f"ranks=[{len(ranks) - 1}]: parameters or buffers differ"
            in rank["rank-dependent start"]["message"]
        )


def test_unsynchronised_norm_is_refused(ranks: Results) -> None:
    for rank in ranks:
        assert rank["foreign norm"]["message"].startswith(
            "1=BatchNorm1d: its statistics would cover one rank only"
        )


@pytest.mark.faults
def test_uneven_parts_are_refused_on_every_rank_and_even_ones_come_in_rank_order(
    ranks: Results,
) -> None:
    rows = [4] * (len(ranks) - 1) + [3]
    for rank in ranks:
        assert rank["uneven keys"]["message"].startswith(
            f"keys per rank={rows}: every rank must have the same number"
        )
        gathered = rank["uneven keys"]["gathered"]
        assert gathered[:, 0].tolist() == [float(r) for r in range(len(ranks)) for _ in range(2)]
        assert not gathered.requires_grad


@pytest.mark.parametrize("kind", ["1d", "1d affine", "2d affine"])
def test_norm_over_uneven_parts_equals_torch_on_the_whole(ranks: Results, kind: str) -> None:
    ours, x, weight = norm_and_inputs(kind)
    count = sum(UNEVEN[: len(ranks)])
    x, weight = x[:count].requires_grad_(), weight[:count]
    build = torch.nn.BatchNorm2d if "2d" in kind else torch.nn.BatchNorm1d
    norm = build(3, affine="affine" in kind).double()
    norm.load_state_dict(ours.state_dict())
    y = norm(x)
    (y * weight).sum().backward()
    results = [rank["norms"][kind] for rank in ranks]
    assert (torch.cat([r[0] for r in results]) - y).abs().max() <= 1e-12
    assert (torch.cat([r[1] for r in results]) - x.grad).abs().max() <= 1e-12
    for i, parameter in enumerate(norm.parameters()):
        assert (sum(r[2][i] for r in results) - parameter.grad).abs().max() <= 1e-10
    for r in results:
        for ours_buffer, buffer in zip(r[3], norm.buffers(), strict=True):
            assert (ours_buffer - buffer).abs().max() <= 1e-11
    assert (torch.cat([r[4] for r in results]) - norm.eval()(x)).abs().max() <= 1e-10


def test_norm_computes_bf16_inputs_in_float32(ranks: Results) -> None:
    whole = norm_and_inputs("1d")[1].bfloat16().float()
    norm = torch.nn.BatchNorm1d(3)
    y = norm(whole)
    outputs = [rank["norms"]["bf16"] for rank in ranks]
    assert {output[0].dtype for output in outputs} == {torch.bfloat16}
    assert (
        torch.cat([output[0] for output in outputs]).float() - y
    ).abs().max() <= 2**-8 * y.abs().max()
    assert (outputs[0][1] - norm.running_mean).abs().max() <= 1e-5


def check_golden_loss(ranks: Results, data: dict[str, np.ndarray]) -> None:
    """Loss and gradients of each rank against loss.npz, and the one-process identity."""
    names = [
        f"mr{j}" for j in range(int(data["num_mr"])) if data[f"mr{j}_loss"].shape[0] == len(ranks)
    ]
    assert len(names) == 1
    name = names[0]
    for r, rank in enumerate(ranks):
        loss, dq1, dq2 = rank["golden loss"][name]
        assert abs(loss.item() - data[f"{name}_loss"][r]) <= 1e-12
        assert np.abs(dq1.numpy() - data[f"{name}_dq1"][r]).max() <= 1e-12
        assert np.abs(dq2.numpy() - data[f"{name}_dq2"][r]).max() <= 1e-12


def test_losses_of_ranks_match_golden(ranks: Results, golden: Golden) -> None:
    check_golden_loss(ranks, golden("loss"))


@pytest.mark.slow
def test_losses_of_eight_ranks_match_golden(tmp_path: Path, golden: Golden) -> None:
    check_golden_loss(launch(8, tmp_path, "golden loss"), golden("loss"))


def test_three_golden_steps_over_ranks(ranks: Results, golden: Golden) -> None:
    data = golden("step")
    mean = sum(rank["golden steps"]["losses"] for rank in ranks) / len(ranks)
    assert np.abs(mean.numpy() - data["loss"]).max() <= 2e-14
    state = ranks[0]["golden steps"]["state"]
    for name in (k for k in data if k.startswith("final/param/")):
        assert np.abs(state[our_name(name[12:])].numpy() - data[name]).max() <= 2e-14, name
    for rank in ranks[1:]:
        for name, tensor in state.items():
            assert torch.equal(rank["golden steps"]["state"][name], tensor), name
