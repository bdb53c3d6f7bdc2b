"""Supervised learning: which images are mixed and how, rates by layer, and a trunk that is frozen.

That it equals its reference, chunks the whole and ranks one process is tested for all objectives in
test_conformance.py.
"""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch.nn.functional import cross_entropy

from fastmoco.config import Config
from fastmoco.distributed.mesh import World
from fastmoco.models import VisionTransformer
from fastmoco.models.convnextv2 import ConvNeXtV2
from fastmoco.models.swin import swin_nano
from fastmoco.objectives.build import build_objective
from fastmoco.objectives.chunked import ChunkedStep
from fastmoco.objectives.interface import Coupling, Inputs, Progress
from fastmoco.objectives.supervised import Mix, Supervised, mixed
from fastmoco.recipes.supervised import SupervisedConfig
from fastmoco.training.trainer import Trainer
from tests.checkpoint_content import assert_same
from tests.distributed.run_trainer import CONFIG
from tests.fastmoco.objectives import test_conformance as conformance
from tests.golden_objective import read_sibling_b

SIDE, CLASSES = 8, 5


def config_of(**objective: object) -> Config:
    return replace(
        conformance.config_of(SupervisedConfig, CONFIG),
        objective=SupervisedConfig(classes=CLASSES, **objective),  # type: ignore[arg-type]
    )


def objective_of(**objective: object) -> Supervised:
    built = build_objective(config_of(**objective), torch.device("cpu"))
    assert isinstance(built, Supervised)
    return built


def mixes(objective: Supervised, steps: int = 60) -> list[Mix]:
    found = [objective.mix_of(Progress(step, steps), SIDE) for step in range(steps)]
    return [mix for mix in found if mix is not None]


def test_neighbours_are_mixed_and_the_last_of_an_odd_number_stays() -> None:
    view = torch.rand(5, 3, SIDE, SIDE)
    faded = mixed(view, Mix(0.75, None))
    for row, other in ((0, 1), (1, 0), (2, 3), (3, 2), (4, 4)):
        assert torch.allclose(faded[row], 0.75 * view[row] + 0.25 * view[other])

    # Of cutmix every pixel is of one of the two, and the share is that of the pixels.
    objective = objective_of(cutmix=1.0)
    some = [mix for mix in mixes(objective) if 0.2 < mix.share < 0.8]
    assert len(some) > 5
    for mix in some:
        cut = mixed(view, mix)
        own = (cut == view).all(1)
        other = (cut == view[[1, 0, 3, 2, 4]]).all(1)
        assert bool((own | other).all())
        assert own[:4].float().mean((1, 2)).tolist() == pytest.approx([mix.share] * 4)
        assert torch.equal(cut[4], view[4])


def test_shares_are_those_of_the_distribution_and_a_function_of_seed_and_step() -> None:
    both = objective_of(mixup=0.8, cutmix=1.0)
    assert mixes(both) == mixes(copy.deepcopy(both))
    boxes = [mix.box is not None for mix in mixes(both, 400)]
    assert 0.4 < sum(boxes) / len(boxes) < 0.6
    shares = torch.tensor([mix.share for mix in mixes(objective_of(mixup=0.8), 400)])
    # Beta(a, a): mean 1/2, variance 1 / (4 (2 a + 1)).
    assert shares.mean() == pytest.approx(0.5, abs=0.05)
    assert shares.var() == pytest.approx(1 / (4 * 2.6), rel=0.15)
    other = build_objective(replace(config_of(mixup=0.8), seed=1), torch.device("cpu"))
    assert isinstance(other, Supervised)
    assert mixes(other) != mixes(objective_of(mixup=0.8))
    assert mixes(objective_of()) == []


def test_targets_are_smoothed_shares_of_both_labels() -> None:
    objective = objective_of(label_smoothing=0.1)
    targets = objective.targets(torch.tensor([0, 3, 4]), Mix(0.75, None), torch.float64)
    assert targets.sum(1).tolist() == pytest.approx([1.0] * 3)
    assert targets[0].tolist() == pytest.approx([0.695, 0.02, 0.02, 0.245, 0.02])
    assert targets[1].tolist() == pytest.approx([0.245, 0.02, 0.02, 0.695, 0.02])
    assert targets[2].tolist() == pytest.approx([0.02, 0.02, 0.02, 0.02, 0.92])


def test_the_loss_is_that_of_torch_and_watches_accuracy() -> None:
    objective = objective_of(label_smoothing=0.1).double()
    view, labels = torch.randn(6, 3, SIDE, SIDE, dtype=torch.float64), torch.arange(6) % CLASSES
    output = objective(view, labels=labels, accuracy=True)
    logits = objective.classifier()(view)
    expected = cross_entropy(logits, labels, label_smoothing=0.1).item()
    assert output.loss.item() == pytest.approx(expected)
    assert output.watch["train_top1"] == (logits.argmax(1) == labels).double().mean()
    assert output.watch["train_top5"] == 1.0
    assert objective(view, labels=labels).watch == {}
    with pytest.raises(ValueError, match=r"labels=None.*LoaderSpec\.classes"):
        objective(view)


def test_rates_fall_by_layer_and_vectors_do_not_decay() -> None:
    """As BEiT and MAE define it: of two blocks, the head is layer 3."""
    objective = objective_of(layer_decay=0.5)
    groups = {
        name: objective.parameter_group(name, parameter)
        for name, parameter in objective.named_parameters()
    }
    rates = {name: group.lr_scale for name, group in groups.items()}
    for name in ("cls_token", "pos_embed", "patch_embed.proj.weight"):
        assert rates[f"encoder.{name}"] == 0.125
    assert rates["encoder.blocks.0.attn.qkv.weight"] == 0.25
    assert rates["encoder.blocks.1.norm2.bias"] == 0.5
    assert rates["encoder.norm.weight"] == rates["encoder.head.weight"] == 1.0
    decays = {name for name, group in groups.items() if group.weight_decay_scale == 1}
    assert decays == {
        name
        for name, parameter in objective.named_parameters()
        if parameter.ndim > 1 and not name.endswith(("cls_token", "pos_embed"))
    }


def test_bias_tables_of_a_swin_do_not_decay() -> None:
    objective = Supervised(partial(swin_nano, image_size=SIDE), classes=3)
    decays = {
        name
        for name, parameter in objective.named_parameters()
        if objective.parameter_group(name, parameter).weight_decay_scale
    }
    assert decays == {
        name
        for name, parameter in objective.named_parameters()
        if parameter.ndim > 1 and "relative_position_bias_table" not in name
    }


@pytest.mark.parametrize("by", ["block", "group"])
def test_layers_of_a_convnext_match_golden(by: Literal["block", "group"]) -> None:
    data = read_sibling_b("schedules")
    build = partial(ConvNeXtV2, depths=(3, 3, 27, 3), widths=(2, 2, 2, 2), image_size=32)
    objective = Supervised(build, classes=3, layer_decay=0.5, layer_decay_by=by)
    named = dict(objective.named_parameters())
    last = {"block": 37, "group": 13}[by]
    numbers = data[{"block": "convnext_ids/single", "group": "convnext_ids/group"}[by]]
    for name, number in zip(data["convnext_ids/names"].tolist(), numbers.tolist(), strict=True):
        group = objective.parameter_group(f"encoder.{name}", named[f"encoder.{name}"])
        assert group.lr_scale == 0.5 ** (last - number), name


def with_batch_norms() -> VisionTransformer:
    return VisionTransformer(
        image_size=16, patch_size=16, embed_dim=16, depth=1, num_heads=2, stem="conv"
    )


def test_a_frozen_trunk_couples_nothing_and_moves_nothing() -> None:
    torch.manual_seed(0)
    whole = Supervised(with_batch_norms, classes=CLASSES)
    assert whole.coupling is Coupling.TRUNK
    assert "batch norms" in whole.coupling_reason

    probe = Supervised(with_batch_norms, classes=CLASSES, train_from="head", head_std=0.01)
    assert (probe.coupling, probe.coupling_reason) == (Coupling.NONE, "")
    assert {n for n, p in probe.named_parameters() if p.requires_grad} == {
        "encoder.head.weight",
        "encoder.head.bias",
    }
    before = copy.deepcopy(probe.state_dict())
    view, labels = torch.randn(4, 3, 16, 16), torch.arange(4)
    for mode in (True, False, True):
        probe.train(mode)
        assert not probe.encoder.training
        assert probe.encoder.head.training == mode
    features = probe.features(Inputs((view,), labels=labels), Progress())
    assert not features.online[0].requires_grad  # so no activation is kept
    probe(view, labels=labels).loss.backward()
    assert probe.encoder.head.weight.grad is not None
    assert all(torch.equal(tensor, before[name]) for name, tensor in probe.state_dict().items())
    alone = probe.encoder(view[:1])  # no other image of the batch matters
    assert torch.allclose(alone, features.online[0][:1], atol=1e-6)


def test_a_linear_probe_trains_its_head_alone_and_continues(tmp_path: Path) -> None:
    config = config_of(train_from="head")
    conformance.check_reference(config)
    conformance.check_chunks(config)
    ends = []
    for name, steps in (("whole", (6,)), ("cut", (3, 6))):
        for last in steps:
            trainer = Trainer.build(config, tmp_path / name, World())
            start = copy.deepcopy(trainer.objective.state_dict())
            for _ in range(last - trainer.step_count):
                trainer.step(trainer.loader.next())
            trainer._save(force=True)
            ends.append(copy.deepcopy(trainer.objective.state_dict()))
            trainer.close()
            moved = {n for n, tensor in start.items() if not torch.equal(tensor, ends[-1][n])}
            assert moved == {"encoder.head.weight", "encoder.head.bias"}
    assert_same(ends[0], ends[-1])


def test_the_norm_of_a_feature_is_that_of_torch_without_weight_and_bias() -> None:
    objective = objective_of(train_from="head", feature_norm=True)
    assert objective.coupling is Coupling.HEADS
    conformance.check_reference(config_of(train_from="head", feature_norm=True))
    conformance.check_chunks(config_of(feature_norm=True))  # of an encoder that trains

    # A frozen trunk passes once, in chunks.
    whole, chunked = copy.deepcopy(objective), copy.deepcopy(objective)
    view, labels = torch.rand(10, 3, SIDE, SIDE), torch.arange(10) % CLASSES
    view = view.to(objective.encoder.head[1].weight.dtype)
    whole(view, labels=labels).loss.backward()
    ChunkedStep(chunked, chunk=4)(view, labels=labels)
    for name, parameter in whole.encoder.head.named_parameters():
        theirs = chunked.encoder.head.get_parameter(name).grad
        assert parameter.grad is not None
        assert theirs is not None
        assert (parameter.grad - theirs).abs().max() <= 1e-12
    means = [each.encoder.head[0].running_mean for each in (whole, chunked)]
    assert (means[0] - means[1]).abs().max() <= 1e-12
    assert means[0].abs().max() > 0
    norm, linear = objective.encoder.head
    assert {n for n, p in objective.named_parameters() if p.requires_grad} == {
        "encoder.head.1.weight",
        "encoder.head.1.bias",
    }
    features = (torch.randn(6, objective.encoder.embed_dim) * 3 + 2).to(linear.weight.dtype)
    theirs = torch.nn.BatchNorm1d(features.shape[1], eps=1e-6, affine=False).to(features)
    assert torch.allclose(norm(features), theirs(features), atol=1e-6)
    objective.eval()
    theirs.eval()
    assert torch.allclose(objective.encoder.head(features), linear(theirs(features)), atol=1e-6)


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match=r"objective\.classes=0.*--objective\.classes"):
        build_objective(replace(config_of(), objective=SupervisedConfig()), torch.device("cpu"))
    for fields, text in (
        ({"classes": 1}, "classes=1: must be at least 2"),
        ({"train_from": "neck"}, "train_from='neck': must be one of"),
        ({"label_smoothing": 1.0}, "label_smoothing=1.0: must be in"),
        ({"mixup": -1.0}, "mixup=-1.0: must not be negative"),
        ({"layer_decay": 0.0}, "layer_decay=0.0: must be above 0"),
    ):
        with pytest.raises(ValueError, match=text):
            SupervisedConfig(**fields)  # type: ignore[arg-type]
    assert objective_of().uninformed_loss(64) == math.log(CLASSES)


def test_an_option_without_effect_is_refused() -> None:
    """On a frozen encoder, and layers on a ResNet."""
    with pytest.raises(ValueError, match=r"layer_decay=0\.5: has no effect with train_from=head"):
        SupervisedConfig(classes=CLASSES, layer_decay=0.5, train_from="head")
    probe = config_of(train_from="head")
    probe = replace(probe, model=replace(probe.model, drop_path=0.1))
    with pytest.raises(ValueError, match=r"model\.drop_path=0\.1: has no effect on a frozen"):
        build_objective(probe, torch.device("cpu"))
    resnet = conformance.config_of(SupervisedConfig, conformance.RESNET)
    decayed = replace(resnet, objective=replace(resnet.objective, layer_decay=0.5))
    with pytest.raises(ValueError, match=r"objective\.layer_decay=0\.5: layers are the blocks"):
        build_objective(decayed, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"layer_decay_by='group': is for the stages"):
        objective_of(layer_decay_by="group")
