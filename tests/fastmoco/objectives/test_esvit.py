"""EsViT against golden numbers: losses, gradients and centres alone, and three steps on a small Swin
with small crops, clipping and a last layer that waits."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, get_args
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastmoco.config.model import Pooling
from fastmoco.config.serial import from_json, to_json
from fastmoco.models.encoder_file import describe_run
from fastmoco.models.swin import SwinTransformer
from fastmoco.models.vit import REGION_POOLINGS, VisionTransformer
from fastmoco.objectives import esvit
from fastmoco.objectives.build import build_model, build_objective
from fastmoco.objectives.chunked import ChunkedStep
from fastmoco.objectives.dino import HeadRows, scores
from fastmoco.objectives.esvit import EsViT, region_pairs
from fastmoco.objectives.interface import Features, Progress
from fastmoco.optim import build_adamw, learning_rate
from fastmoco.optim.averaged import FusedAdamW
from fastmoco.optim.clipping import clip_each_
from fastmoco.optim.groups import set_weight_decays, split_groups
from fastmoco.optim.schedule import ema_momentum, weight_decay
from fastmoco.recipes import EXPECTED, get_recipe
from fastmoco.recipes.esvit import EsViTConfig
from fastmoco_kernels.tensors import norms_of
from fastmoco_pipelines.spec import each_view
from tests.distributed.run_trainer import CONFIG
from tests.fastmoco.objectives import test_conformance as conformance
from tests.fastmoco.objectives.test_dino import Outputs, Rows
from tests.golden_objective import Data, read_sibling_b

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data() -> Data:
    return read_sibling_b("esvit")


def require_close(ours: Tensor | float, expected: np.ndarray, name: str) -> None:
    """The tolerance of float32 storage or of float64, relative to the largest number; of true zeros
    and of what AdamW makes of them an absolute one."""
    most = float(np.abs(expected).max())
    tolerance = most * (1.1e-7 if expected.dtype == np.float32 else 1e-9)
    if "final/" in name and name.endswith("qkv.bias"):
        tolerance = max(tolerance, 1e-8)
    elif most < 1e-6:
        tolerance = 1e-9
    gap = (torch.as_tensor(ours).detach().double() - torch.from_numpy(expected).double()).abs()
    assert gap.max() <= tolerance, name


def torch_of(data: Data, name: str) -> Tensor:
    return torch.from_numpy(data[name]).double()


class Tokens(Rows):
    """An encoder of rows that are given, which has regions."""

    regions = plain_regions = Rows.forward


class Given(nn.Module):
    """A head with outputs that are given, whatever its rows are."""

    def __init__(self, outputs: Tensor) -> None:
        super().__init__()
        self.outputs = outputs

    def forward(self, rows: Tensor) -> HeadRows:
        assert rows.shape[:-1] == self.outputs.shape[:-1]
        eye = torch.eye(self.outputs.shape[-1], dtype=self.outputs.dtype)
        return HeadRows(self.outputs, eye, self.outputs)


def on_outputs(data: Data, *, region: bool) -> EsViT:
    """The objective of the losses alone, which takes outputs of the view heads for features."""
    outputs = int(data["cfg"][1])
    objective = EsViT(
        partial(Tokens, outputs),
        region=region,
        projection_dim=2,
        hidden_dim=2,
        prototypes=outputs,
        temperature=float(data["student_temp"]),
        teacher_temperature_start=float(data["temps"][0]),
        teacher_temperature=float(data["temps"][1]),
        teacher_warmup_epochs=int(data["temp_epochs"][0]),
        center_momentum=float(data["center_momentum"]),
    ).double()
    for encoder in (objective.encoder, objective.momentum_encoder):
        encoder.head = Outputs()
    return objective


def by_size(rows: Tensor, images: int, *sizes: tuple[int, int]) -> list[Tensor]:
    """Rows crop by crop, then image and token -> [b, crops, tokens, ...] of each size."""
    counts = [crops * images * tokens for crops, tokens in sizes]
    return [
        part.unflatten(0, (crops, images, tokens)).transpose(0, 1)
        for part, (crops, tokens) in zip(rows.split(counts), sizes, strict=True)
    ]


def test_losses_gradients_and_centres_match_golden(data: Data) -> None:
    images, _, _, crops, large, small = data["cfg"].tolist()
    whole, views = on_outputs(data, region=True), on_outputs(data, region=False)
    sizes = ((2, large), (crops - 2, small))
    for call in range(int(data["num_calls"])):
        name = f"l{call}/"
        at = Progress(int(data[f"{name}epoch"]) * 5 + 2, 1000, 5)
        tau = data["teacher_temp_schedule"][int(data[f"{name}epoch"])]
        assert whole.teacher_temperature(at) == pytest.approx(tau, rel=1e-12)
        s_cls, s_reg = (torch_of(data, name + n).requires_grad_() for n in ("s_cls", "s_reg"))
        rows = s_cls.unflatten(0, (crops, images)).transpose(0, 1)
        target_rows = torch_of(data, f"{name}t_cls").unflatten(0, (2, images)).transpose(0, 1)
        tokens = by_size(torch_of(data, f"{name}s_fea"), images, *sizes)
        (target_tokens,) = by_size(torch_of(data, f"{name}t_fea"), images, sizes[0])
        regions = torch.cat([g.flatten(1, 2) for g in by_size(s_reg, images, *sizes)], dim=1)
        (targets,) = by_size(torch_of(data, f"{name}t_reg"), images, sizes[0])
        whole.region_head = Given(regions)
        whole.momentum_region_head = Given(targets.flatten(1, 2))

        for objective, features, loss, start in (
            (views, Features((rows,), (target_rows,)), "view_loss", "view_"),
            (whole, Features((rows, *tokens), (target_rows, target_tokens)), "loss", ""),
        ):
            s_cls.grad = None
            objective.before_step(at)
            found = objective.compare(features, at).loss
            found.backward()
            objective.after_step(torch.zeros(()), at)
            require_close(found, data[name + loss], name + loss)
            assert s_cls.grad is not None
            require_close(s_cls.grad, data[f"{name}{start}ds_cls"], f"{name}{start}ds_cls")
            require_close(objective.center[0], data[f"{name}{start}center"], f"{name}{start}center")
        assert s_reg.grad is not None
        require_close(s_reg.grad, data[f"{name}ds_reg"], f"{name}ds_reg")
        require_close(whole.region_center[0], data[f"{name}center_grid"], f"{name}center_grid")


def our_name(golden_name: str, side: str) -> str:
    network = {"student": "", "teacher": "momentum_"}[side]
    if golden_name.startswith("head_dense."):
        return f"{network}region_head.{golden_name.removeprefix('head_dense.')}"
    return f"{network}encoder.{golden_name}"


def golden_objective(data: Data) -> EsViT:
    """The objective of `step/`, at its start."""
    size, patch, width, window, _, _, outputs, hidden, projection, _, _ = data["step/cfg"].tolist()
    build = partial(
        SwinTransformer,
        image_size=size,
        patch_size=patch,
        width=width,
        depths=tuple(data["step/depths"].tolist()),
        heads=tuple(data["step/heads"].tolist()),
        window=window,
        eps=1e-6,
    )
    taus = data["step/teacher_temp"]
    objective = EsViT(
        build,
        projection_dim=projection,
        hidden_dim=hidden,
        prototypes=outputs,
        train_last_norm=not data["step/norm_last_layer"],
        freeze_last_layer_epochs=float(data["step/freeze_last_layer"]),
        teacher_temperature_start=float(taus[0]),
        teacher_temperature=float(taus[-1]),
        teacher_warmup_epochs=2,
        ema_momentum=float(data["step/m"][0]),
    ).double()
    weights = {"center": objective.center, "region_center": objective.region_center}
    for side in ("student", "teacher"):
        start = f"step/init/{side}/"
        for name in (name for name in data if name.startswith(start)):
            weights[our_name(name.removeprefix(start), side)] = torch.from_numpy(data[name])
    objective.load_state_dict(weights)
    return objective


@pytest.mark.parametrize("chunk", [0, 2])
def test_three_steps_match_golden(data: Data, chunk: int) -> None:
    objective = golden_objective(data)
    named = {name: p for name, p in objective.named_parameters() if p.requires_grad}
    adamw = build_adamw(objective.named_parameters(), lr=0.0, weight_decay=1.0)
    split_groups(adamw, list(objective.named_parameters()), objective.parameter_group)
    plain = {our_name(name, "student") for name in data["step/no_decay"].tolist()}
    decays = {n: objective.parameter_group(n, p).weight_decay_scale for n, p in named.items()}
    assert decays == {name: 0.0 if name in plain else 1.0 for name in named}
    optimizer = FusedAdamW(adamw, objective.averages())
    # Norms are in the order of the weights in the file.
    order = [name for name in data if name.startswith("step/init/student/")]
    trained = [our_name(name.rpartition("student/")[2], "student") for name in order]
    trained = [name for name in trained if name in named]

    steps = len(data["step/loss"])
    for step in range(steps):
        at = Progress(step, steps, 1)
        views = [torch_of(data, f"step/x{v}/{step}") for v in range(4)]
        objective.zero_grad(set_to_none=True)
        objective.before_step(at)
        if step == 0 and not chunk:
            require_outputs(objective, views, data)
        if chunk:
            output = ChunkedStep(objective, chunk=chunk)(*views, at=at)
        else:
            output = objective(*views, at=at)
            output.loss.backward()
        require_close(output.loss, data["step/loss"][step : step + 1], f"loss {step}")
        gradients = {name: named[name].grad for name in trained}
        assert all(gradient is not None for gradient in gradients.values())
        if step == 0:
            for name in (name for name in data if name.startswith("step/grad0/")):
                ours = gradients[our_name(name.removeprefix("step/grad0/"), "student")]
                assert ours is not None
                require_close(ours, data[name], name)
        found = [gradient for gradient in gradients.values() if gradient is not None]
        require_close(norms_of(found), data["step/clip_norms"][step], f"norms {step}")
        clip_each_(found, float(data["step/clip"]))
        for name in objective.frozen(at) & named.keys():
            named[name].grad = None
        shown = objective.schedules(at)
        assert shown["teacher_temperature"] == pytest.approx(data["step/teacher_temp"][step])
        assert shown["ema_momentum"] == pytest.approx(data["step/m"][step])
        for group in optimizer.param_groups:
            group["lr"] = float(data["step/lr"][step])
        set_weight_decays(optimizer.param_groups, float(data["step/wd"][step]))
        optimizer.step(ema_momentum=objective.ema_momentum(at), skip=torch.zeros(()))
        objective.after_step(torch.zeros(()), at)
        require_close(objective.center[0], data[f"step/center/{step}"], f"center {step}")
        require_close(objective.region_center[0], data[f"step/center_grid/{step}"], f"grid {step}")
    state = objective.state_dict()
    finals = [name for name in data if name.startswith("step/final/")]
    assert len(finals) == 128
    for name in finals:
        _, _, side, rest = name.split("/")
        require_close(state[our_name(rest, side)], data[name], name)


def require_outputs(objective: EsViT, views: list[Tensor], data: Data) -> None:
    """What encoders and heads give in the first step, crop by crop."""
    inputs = objective.inputs(tuple(views))
    (rows, *tokens), (target_rows, _) = objective.features(inputs, Progress(0, 3, 1))
    flat = torch.cat([group.transpose(0, 1).flatten(0, 2) for group in tokens])
    require_close(flat, data["step/out0/fea"], "fea")
    assert [group.shape[2] for group in tokens] == data["step/npatch"].tolist()
    for head, given, name in (
        (objective.encoder.head, rows.transpose(0, 1).flatten(0, 1), "cls"),
        (objective.momentum_encoder.head, target_rows.transpose(0, 1).flatten(0, 1), "t_cls"),
        (objective.region_head, flat, "reg"),
    ):
        found = head(given)
        require_close(scores(found.unit, found.weight), data[f"step/out0/{name}"], name)


@pytest.mark.parametrize("file", ["esvit", "schedules"])
def test_schedules_match_golden(data: Data, file: str) -> None:
    of_file, start = (data, "sched/") if file == "esvit" else (read_sibling_b(file), "esvit/")
    for name in ("lr", "wd", "m"):
        base, final, epochs, steps, warmup = of_file[f"{start}{name}_args"].tolist()
        total = int(epochs * steps)
        places = of_file.get(f"{start}{name}_t", np.arange(total)).tolist()
        for step, expected in zip(places, of_file[start + name].tolist(), strict=True):
            if name == "lr":
                found = learning_rate(
                    step,
                    peak=base,
                    epochs=epochs,
                    warmup_epochs=warmup,
                    steps_per_epoch=int(steps),
                    schedule="cosine_inclusive",
                    final_lr=final,
                )
            elif name == "wd":
                found = weight_decay(step, first=base, last=final, total=total)
            else:
                found = ema_momentum(step, start=base, epochs=epochs, steps_per_epoch=int(steps))
            assert found == pytest.approx(expected, rel=1e-9, abs=1e-15), (name, step)


def test_each_token_has_its_most_similar_one_of_the_other_large_crops() -> None:
    """Weights of an image add up to 1, of each pair of crops to the same, and the first of equal
    tokens is taken."""
    torch.manual_seed(0)
    target = torch.randn(3, 2, 9, 6, dtype=torch.float64)
    target[:, :, 5] = target[:, :, 3]
    tokens = [target.clone(), torch.randn(3, 2, 4, 6, dtype=torch.float64)]
    tokens[0][:, 0] = 2 * target[:, 1].flip(1)
    pairs = region_pairs(tokens, target)
    torch.testing.assert_close(pairs.sum(), torch.ones((), dtype=torch.float64))
    by_crop = torch.stack([crop.sum((0, 1)) for crop in pairs.split([9, 9, 4, 4], dim=1)])
    by_pair = torch.stack([part.sum(1) for part in by_crop.chunk(2, dim=1)], dim=1) * 6
    expected = torch.tensor([[0, 1], [1, 0], [1, 1], [1, 1]], dtype=torch.float64)
    torch.testing.assert_close(by_pair, expected)
    found = pairs[0, :9, 9:].argmax(-1).tolist()
    assert found == [8, 7, 6, 3, 4, 3, 2, 1, 0]


def with_crops(**numbers: Any) -> Any:
    """A run on a Swin with two small crops, stochastic depth and trained lengths."""
    small = replace(CONFIG.data.view1, size=4, copies=2)
    own = EsViTConfig(prototypes=24, freeze_last_layer_epochs=0, train_last_norm=True, **numbers)
    return replace(conformance.SWIN, objective=own, data=replace(CONFIG.data, more_views=(small,)))


def test_small_crops_pass_the_suite_of_every_objective(tmp_path: Path) -> None:
    config = with_crops(teacher_warmup_epochs=3, teacher_temperature=0.07)
    conformance.check_reference(config)
    conformance.check_chunks(config)
    conformance.check_features(config)
    conformance.check_skip(config, tmp_path / "skip")
    assert conformance.rough(config).frozen(Progress(0, 12, 4)) == frozenset()


def test_without_regions_it_is_dino_on_any_encoder() -> None:
    conformance.check_reference(with_crops(region=False))
    views = conformance.views_of(with_crops())
    both, alone = (conformance.rough(with_crops(region=region)) for region in (True, False))
    alone.load_state_dict(both.state_dict(), strict=False)
    at = conformance.AT
    found = both(*views, at=at)
    torch.testing.assert_close(found.watch["view_loss"], alone(*views, at=at).loss.detach())
    wanted = (found.watch["view_loss"] + found.watch["region_loss"]) / 2
    torch.testing.assert_close(found.loss.detach(), wanted)
    resnet = replace(conformance.RESNET, objective=EsViTConfig(prototypes=24, region=False))
    conformance.check_reference(resnet)


def test_both_last_layers_wait_for_whole_epochs() -> None:
    objective = conformance.rough(replace(CONFIG, objective=EsViTConfig(prototypes=24)))
    names = {
        f"{head}.last_layer.{name}"
        for head in ("encoder.head", "region_head")
        for name in ("weight_g", "weight_v")
    }
    assert objective.frozen(Progress(3, 40, 4)) == names
    assert objective.frozen(Progress(4, 40, 4)) == frozenset()


def test_the_loss_takes_rows_and_not_their_outputs() -> None:
    """No output of a region exists outside of the streamed loss."""
    config = with_crops()
    objective, views = conformance.rough(config), conformance.views_of(config)
    with (
        mock.patch.object(
            esvit, "soft_cross_entropy_of_pairs", wraps=esvit.soft_cross_entropy_of_pairs
        ) as loss,
        mock.patch.object(esvit, "scores", wraps=scores) as outputs,
    ):
        objective(*views)
    assert [tuple(t.shape) for t in loss.call_args.args] == [
        (13, 10, 8),
        (24, 8),
        (13, 8, 8),
        (24, 8),
        (13, 10, 8),
    ]
    assert [call.args[0].shape for call in outputs.call_args_list] == [(1, 8)]


def test_a_feature_that_is_not_of_the_compared_tokens_is_refused() -> None:
    for pooling in set(get_args(Pooling)) - set(REGION_POOLINGS):
        model = replace(CONFIG.model, pooling=pooling)
        with pytest.raises(ValueError, match=rf"pooling='{pooling}'.*take --model.pooling class"):
            build_objective(replace(CONFIG, model=model, objective=EsViTConfig()), CPU)


@pytest.mark.parametrize("pooling", REGION_POOLINGS)
def test_regions_of_a_vit_are_its_patch_tokens(pooling: Any) -> None:
    torch.manual_seed(0)
    encoder = VisionTransformer(
        image_size=8, patch_size=2, embed_dim=16, depth=2, num_heads=2, pooling=pooling
    ).double()
    images = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    feature, tokens = encoder.regions(images)
    torch.testing.assert_close(feature, encoder(images))
    torch.testing.assert_close(tokens, encoder.token_features(images))
    for ours, plain in zip((feature, tokens), encoder.plain_regions(images), strict=True):
        torch.testing.assert_close(ours, plain)


def test_recipes_carry_the_official_numbers_and_travel_through_json() -> None:
    config, views = (get_recipe(f"esvit_{name}swin_t4_e300_b512") for name in ("", "view_"))
    own = config.objective
    assert isinstance(own, EsViTConfig)
    assert own.region
    assert views.objective == replace(own, region=False)
    assert (own.prototypes, own.temperature, own.ema_momentum) == (65536, 0.1, 0.996)
    assert (own.teacher_temperature_start, own.teacher_temperature) == (0.04, 0.07)
    assert (own.teacher_warmup_epochs, own.train_last_norm) == (30, True)
    model, optim = config.model, config.optim
    assert (model.architecture, model.window, model.norm_eps) == ("swin_tiny", 7, 1e-6)
    assert (model.drop_path, model.hidden_dim, model.projection_dim) == (0.1, 2048, 256)
    assert (config.epochs, config.global_batch_size, config.peak_lr) == (300, 512, 1e-3)
    assert (optim.weight_decay, optim.final_weight_decay, optim.final_lr) == (0.04, 0.4, 1e-6)
    assert (optim.warmup_epochs, optim.clip_tensor_norm) == (10, 3.0)
    assert [view.size for view in each_view(config.data.views)] == [224] * 2 + [96] * 8
    assert [EXPECTED[each.recipe].linear for each in (config, views)] == [78.0, 77.0]
    assert from_json(to_json(config)) == config
    with torch.device("meta"):
        objective = build_model(replace(config, model=replace(model, drop_path=0.0)))
    assert isinstance(objective, EsViT)
    head = sum(p.numel() for p in objective.region_head.parameters())
    assert head == sum(p.numel() for p in objective.encoder.head.parameters()) == 23_138_560
    assert {m.eps for m in objective.encoder.modules() if isinstance(m, nn.LayerNorm)} == {1e-6}
    found = type(describe_run(config)).from_metadata(describe_run(config).to_metadata())
    assert found == describe_run(config)
    built = found.build()
    assert isinstance(built, SwinTransformer)
    assert built.norm.eps == 1e-6


def test_an_epsilon_of_another_trunk_is_refused() -> None:
    with pytest.raises(ValueError, match="norm_eps=1e-06: has no effect on a ViT"):
        replace(CONFIG.model, norm_eps=1e-6)
    with pytest.raises(ValueError, match=r"norm_eps=0\.0.*must be positive"):
        replace(conformance.SWIN.model, norm_eps=0.0)
    with pytest.raises(ValueError, match=r"must be a ViT or a Swin.*objective\.region False"):
        build_objective(replace(conformance.RESNET, objective=EsViTConfig()), CPU)
