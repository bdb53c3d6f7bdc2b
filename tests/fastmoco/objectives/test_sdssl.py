"""SDSSL against golden numbers: losses and gradients of the terms on each method, the schedule of
their weight; and what the conformance suite does not reach: BYOL, SimCLR, and taps of a ViT.

Two ranks: tests/distributed/test_siblings_ranks.py.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastmoco.config import Config
from fastmoco.config.serial import from_json, to_json
from fastmoco.distributed import World
from fastmoco.distributed.gather import gather_keys
from fastmoco.models import VisionTransformer
from fastmoco.models.blocks import Block
from fastmoco.models.compiled import compile_blocks, traced_blocks
from fastmoco.models.heads import FORMS, HeadStack
from fastmoco.objectives.build import build_objective
from fastmoco.objectives.interface import START, Progress
from fastmoco.objectives.reference import plain_forward
from fastmoco.objectives.sdssl import (
    SDBYOL,
    SDSSL,
    SDMoCoV3,
    loss_ratio,
)
from fastmoco.objectives.sdssl_terms import (
    Terms,
    info_nce_terms,
    info_nce_terms_reference,
    nt_xent_terms,
    nt_xent_terms_reference,
    regression_terms,
)
from fastmoco.optim.build import build_optimizer
from fastmoco.planning.costs import part_flops
from fastmoco.recipes import EXPECTED, get_recipe
from fastmoco.recipes.sdssl import SDSSLConfig
from fastmoco_pipelines.loading.step_parts import QUERY_FORWARD
from tests.distributed.run_trainer import CONFIG
from tests.fastmoco.objectives import test_conformance as conformance
from tests.golden_objective import error, read_sibling

BLOCKS = 12
DATA = read_sibling("sdssl")
RATIO, T = float(DATA["ratio"]), float(DATA["T"])


def rows_of(name: str, dtype: torch.dtype = torch.float64) -> Tensor:
    """[2, 12, B, D] predictions of a file's two directions, as a leaf."""
    both = np.stack([DATA[f"{name}1"], DATA[f"{name}2"]], axis=-3)
    rows = torch.from_numpy(both).to(dtype)
    return rows.unflatten(-2, (BLOCKS, -1))


def flat(gradient: Tensor | None) -> Tensor:
    """The gradient of [2, 12, B, D] rows as the file has it."""
    assert gradient is not None
    return gradient.flatten(1, 2)


def moco(
    prefix: str, rank: int | None = None, terms_of: Any = info_nce_terms, dtype: Any = torch.float64
) -> dict[str, Any]:
    """Terms, loss and gradients of this rank's part of the rows."""
    part = slice(None) if rank is None else rank
    p, pd = (
        rows_of(f"{prefix}/{name}", dtype)[part].clone().requires_grad_() for name in ("p", "pd")
    )
    targets = [torch.from_numpy(DATA[f"{prefix}/{t}"]).to(dtype)[part] for t in ("t1", "t2")]
    keys = torch.stack([gather_keys(rows) for rows in targets])
    terms = terms_of(p, pd, keys, temperature=T, accuracy=True)
    loss = terms.loss(RATIO, BLOCKS)
    loss.backward()
    return {"terms": [term.detach() for term in terms], "loss": loss.detach()} | {
        f"d{name}{i + 1}": flat(rows.grad)[i]
        for name, rows in (("p", p), ("pd", pd))
        for i in (0, 1)
    }


def run_moco(world: World) -> dict[str, Any]:
    """Of one rank of two."""
    return moco("moco_mr", world.rank)


def check_moco(ranks: list[dict[str, Any]], prefix: str = "moco_mr") -> None:
    """All arrays of the file, by rank where there are several."""
    for rank, found in enumerate(ranks):
        part: Any = ... if prefix == "moco_w1" else rank
        names = ("loss_output", "loss_mid", "loss_detached")
        for name, term in zip(names, found["terms"], strict=False):
            assert error(term, DATA[f"{prefix}/{name}"][part]) <= 1e-9, name
        for name in ("loss", "dp1", "dp2", "dpd1", "dpd2"):
            assert error(found[name], DATA[f"{prefix}/{name}"][part]) <= 1e-7, name


def simclr(
    z: np.ndarray,
    *,
    local_gradient: bool,
    terms_of: Any = nt_xent_terms,
    dtype: Any = torch.float64,
) -> dict[str, Any]:
    """Terms, loss and gradient of this rank's rows."""
    rows = torch.from_numpy(z).to(dtype).unflatten(0, (BLOCKS, 2, -1)).requires_grad_()
    terms = terms_of(rows, temperature=T, local_gradient=local_gradient, accuracy=True)
    loss = terms.loss(RATIO, BLOCKS)
    loss.backward()
    assert rows.grad is not None
    return {
        "terms": [terms.output.detach(), terms.intermediate.detach(), terms.hits],
        "loss": loss.detach(),
        "dz": rows.grad.flatten(0, 2),
    }


def run_simclr(world: World, *, local_gradient: bool) -> dict[str, Any]:
    """Of one rank of two, by the fast path and by the reference."""
    z = DATA["simclr_mr/z"][world.rank]
    found = simclr(z, local_gradient=local_gradient)
    plain = simclr(z, local_gradient=local_gradient, terms_of=nt_xent_terms_reference)
    for ours, other in zip(
        (found["dz"], *found["terms"]), (plain["dz"], *plain["terms"]), strict=True
    ):
        assert torch.allclose(ours, other, rtol=1e-10, atol=1e-12)
    return found


def check_simclr(ranks: list[dict[str, Any]], prefix: str = "simclr_mr") -> None:
    """All arrays of the file, by rank where there are several."""
    for rank, found in enumerate(ranks):
        part: Any = ... if prefix == "simclr_w1" else rank
        for name, term in zip(("loss_output", "loss_mid"), found["terms"], strict=False):
            assert error(term, DATA[f"{prefix}/{name}"][part]) <= 1e-9, name
        assert error(found["loss"], DATA[f"{prefix}/loss"][part]) <= 1e-9
        assert error(found["dz"], DATA[f"{prefix}/dz_local"][part]) <= 1e-7


def check_true_gradient(ranks: list[dict[str, Any]]) -> None:
    """That of the sum of both ranks' losses, from all rows in one process; the losses are the
    same, and the gradient of the official code is another."""
    z = np.concatenate(
        [part.reshape(BLOCKS, 2, -1, part.shape[-1]) for part in DATA["simclr_mr/z"]], axis=2
    )
    whole = simclr(z.reshape(-1, z.shape[-1]), local_gradient=False)
    # The mean over twice the rows, of which a sum of two means has twice the gradient.
    expected = 2 * whole["dz"].unflatten(0, (BLOCKS, 2, -1))
    for found, part in zip(ranks, expected.chunk(2, dim=2), strict=True):
        assert torch.allclose(found["dz"], part.flatten(0, 2), rtol=1e-10, atol=1e-12)
    assert error(ranks[0]["dz"], DATA["simclr_mr/dz_local"][0]) > 1e-2
    assert error(torch.stack([r["loss"] for r in ranks]), DATA["simclr_mr/loss"]) <= 1e-9


@pytest.mark.parametrize("terms_of", [info_nce_terms, info_nce_terms_reference])
def test_moco_matches_golden(terms_of: Any) -> None:
    check_moco([moco("moco_w1", terms_of=terms_of)], "moco_w1")


@pytest.mark.parametrize("ratio", [RATIO, 0.0])
def test_byol_matches_golden(ratio: float) -> None:
    """With a ratio, and in the branch that the code takes without one."""
    p, pd = (rows_of(f"byol/{name}").requires_grad_() for name in ("p", "pd"))
    targets = torch.stack([torch.from_numpy(DATA[f"byol/{t}"]).double() for t in ("t1", "t2")])
    loss = regression_terms(p, pd, targets).loss(ratio, BLOCKS, all_at_zero=True)
    loss.backward()
    end = "" if ratio else "_r0"
    assert error(loss.detach(), DATA[f"byol/loss{end}"]) <= 1e-9
    for name, rows in (("dp", p), ("dpd", pd)):
        for i in (0, 1):
            assert error(flat(rows.grad)[i], DATA[f"byol/{name}{i + 1}{end}"]) <= 1e-7


@pytest.mark.parametrize("terms_of", [nt_xent_terms, nt_xent_terms_reference])
def test_simclr_matches_golden(terms_of: Any) -> None:
    for local_gradient in (False, True):
        found = simclr(DATA["simclr_w1/z"], local_gradient=local_gradient, terms_of=terms_of)
        check_simclr([found], "simclr_w1")


def test_float32_is_within_its_gates() -> None:
    of_moco = moco("moco_w1", dtype=torch.float32)
    of_simclr = simclr(DATA["simclr_w1/z"], local_gradient=False, dtype=torch.float32)
    assert error(of_moco["loss"], DATA["moco_w1/loss"]) <= 3 * 3e-7
    assert error(of_simclr["loss"], DATA["simclr_w1/loss"]) <= 3 * 3e-7
    for name in ("dp1", "dp2", "dpd1", "dpd2"):
        assert error(of_moco[name], DATA[f"moco_w1/{name}"]) <= 3 * 5e-7, name
    assert error(of_simclr["dz"], DATA["simclr_w1/dz_local"]) <= 3 * 5e-7


def test_a_large_batch_goes_in_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = simclr(DATA["simclr_w1/z"], local_gradient=False)
    monkeypatch.setattr("fastmoco.objectives.sdssl_terms.TILE_CPU", 40)
    tiled = simclr(DATA["simclr_w1/z"], local_gradient=False)
    assert torch.allclose(tiled["dz"], whole["dz"], rtol=1e-12, atol=1e-14)


def test_the_ratio_rises_by_half_a_cosine() -> None:
    _, end, epochs, steps = DATA["ratio_schedule_cfg"].tolist()
    total = int(epochs * steps)
    ours = [loss_ratio(step, total, end) for step in range(total)]
    assert np.abs(np.array(ours) - DATA["ratio_schedule"]).max() <= 1e-12
    assert ours[0] == 0.0


def config_on(on: Any, **more: Any) -> Config:
    """A tiny run on one of the three methods."""
    return replace(CONFIG, objective=SDSSLConfig(on=on, **more))


@pytest.mark.parametrize("on", ["byol", "simclr"])
def test_the_other_methods_conform(on: Any) -> None:
    """MoCo v3 is what the suite itself tests."""
    config = config_on(on, ratio=0.8)
    conformance.check_reference(config)
    conformance.check_chunks(config)
    conformance.check_features(config)
    conformance.check_names(config, None)
    dropped = replace(config, model=replace(config.model, drop_path=0.5))
    conformance.check_reference(dropped)


def test_the_first_step_on_byol_takes_one_mean_over_all_blocks() -> None:
    objective = conformance.rough(config_on("byol"))
    assert isinstance(objective, SDBYOL)
    views = conformance.views_of(CONFIG)
    output = copy.deepcopy(objective)(*views, at=START)
    plain = plain_forward(objective, *views, at=START)
    last, other, detached = (
        output.watch[f"loss_{n}"] for n in ("output", "intermediate", "detached")
    )
    assert torch.allclose(output.loss, (last + other) / 2 + 2 * detached)
    assert torch.allclose(output.loss, plain.loss, rtol=1e-12)
    assert objective.schedules(START) == {"loss_ratio": 0.0, "ema_momentum": 0.996}


def test_predictors_alone_learn_from_detached_projections() -> None:
    """Without the other terms there is no gradient elsewhere; each predictor normalises four
    batches a step, each projector two."""
    objective = conformance.rough(config_on("moco_v3"))
    assert isinstance(objective, SDMoCoV3)
    counted = [
        int(m.num_batches_tracked) for m in (objective.projectors[1], objective.predictors[1])
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Terms, "loss", lambda terms, *_, **__: terms.detached)
        objective(*conformance.views_of(CONFIG), at=START).loss.backward()
    named = {n: p.grad for n, p in objective.named_parameters() if p.requires_grad}
    learnt = {n for n, g in named.items() if g is not None and g.abs().max() > 0}
    assert {name.partition(".")[0] for name in learnt} == {"predictors"}
    now = [int(m.num_batches_tracked) for m in (objective.projectors[1], objective.predictors[1])]
    assert [b - a for a, b in zip(counted, now, strict=True)] == [2, 4]


VARIANTS: dict[str, dict[str, Any]] = {
    "class": {},
    "mean": {"pooling": "norm_mean"},
    "mean without norm": {"pooling": "mean", "positions": "learned"},
    "batch norm": {"mlp_norm": "batch"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_taps_are_the_features_after_every_block(variant: str) -> None:
    torch.manual_seed(0)
    encoder = VisionTransformer(
        image_size=8, patch_size=4, embed_dim=16, depth=3, num_heads=2, **VARIANTS[variant]
    ).double()
    images, gradient = torch.randn(5, 3, 8, 8).double(), torch.randn(5, 3, 16).double()
    expected = encoder.plain_taps(images)

    # Of a network cut after each block, by the encoder's own feature.
    if variant != "batch norm":
        assert torch.allclose(expected[:, -1], encoder(images), rtol=1e-10)
    shorter = copy.deepcopy(encoder)
    del shorter.blocks[1:]
    assert torch.allclose(expected[:, 0], shorter.plain(images), rtol=1e-10)
    expected.backward(gradient)
    by_plain = [p.grad.clone() for p in encoder.parameters() if p.grad is not None]

    def check(**how: Any) -> None:
        encoder.zero_grad()
        for block in encoder.blocks:
            assert isinstance(block, Block)
            block.fused = how.get("fused", False)
            block.recompute = how.get("recompute", "none")
        taps = encoder.taps(images)
        assert torch.allclose(taps, expected, rtol=1e-10), how
        taps.backward(gradient)
        found = [p.grad for p in encoder.parameters() if p.grad is not None]
        for ours, other in zip(found, by_plain, strict=True):
            assert torch.allclose(ours, other, rtol=1e-8, atol=1e-10), how

    for recompute in ("none", "selective", "full"):
        check(recompute=recompute)
    if variant != "batch norm":
        check(fused=True)
        check(fused=True, recompute="full")
    with traced_blocks(encoder):
        check()


def test_compiled_blocks_give_the_same_taps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between compiled blocks there is one tensor, not stream and branch."""
    encoder = VisionTransformer(image_size=8, patch_size=4, embed_dim=16, depth=3, num_heads=2)
    expected = encoder.taps(torch.ones(2, 3, 8, 8))
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    compile_blocks(encoder)
    assert torch.allclose(encoder.taps(torch.ones(2, 3, 8, 8)), expected, atol=1e-6)


@pytest.mark.parametrize("form", ["moco_v3_projector", "byol", "simclr", "swav_projector"])
def test_a_stack_is_its_heads_one_by_one(form: str) -> None:
    torch.manual_seed(0)
    stack = HeadStack(3, 4, 5, 2, FORMS[form]).double()
    alone = copy.deepcopy(stack)
    x = torch.randn(2, 7, 3, 4).double().requires_grad_()
    out = stack(x.flatten(2)).unflatten(2, (3, -1))
    out.square().sum().backward()
    rows = torch.stack([alone.alone(i, x.detach()[:, :, i]) for i in range(3)], dim=2)
    rows.square().sum().backward()
    assert torch.allclose(out, rows, rtol=1e-12)
    for (name, ours), other in zip(stack.named_parameters(), alone.parameters(), strict=True):
        assert torch.allclose(ours.grad, other.grad, rtol=1e-9, atol=1e-12), name
    for (name, ours), other in zip(stack.named_buffers(), alone.buffers(), strict=True):
        assert torch.allclose(ours, other), name
    with pytest.raises(ValueError, match="count=0"):
        HeadStack(0, 4, 5, 2, FORMS[form])


def test_norms_and_biases_do_not_decay() -> None:
    config = config_on("moco_v3")
    config = replace(config, optim=replace(config.optim, weight_decay=0.1))
    objective = build_objective(config, torch.device("cpu"))
    optimizer = build_optimizer(
        config, objective.named_parameters(), objective.averages(), objective.parameter_group
    )
    decays = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    for name, parameter in objective.named_parameters():
        if parameter.requires_grad:
            assert decays[id(parameter)] == (0.1 if parameter.ndim > 1 else 0.0), name


def test_the_planner_counts_the_heads_of_all_blocks() -> None:
    """Products of the trunk are those of MoCo v3 but for the heads, whose weights say how many."""
    config = replace(config_on("moco_v3"), precision="fp32")
    objective = build_objective(config, torch.device("cpu"))
    assert isinstance(objective, SDMoCoV3)

    def products(module: torch.nn.Module) -> int:
        return sum(p.numel() for p in module.parameters() if p.ndim == 2)

    plain = replace(config, objective=CONFIG.objective)
    moco_v3: Any = build_objective(plain, torch.device("cpu"))
    more = 2 * products(objective.projectors) + 4 * products(objective.predictors)
    more -= 2 * products(moco_v3.predictor)
    found = (
        part_flops(config, "fp32", 8)[QUERY_FORWARD] - part_flops(plain, "fp32", 8)[QUERY_FORWARD]
    )
    assert found == 2 * 8 * more


def test_recipes_carry_the_official_numbers() -> None:
    config = get_recipe("sdssl_vit_s16_e300_b1024")
    own = config.objective
    assert isinstance(own, SDSSLConfig)
    assert (own.on, own.ratio, own.temperature, own.ema_momentum) == ("moco_v3", 1.0, 0.2, 0.996)
    assert (config.epochs, config.global_batch_size, config.peak_lr) == (300, 1024, 6e-4)
    optim = config.optim
    assert (optim.weight_decay, optim.warmup_epochs, optim.schedule) == (
        0.1,
        40,
        "cosine_inclusive",
    )
    assert EXPECTED[config.recipe].linear is None
    with torch.device("meta"):
        # The spec counts 115 million more parameters of ViT-B than the trunk and its last projector.
        from fastmoco.objectives.build import build_model

        base = build_model(get_recipe("sdssl_vit_b16_e300_b1024"))
    assert isinstance(base, SDSSL)
    extra = sum(
        p.numel() for n in ("projectors", "predictors") for p in base.networks()[n].parameters()
    )
    assert round((extra + 20.97e6) / 1e6) in range(114, 118)
    on_byol = get_recipe("sdssl_byol_vit_s16_e300_b1024").objective
    on_simclr = get_recipe("sdssl_simclr_vit_s16_e300_b1024")
    assert on_byol == SDSSLConfig(on="byol", ratio=0.8)
    assert (on_simclr.objective, on_simclr.optim.lr) == (
        SDSSLConfig(on="simclr", ratio=0.8),
        1.3e-4,
    )
    assert from_json(to_json(on_simclr)) == on_simclr


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"on": "swav"}, "on='swav'"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"ratio": -1.0}, "ratio=-1.0"),
        ({"intermediate_hidden_dim": -1}, "intermediate_hidden_dim=-1"),
        ({"local_gradient": True}, "on=simclr"),
        ({"ema_momentum": 1.5}, "ema_momentum=1.5"),
    ],
)
def test_wrong_numbers_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SDSSLConfig(**fields)


def test_an_encoder_of_one_block_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 blocks"):
        SDMoCoV3(
            lambda: VisionTransformer(
                image_size=8, patch_size=4, embed_dim=16, depth=1, num_heads=2
            )
        )


def test_progress_past_the_end_keeps_the_last_ratio() -> None:
    objective = conformance.rough(config_on("simclr", ratio=0.8))
    assert isinstance(objective, SDSSL)
    assert objective.loss_ratio(Progress(9, 8)) == objective.loss_ratio(Progress(8, 8)) == 0.8
