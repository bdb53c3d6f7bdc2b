"""MoCo v3 against golden numbers: three steps in full, two hundred by their losses."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from fastmoco.objectives import MoCoV3, Output
from fastmoco.optim import build_adamw, ema_momentum, learning_rate
from tests.golden_objective import build_golden, our_name, train_step

Golden = Callable[[str], dict[str, np.ndarray]]


def test_three_steps_match_golden(golden: Golden) -> None:
    data = golden("step")
    objective = build_golden(data)
    batch = torch.from_numpy(data["x1"]).double(), torch.from_numpy(data["x2"]).double()
    optimizer = build_adamw(objective.named_parameters(), lr=0.0, weight_decay=float(data["weight_decay"]))
    start = {name: tensor.clone() for name, tensor in objective.state_dict().items()}
    trainable = {our_name(n) for n in data["trainable"].tolist()}
    assert {name for name, p in objective.named_parameters() if p.requires_grad} == trainable

    outputs = []
    hook = objective.register_forward_hook(lambda _, __, output: outputs.append(output))
    for step in range(3):
        loss = train_step(objective, optimizer, batch, lr=float(data["lr"][step]), ema_momentum=float(data["m"][step]))
        assert abs(loss.item() - data["loss"][step]) <= 1e-12
        if step == 0:
            check_first_step(objective, outputs[0], data)
    hook.remove()

    state = objective.state_dict()
    for name in (k for k in data if k.startswith("final/param/")):
        assert np.abs(state[our_name(name[12:])].numpy() - data[name]).max() <= 1e-7, name
    for name, total, squares, moved in zip(
        data["final/names"], data["final/sum"], data["final/sqsum"], data["final/delta_l2"], strict=True
    ):
        ours, before = state[our_name(str(name))].double(), start[our_name(str(name))].double()
        assert ours.sum().item() == pytest.approx(total, rel=1e-9, abs=1e-9), name
        assert ours.square().sum().item() == pytest.approx(squares, rel=1e-9, abs=1e-12), name
        assert (ours - before).norm().item() == pytest.approx(moved, rel=1e-9, abs=1e-9), name


def check_first_step(objective: MoCoV3, output: Output, data: dict[str, np.ndarray]) -> None:
    """Queries, keys, gradients, buffers and parameters after the first step."""
    rows = dict(zip(("q1", "q2", "k1", "k2"), (*output.watch["queries"], *output.watch["keys"]), strict=True))
    for name in rows:
        golden_rows = data[f"step0/{name}"]
        assert np.abs(rows[name].numpy() - golden_rows).max() <= 1e-6 * np.abs(golden_rows).max()
    parameters, state = dict(objective.named_parameters()), objective.state_dict()
    gradients = [k for k in data if k.startswith("step0/grad/")]
    assert len(gradients) == sum(p.requires_grad for p in parameters.values())
    for name in gradients:  # stored in float32: half a unit in the last place is 6e-8 of the value
        error = np.abs(parameters[our_name(name[11:])].grad.numpy() - data[name]).max()
        assert error <= 1e-7 * max(1.0, np.abs(data[name]).max()), name
    for name in (k for k in data if k.startswith("step0/buf/")):
        assert np.abs(state[our_name(name[10:])].numpy() - data[name]).max() <= 1e-6, name
    for name in (k for k in data if k.startswith("step0/param/")):
        assert np.abs(state[our_name(name[12:])].numpy() - data[name]).max() <= 1e-7, name


def trace_pool(data: dict[str, np.ndarray]) -> np.ndarray:
    """The images of the golden run."""
    pool, side = int(data["pool"]), int(data["cfg"][0])
    return np.random.Generator(np.random.Philox(key=[int(data["seed"]), 0])).standard_normal((pool, 3, side, side))


def trace_views(data: dict[str, np.ndarray], pool: np.ndarray, step: int) -> tuple[np.ndarray, np.ndarray]:
    """The pair of views of a step, as the golden run drew it."""
    draw = np.random.Generator(np.random.Philox(key=[int(data["seed"]), 1 + step]))
    chosen = pool[draw.permutation(len(pool))[: int(data["batch"])]]
    view1 = chosen + 0.5 * draw.standard_normal(chosen.shape)
    return view1, chosen + 0.5 * draw.standard_normal(chosen.shape)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "key", "tolerance"), [(torch.float64, "loss", 1e-10), (torch.float32, "loss_fp32", 2e-5)]
)
def test_200_steps_match_golden(golden: Golden, dtype: torch.dtype, key: str, tolerance: float) -> None:
    data = golden("trace")
    pool = trace_pool(data)
    view1, view2 = trace_views(data, pool, 3)
    assert [view1.sum(), view2.sum(), view1[1, 2, 3, 4], view2[5, 0, 1, 2]] == pytest.approx(
        data["view_check"].tolist()
    )
    objective = build_golden(data).to(dtype)
    optimizer = build_adamw(objective.named_parameters(), lr=0.0, weight_decay=float(data["weight_decay"]))
    epochs, per_epoch = int(data["epochs"]), int(data["iters_per_epoch"])
    peak, warmup = float(data["base_lr"]) * int(data["batch"]) / 256, int(data["warmup_epochs"])
    for step in range(200):
        lr = learning_rate(step, peak=peak, epochs=epochs, warmup_epochs=warmup, steps_per_epoch=per_epoch)
        m = ema_momentum(step, start=float(data["m0"]), epochs=epochs, steps_per_epoch=per_epoch)
        assert (lr, m) == pytest.approx((data["lr"][step], data["m"][step]), rel=1e-12)
        view1, view2 = (torch.from_numpy(view).to(dtype) for view in trace_views(data, pool, step))
        loss = train_step(objective, optimizer, (view1, view2), lr=lr, ema_momentum=m)
        assert abs(loss.item() - data[key][step]) <= tolerance, step
    if dtype == torch.float64:
        state = objective.state_dict()
        for name, squares in zip(data["final/names"], data["final/sqsum"], strict=True):
            assert state[our_name(str(name))].square().sum().item() == pytest.approx(squares, rel=1e-7, abs=1e-10), name


@pytest.mark.parametrize("mutant", ["average after the optimizer", "both views in one batch norm"])
def test_golden_loss_catches_mutants(golden: Golden, mutant: str) -> None:
    data = golden("step")
    objective = build_golden(data)
    batch = torch.from_numpy(data["x1"]).double(), torch.from_numpy(data["x2"]).double()
    optimizer = build_adamw(objective.named_parameters(), lr=0.0, weight_decay=0.1)
    if mutant == "both views in one batch norm":
        encoder = objective.encoder
        head, stacked = encoder.head, encoder.head(encoder(torch.cat(batch))).chunk(2)
        encoder.head = nn.Module()
        encoder.head.forward = lambda features: torch.stack(stacked)  # type: ignore[method-assign]
        worst = abs(objective(*batch).loss.item() - data["loss"][0])
        encoder.head = head
    else:
        worst = 0.0
        for step in range(3):
            optimizer.param_groups[0]["lr"] = float(data["lr"][step])
            loss = objective(*batch).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            objective.update_momentum_encoder(float(data["m"][step]))
            worst = max(worst, abs(loss.item() - data["loss"][step]))
    assert worst > 1e-3
