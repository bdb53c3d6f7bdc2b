"""MoCo v3 against golden numbers: three steps in full, two hundred by their losses."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

from fastmoco.objectives import MoCoV3, Output
from fastmoco.optim import build_adamw, build_lars, ema_momentum, learning_rate
from tests.golden_objective import ConvTrunk, build_golden, our_name, train_step

Golden = Callable[[str], dict[str, np.ndarray]]


class Bounds(NamedTuple):
    """Largest errors allowed, each about ten times what is reached; other CPUs sum in other orders.

    Where the numbers of a tensor exceed 1, they are relative to the largest of them.
    """

    loss: float
    rows: float
    """Queries and keys, relative to their largest number."""
    gradients: float
    """Beyond the rounding to float32 in which the file has them."""
    buffers: float
    parameters: float
    """After the first step."""
    final: float
    """After the third step."""
    summaries: float
    """Sum, sum of squares and way moved of every tensor after the third step."""
    noise: float | None
    """The same of tensors whose true gradient is zero, in part or whole; None: not compared."""


BOUNDS = {
    torch.float64: Bounds(2e-14, 1e-13, 1e-13, 1e-14, 1e-14, 2e-14, 3e-14, 2e-9),
    torch.float32: Bounds(5e-6, 3e-5, 4e-5, 2e-6, 1e-6, 3e-6, 1e-5, None),
}
NOISE = ("encoder.norm.bias", "attn.qkv.bias", "encoder.head.1.running_mean")
"""Batch norm takes `norm.bias` out again, the softmax the biases of keys: AdamW makes steps of the
rounding errors there. The first running mean of the projector sees the former."""


@pytest.mark.parametrize("dtype", BOUNDS)
def test_three_steps_match_golden(golden: Golden, dtype: torch.dtype) -> None:
    data, bounds = golden("step"), BOUNDS[dtype]
    objective = build_golden(data).to(dtype)
    weight_decay = float(data["weight_decay"])
    optimizer = build_adamw(objective.named_parameters(), lr=0.0, weight_decay=weight_decay)
    check_three_steps(objective, optimizer, data, bounds)


def check_three_steps(
    objective: MoCoV3,
    optimizer: torch.optim.Optimizer,
    data: dict[str, np.ndarray],
    bounds: Bounds,
) -> None:
    """Everything that a file holds of three steps, from its start."""
    dtype = next(objective.parameters()).dtype
    batch = torch.from_numpy(data["x1"]).to(dtype), torch.from_numpy(data["x2"]).to(dtype)
    start = {name: tensor.clone() for name, tensor in objective.state_dict().items()}
    trainable = {our_name(n) for n in data["trainable"].tolist()}
    assert {name for name, p in objective.named_parameters() if p.requires_grad} == trainable

    outputs = []
    hook = objective.register_forward_hook(lambda _, __, output: outputs.append(output))
    for step in range(3):
        lr, momentum = float(data["lr"][step]), float(data["m"][step])
        loss = train_step(objective, optimizer, batch, lr=lr, ema_momentum=momentum)
        assert loss.dtype == dtype
        assert abs(loss.item() - data["loss"][step]) <= bounds.loss, step
        if step == 0:
            check_first_step(objective, outputs[0], data, bounds)
    hook.remove()

    state = objective.state_dict()
    for name in (k for k in data if k.startswith("final/param/")):
        assert error(state[our_name(name[12:])], data[name]) <= bounds.final, name

    check_summaries(state, start, data, bounds)


def check_summaries(
    state: dict[str, torch.Tensor],
    start: dict[str, torch.Tensor],
    data: dict[str, np.ndarray],
    bounds: Bounds,
) -> None:
    """Every tensor after the third step, by three numbers."""
    for i, golden_name in enumerate(data["final/names"].tolist()):
        name = our_name(golden_name)
        bound = bounds.noise if name.endswith(NOISE) else bounds.summaries
        if bound is None:
            continue
        now, before = state[name].double(), start[name].double()
        found = {"sum": now.sum(), "sqsum": now.square().sum(), "delta_l2": (now - before).norm()}
        for kind, value in found.items():
            assert error(value, data[f"final/{kind}"][i]) <= bound, (name, kind)


def error(ours: torch.Tensor, expected: np.ndarray) -> float:
    """Largest difference, relative to the largest number where that exceeds 1."""
    difference = np.abs(ours.detach().double().numpy() - expected).max()
    return float(difference / max(1.0, np.abs(expected).max()))


def check_first_step(
    objective: nn.Module, output: Output, data: dict[str, np.ndarray], bounds: Bounds
) -> None:
    """Queries, keys, gradients, buffers and parameters after the first step."""
    found = (*output.watch["queries"], *output.watch["keys"])
    for name, rows in zip(("q1", "q2", "k1", "k2"), found, strict=True):
        expected = data[f"step0/{name}"]
        assert np.abs(rows.numpy() - expected).max() <= bounds.rows * np.abs(expected).max()

    parameters, state = dict(objective.named_parameters()), objective.state_dict()
    gradients = [k for k in data if k.startswith("step0/grad/")]
    assert len(gradients) == sum(p.requires_grad for p in parameters.values())
    for name in gradients:
        expected = data[name].astype(np.float64)
        rounding = 2.0**-24 * np.abs(expected)  # half a unit in the last place of a float32
        allowed = rounding + bounds.gradients * max(1.0, np.abs(expected).max())
        found = parameters[our_name(name[11:])].grad.double().numpy()
        assert (np.abs(found - expected) <= allowed).all(), name

    buffers = [k for k in data if k.startswith("step0/buf/")]
    assert len(buffers) == sum("pos_embed" not in n for n, _ in objective.named_buffers())
    for name in buffers:
        assert error(state[our_name(name[10:])], data[name]) <= bounds.buffers, name
    for name in (k for k in data if k.startswith("step0/param/")):
        assert error(state[our_name(name[12:])], data[name]) <= bounds.parameters, name


RESNET_BOUNDS = {
    torch.float64: Bounds(3e-14, 3e-14, 1e-13, 1e-14, 1e-14, 3e-14, 3e-14, None),
    torch.float32: Bounds(1e-5, 1e-5, 4e-5, 2e-6, 2e-6, 2e-5, 2e-5, None),
}


@pytest.mark.parametrize("dtype", RESNET_BOUNDS)
def test_three_steps_of_a_resnet_with_lars_match_golden(golden: Golden, dtype: torch.dtype) -> None:
    """The heads and the wiring of a ResNet: no frozen part, each view by itself, temperature 1."""
    data, bounds = golden("step_resnet"), RESNET_BOUNDS[dtype]
    _, first, second, hidden_dim, projection_dim = data["cfg"].tolist()
    objective = MoCoV3(
        partial(ConvTrunk, first, second),
        projection_dim=projection_dim,
        hidden_dim=hidden_dim,
        temperature=float(data["T"]),
    ).to(dtype)
    objective.load_state_dict(
        {our_name(k[5:]): torch.from_numpy(v) for k, v in data.items() if k.startswith("init/")}
    )
    decay = float(data["weight_decay"])
    optimizer = build_lars(objective.named_parameters(), lr=0.0, weight_decay=decay)
    check_three_steps(objective, optimizer, data, bounds)


def trace_pool(data: dict[str, np.ndarray]) -> np.ndarray:
    """The images of the golden run."""
    pool, side = int(data["pool"]), int(data["cfg"][0])
    return np.random.Generator(np.random.Philox(key=[int(data["seed"]), 0])).standard_normal(
        (pool, 3, side, side)
    )


def trace_views(
    data: dict[str, np.ndarray], pool: np.ndarray, step: int
) -> tuple[np.ndarray, np.ndarray]:
    """The pair of views of a step, as the golden run drew it."""
    draw = np.random.Generator(np.random.Philox(key=[int(data["seed"]), 1 + step]))
    chosen = pool[draw.permutation(len(pool))[: int(data["batch"])]]
    view1 = chosen + 0.5 * draw.standard_normal(chosen.shape)
    return view1, chosen + 0.5 * draw.standard_normal(chosen.shape)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "key", "tolerance"),
    [(torch.float64, "loss", 2e-14), (torch.float32, "loss_fp32", 1e-6)],
)
def test_200_steps_match_golden(
    golden: Golden, dtype: torch.dtype, key: str, tolerance: float
) -> None:
    data = golden("trace")
    pool = trace_pool(data)
    view1, view2 = trace_views(data, pool, 3)
    assert [view1.sum(), view2.sum(), view1[1, 2, 3, 4], view2[5, 0, 1, 2]] == pytest.approx(
        data["view_check"].tolist()
    )
    objective = build_golden(data).to(dtype)
    optimizer = build_adamw(
        objective.named_parameters(), lr=0.0, weight_decay=float(data["weight_decay"])
    )
    epochs, per_epoch = int(data["epochs"]), int(data["iters_per_epoch"])
    peak, warmup = float(data["base_lr"]) * int(data["batch"]) / 256, int(data["warmup_epochs"])
    for step in range(200):
        lr = learning_rate(
            step, peak=peak, epochs=epochs, warmup_epochs=warmup, steps_per_epoch=per_epoch
        )
        m = ema_momentum(step, start=float(data["m0"]), epochs=epochs, steps_per_epoch=per_epoch)
        assert (lr, m) == pytest.approx((data["lr"][step], data["m"][step]), rel=1e-12)
        view1, view2 = (torch.from_numpy(view).to(dtype) for view in trace_views(data, pool, step))
        loss = train_step(objective, optimizer, (view1, view2), lr=lr, ema_momentum=m)
        # The first losses are near 3, where float32 has steps of 2.4e-7.
        assert abs(loss.item() - data[key][step]) <= tolerance * max(1.0, data[key][step]), step
    if dtype == torch.float64:
        state = objective.state_dict()
        for name, squares in zip(data["final/names"], data["final/sqsum"], strict=True):
            assert state[our_name(str(name))].square().sum().item() == pytest.approx(
                squares, rel=1e-10, abs=1e-10
            ), name


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
