"""MoCo v1 and v2 against golden numbers: loss, queue, three steps with shuffled images and batch norms
of groups.

Two ranks: tests/distributed/test_siblings_ranks.py.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm

from fastmoco.config import Config
from fastmoco.config.serial import from_json, may_change, to_json
from fastmoco.distributed import BatchNorm, World, local_statistics, parallelize
from fastmoco.distributed.shuffle import Shuffle
from fastmoco.models.encoder import Coupling, Parts
from fastmoco.models.resnet import ResNet
from fastmoco.objectives.build import build_objective
from fastmoco.objectives.interface import Progress
from fastmoco.objectives.moco import MoCo
from fastmoco.optim.averaged import AveragedSGD
from fastmoco.optim.sgd import build_sgd
from fastmoco.recipes import EXPECTED, get_recipe
from fastmoco.recipes.moco import MoCoConfig, moco_digits
from fastmoco.training.load_run import load_run
from fastmoco_pipelines.spec import Resume
from tests.command_line import main
from tests.fastmoco.objectives.test_conformance import RESNET, config_of, rough, views_of
from tests.golden_objective import ConvTrunk, error, read_sibling

CPU = torch.device("cpu")
Data = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def data() -> Data:
    return read()


def read() -> Data:
    return read_sibling("moco")


class Rows(nn.Module):
    """An encoder whose images are the raw queries and keys of a golden file."""

    coupling = Coupling.NONE
    coupling_reason = ""
    embed_dim = 1

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.head: nn.Module = nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        return images * self.scale

    plain = forward

    def parts(self) -> Parts:
        return Parts(heads={"head": self.head})


def of_rows(queue: np.ndarray, temperature: float, pointer: int = 0) -> MoCo:
    """The objective of raw rows with a golden queue [D, K]."""
    width, length = queue.shape
    objective = MoCo(Rows, projection_dim=width, temperature=temperature, queue=length).double()
    for encoder in (objective.encoder, objective.momentum_encoder):
        encoder.head = nn.Identity()
    objective.queue.copy_(torch.from_numpy(queue.T.copy()))
    objective.queue_ptr.fill_(pointer)
    return objective


def compared(
    objective: MoCo, q: np.ndarray, k: np.ndarray, forward: Callable[..., Any] | None = None
) -> tuple[Tensor, Tensor]:
    """The loss of raw rows and its gradient, and the step's end."""
    rows, keys = (torch.from_numpy(x).double() for x in (q, k))
    rows.requires_grad_()
    keys.requires_grad_()
    output = (forward or objective)(rows, keys, accuracy=True)
    output.loss.backward()
    assert rows.grad is not None
    assert keys.grad is None
    objective.after_step(torch.zeros(()), Progress())
    return output.loss.detach(), rows.grad


def run_queue(data: Data, prefix: str, world: World) -> dict[str, Any]:
    """All steps of `ev` or `mr` on this rank's rows."""
    pointer = int(data[f"{prefix}_cfg"][-1])
    objective = of_rows(data[f"{prefix}_queue0"], float(data["ev_T"]), pointer)
    found: dict[str, Any] = {"losses": [], "gradients": [], "queues": [], "pointers": []}
    for q, k in zip(data[f"{prefix}_q"], data[f"{prefix}_k"], strict=True):
        rows = (q, k) if prefix == "ev" else (q[world.rank], k[world.rank])
        loss, gradient = compared(objective, *rows)
        found["losses"].append(loss)
        found["gradients"].append(gradient)
        found["queues"].append(objective.queue.T.clone())
        found["pointers"].append(objective.queue_ptr.item())
    return {name: x if name == "pointers" else torch.stack(x) for name, x in found.items()}


def check_queue(cases: list[dict[str, Any]], data: Data, prefix: str) -> None:
    """Losses, gradients and queues of all ranks."""
    for rank, found in enumerate(cases):
        own = (lambda x: x) if prefix == "ev" else (lambda x, r=rank: x[:, r])
        assert error(found["losses"], own(data[f"{prefix}_loss"])) <= 1e-7
        assert error(found["gradients"], own(data[f"{prefix}_dq"])) <= 1e-7
        assert error(found["queues"], data[f"{prefix}_queue"]) <= 1e-7
        assert found["pointers"] == data[f"{prefix}_ptr"].tolist()


def our_name(golden_name: str) -> str:
    side, _, rest = golden_name.partition(".")
    network = {"encoder_q": "encoder", "encoder_k": "momentum_encoder"}[side]
    return f"{network}.{rest.replace('fc.', 'head.')}"


def golden_objective(data: Data, groups: int) -> MoCo:
    """The objective of `tr/`, at its start."""
    _, _, _, width1, width2, dim, length, pointer = data["tr/cfg"].tolist()
    objective = MoCo(
        partial(ConvTrunk, width1, width2),
        projection_dim=dim,
        hidden_dim=width2,
        temperature=float(data["T" if "T" in data else "tr/T"]),
        ema_momentum=float(data["tr/m"]),
        queue=length,
        batch_norm_groups=groups,
    ).double()
    weights = {
        our_name(name[8:]): torch.from_numpy(value)
        for name, value in data.items()
        if name.startswith("tr/init/encoder")
    }
    weights["queue"] = torch.from_numpy(data["tr/init/queue"].T.copy())
    weights["queue_ptr"] = torch.from_numpy(data["tr/init/queue_ptr"])
    missing, unexpected = objective.load_state_dict(weights, strict=False)
    assert (missing, unexpected) == (["queue_keys"], [])
    assert pointer == objective.queue_ptr.item()
    order = data["tr/perm"]
    objective.permutation = lambda _images, at: order[at.step]  # type: ignore[method-assign]
    return objective


def run(data: Data, world: World, groups: int = 0) -> dict[str, Any]:
    """The three steps of `tr/` on this rank's part of each batch."""
    objective = golden_objective(data, groups or int(data["tr/cfg"][0]))
    sgd = build_sgd(
        objective.named_parameters(),
        lr=0.0,
        weight_decay=float(data["tr/wd"]),
        sgd_momentum=float(data["tr/mu"]),
    )
    optimizer = AveragedSGD(sgd, objective.averages())
    forward = parallelize(objective, world)
    found: dict[str, Any] = {"losses": [], "gradients": [], "states": [], "queues": []}

    # The encoders of the file start apart, so the first step averages too. In a run they are equal.
    objective.update_momentum_encoder(float(data["tr/m"]))
    found["pointers"] = []
    for step in range(3):
        at = Progress(step, 3, 1)
        every = (torch.from_numpy(data[f"tr/{name}"][step]).double() for name in ("xq", "xk"))
        views = [view.flatten(0, 1).chunk(world.world_size)[world.rank] for view in every]
        objective.zero_grad(set_to_none=True)
        objective.before_step(at)
        loss = forward(*views, at=at).loss
        loss.backward()
        optimizer.param_groups[0]["lr"] = float(data["tr/lr"][step])
        named = objective.named_parameters()
        found["gradients"].append({n: p.grad.clone() for n, p in named if p.grad is not None})
        optimizer.step(ema_momentum=objective.ema_momentum(at))
        objective.after_step(torch.zeros(()), at)
        found["losses"].append(loss.detach())
        found["states"].append({n: t.detach().clone() for n, t in objective.state_dict().items()})
        found["queues"].append(objective.queue.T.clone())
        found["pointers"].append(objective.queue_ptr.item())
    return found


def check_trace(cases: list[dict[str, Any]], data: Data) -> None:
    """All that the file holds of the steps: on as many ranks as it has, or on one."""
    losses = np.stack([torch.stack(case["losses"]).numpy() for case in cases], axis=1)
    expected = data["tr/loss"] if len(cases) > 1 else data["tr/loss"].mean(1, keepdims=True)
    assert error(torch.from_numpy(losses), expected) <= 1e-9
    for rank, found in enumerate(cases):
        assert error(torch.stack(found["queues"]), data["tr/queue"]) <= 1e-7
        assert found["pointers"] == data["tr/ptr"].tolist()
        names = [name for name in data if name.startswith("tr/step0/grad/")]
        assert len(names) == len(found["gradients"][0])
        for name in names:
            assert error(found["gradients"][0][our_name(name[14:])], data[name]) <= 1e-7, name

        # The file has the momentum encoder before a step's keys; ours has moved for the next step.
        for step, place in enumerate(("step0", "step1", "final")):
            start = f"tr/{place}/param/"
            for name in (name for name in data if name.startswith(start)):
                key = name[len(start) :]
                last = key.startswith("encoder_k") and step < 2
                if not last:
                    state = found["states"][step]
                    assert error(state[our_name(key)], data[name]) <= 1e-7, name
        buffers = [name for name in data if name.startswith("tr/final/buf/")]
        assert len(buffers) == 12
        for name in buffers if len(cases) > 1 else ():
            ours = found["states"][-1][our_name(name[13:])]
            assert error(ours, data[name][rank]) <= 1e-7, name


def test_loss_gradient_and_queue_match_golden(data: Data) -> None:
    for i in range(int(data["num_cases"])):
        objective = of_rows(data[f"c{i}_queue"], float(data[f"c{i}_T"]))
        pushed = torch.from_numpy(data[f"c{i}_queue_after"].T)
        loss, gradient = compared(objective, data[f"c{i}_q"], data[f"c{i}_k"])
        assert error(loss, data[f"c{i}_loss"]) <= 1e-12
        assert error(gradient, data[f"c{i}_dq"]) <= 1e-12
        assert error(objective.queue, pushed.numpy()) <= 1e-12


def test_a_queue_shorter_than_a_batch_is_refused() -> None:
    objective = of_rows(np.eye(3), 0.2)
    with pytest.raises(ValueError, match="queue=3: must have room for the 4 keys"):
        compared(objective, np.ones((4, 3)), np.ones((4, 3)))


def test_a_queue_that_wraps_around_matches_golden(data: Data) -> None:
    check_queue([run_queue(data, "ev", World())], data, "ev")


def test_one_process_with_groups_is_the_golden_ranks(data: Data) -> None:
    """As many groups as the file has ranks: the same losses, gradients, weights and queue."""
    check_trace([run(data, World())], data)
    # Of one group the images know each other: another loss.
    alone = run(data, World(), groups=1)
    assert error(torch.stack(alone["losses"]), data["tr/loss"].mean(1)) > 1e-2


def test_skipped_steps_write_nothing_and_pushed_keys_are_of_one_step() -> None:
    torch.manual_seed(0)
    queue = torch.nn.functional.normalize(torch.randn(4, 12), dim=0).numpy()
    objective = of_rows(queue, 0.2, pointer=8)
    before = {name: tensor.clone() for name, tensor in objective.state_dict().items()}
    q, k = torch.randn(2, 4, 4, dtype=torch.float64).unbind()
    objective(q, torch.full_like(k, torch.nan))
    objective.after_step(torch.ones(()), Progress())
    assert all(torch.equal(t, before[n]) for n, t in objective.state_dict().items())

    # A forward that no step ends leaves no keys for the next one.
    objective(q, 2 * q)
    assert objective(q, k).watch["queue_fill"] == 0
    objective.after_step(None, Progress())
    assert torch.equal(objective.queue[8:], torch.nn.functional.normalize(k, dim=1))
    assert (objective.queue_ptr.item(), objective.queue_keys.item()) == (0, 4)
    objective.after_step(None, Progress())
    assert objective.queue_ptr.item() == 0


def test_the_queue_stays_wide_and_starts_from_the_seed() -> None:
    config = config_of(MoCoConfig)
    objective = build_objective(replace(config, precision="fp32"), CPU)
    again = build_objective(replace(config, precision="fp32"), CPU)
    other = build_objective(replace(config, precision="fp32", seed=1), CPU)
    assert isinstance(objective, MoCo)
    before = objective.queue.clone()
    assert torch.equal(before, again.queue)
    assert not torch.equal(before, other.queue)
    assert (before.norm(dim=1) - 1).abs().max() <= 1e-6
    objective.bfloat16()
    assert torch.equal(objective.queue, before)
    assert objective.encoder.cls_token.dtype == torch.bfloat16
    assert objective.double().queue.dtype == torch.float64
    assert len(objective.permutation(9, Progress())) == 9
    orders = [o.permutation(64, Progress(s)) for o in (again, other) for s in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4
    assert orders[0].tolist() == again.permutation(64, Progress(0, 99, 3)).tolist()


def test_batch_norms_of_groups_and_of_recomputed_blocks() -> None:
    """Each group by torch's own batch norm; a block that is computed again has the same groups."""
    torch.manual_seed(0)
    norm, x = BatchNorm(5).double(), torch.randn(7, 5, 3, 3, dtype=torch.float64)
    plain = copy.deepcopy(norm)
    with local_statistics(3):
        ours = norm(x)
    parts = x.split([3, 2, 2])
    expected = [batch_norm(p, None, None, norm.weight, norm.bias, training=True) for p in parts]
    assert torch.allclose(ours, torch.cat(expected), atol=1e-12)
    statistics = [(p.mean((0, 2, 3)), p.transpose(0, 1).flatten(1).var(1)) for p in parts]
    mean, var = (torch.stack(kind).mean(0) for kind in zip(*statistics, strict=True))
    assert torch.allclose(norm.running_mean, 0.1 * mean, atol=1e-12)
    assert torch.allclose(norm.running_var, 0.9 + 0.1 * var, atol=1e-12)
    assert not torch.allclose(plain(x), ours, atol=1e-3)

    # V batches are V calls.
    with local_statistics(2):
        rows, single = torch.randn(2, 8, 5, dtype=torch.float64), copy.deepcopy(norm)
        assert torch.equal(norm(rows), torch.stack([single(batch) for batch in rows]))
        assert torch.equal(norm.running_var, single.running_var)
    with pytest.raises(ValueError, match="groups=0"):
        local_statistics(0)

    objective = rough(config_of(MoCoConfig, RESNET))
    again = copy.deepcopy(objective)
    again.encoder.recompute("full")
    for each in (objective, again):
        each(*views_of(RESNET, 12)).loss.backward()
    for (name, own), other in zip(objective.named_parameters(), again.parameters(), strict=True):
        assert own.grad is None or torch.allclose(own.grad, other.grad, atol=1e-12), name
    for own_buffer, other_buffer in zip(objective.buffers(), again.buffers(), strict=True):
        assert torch.equal(own_buffer, other_buffer)


def test_a_shuffle_on_one_rank_and_a_wrong_order() -> None:
    rows = torch.arange(12).view(6, 2)
    order = np.array([3, 0, 5, 1, 2, 4])
    shuffle = Shuffle(order, CPU)
    assert torch.equal(shuffle.there(rows), rows[torch.from_numpy(order)])
    assert torch.equal(shuffle.back(shuffle.there(rows)), rows)
    with pytest.raises(ValueError, match="must be a permutation"):
        Shuffle(np.array([0, 0, 1]), CPU)


def test_only_a_trunk_with_batch_norms_has_groups() -> None:
    vit, resnet = rough(config_of(MoCoConfig)), rough(config_of(MoCoConfig, RESNET))
    assert (vit.coupling, vit.per_rank) == (Coupling.NONE, frozenset())
    assert resnet.coupling is Coupling.TRUNK
    averages = {n for n, _ in resnet.named_buffers() if n.endswith(("mean", "var"))}
    assert resnet.per_rank == averages
    assert len(averages) == 2 * 2 * 12


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"queue": 40}, r"objective.queue=40: must be a multiple of global_batch_size=16.*take 32"),
        ({"batch_norm_groups": 3}, r"batch_norm_groups=3: 3 equal groups .*global_batch_size=16"),
        ({"batch_norm_groups": 16}, r"groups=16: each of 16 groups needs 2 images of .*; take 8"),
        ({"queue": 2**46}, r"do not fit into the memory \(tried to allocate"),
    ],
)
def test_numbers_that_do_not_fit_the_batch_are_refused(
    change: dict[str, Any], message: str
) -> None:
    config = config_of(MoCoConfig, RESNET)
    with pytest.raises(ValueError, match=message):
        build_objective(replace(config, objective=replace(config.objective, **change)), CPU)


def test_recipes_carry_the_numbers_and_travel_through_json() -> None:
    v1, v2, long = (
        get_recipe(f"moco_{name}_b256") for name in ("v1_r50_e200", "v2_r50_e200", "v2_r50_e800")
    )
    assert v1.objective == MoCoConfig(head="linear", temperature=0.07)
    assert v2.objective == long.objective == MoCoConfig()
    assert (v2.objective.queue, v2.objective.ema_momentum) == (65536, 0.999)
    assert (long.epochs, v1.optim.milestones) == (800, (120.0, 160.0))
    for config, linear in ((v1, 60.6), (v2, 67.5), (long, 71.1)):
        optim, model = config.optim, config.model
        assert (optim.name, config.peak_lr, optim.weight_decay) == ("sgd", 0.03, 1e-4)
        assert (optim.sgd_momentum, optim.warmup_epochs) == (0.9, 0)
        assert (model.projection_dim, model.hidden_dim, model.zero_residual) == (128, 2048, False)
        assert config.data.view1 == config.data.view2
        assert config.data.view1.crop_scale == (0.2, 1.0)
        assert EXPECTED[config.recipe].linear == linear
        assert from_json(json.loads(json.dumps(to_json(config)))) == config
    view1, view2 = v1.data.view1, v2.data.view1
    assert (view1.jitter_probability, view1.hue, view1.blur_probability) == (1.0, 0.4, 0.0)
    assert (view2.jitter_probability, view2.hue, view2.blur_probability) == (0.8, 0.1, 0.5)
    allowed = {
        name: may_change(v2, f"objective.{name}", Resume.WITH_ALLOW)
        for name in ("temperature", "ema_momentum", "queue", "batch_norm_groups")
    }
    assert allowed == {
        "temperature": True,
        "ema_momentum": True,
        "queue": False,
        "batch_norm_groups": False,
    }
    for change in ({"queue": 0}, {"head": "deep"}, {"batch_norm_groups": -1}, {"temperature": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(change))}="):
            MoCoConfig(**change)  # type: ignore[arg-type]


def test_heads_and_the_start_of_residual_branches() -> None:
    for head, kinds in (("linear", [nn.Linear]), ("mlp", [nn.Linear, nn.ReLU, nn.Linear])):
        config = config_of(MoCoConfig, RESNET)
        config = replace(
            config,
            model=replace(config.model, zero_residual=False),
            objective=replace(config.objective, head=head),  # type: ignore[arg-type]
        )
        encoder = build_objective(config, CPU).encoder
        assert isinstance(encoder, ResNet)
        assert [type(layer) for layer in encoder.head] == kinds
        assert all(layer.bias is not None for layer in encoder.head if hasattr(layer, "bias"))
        assert {block.last_norm.weight.min().item() for block in encoder._blocks()} == {1.0}
    zero = build_objective(config_of(MoCoConfig, RESNET), CPU).encoder
    assert {block.last_norm.weight.abs().max().item() for block in zero._blocks()} == {0.0}
    with pytest.raises(ValueError, match="zero_residual=False: has no effect on a ViT"):
        replace(Config().model, zero_residual=False)


def test_the_command_line_trains_and_logs_the_fill_of_the_queue(
    digits: tuple[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    words = ["train", "moco_digits", "--out", str(out), "--data.shards", digits[0]]
    words += ["--objective.queue", "512", "--epochs", "1", "--threads", "1"]
    words += ["--optim.warmup-epochs", "0", "--knn.every-epochs", "0", "--log-every-steps", "1"]
    assert main(words) == 0
    objective, config, _ = load_run(out)
    assert isinstance(objective, MoCo)
    assert config.objective == replace(moco_digits().objective, queue=512)
    steps = objective.queue_ptr.item() // 256
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    fills = [line["queue_fill"] for line in lines if "queue_fill" in line]
    assert fills[:3] == [0.0, 0.5, 1.0]
    assert len(fills) % 2 == steps
