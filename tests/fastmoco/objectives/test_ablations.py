"""Every override of docs/ablations.md takes effect: in the modules, in the forward, or in the
update."""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastmoco.config import Config, resolve
from fastmoco.distributed.sync_batch_norm import BatchNorm
from fastmoco.models.blocks import ConvStem, TokenBatchNorm
from fastmoco.objectives.build import build_model, build_objective
from fastmoco.objectives.interface import Progress
from fastmoco.optim.build import build_optimizer
from fastmoco.optim.groups import set_learning_rates

TABLE = Path(__file__).parents[3] / "docs" / "ablations.md"
RECIPE = "vit_b16_e300_b4096"
IMAGENET = 1_281_167
AT = Progress(50, 100, 10)


def config_of(words: str) -> Config:
    """The recipe with these options, as the command line reads them."""
    pytest.importorskip("tyro", reason="tyro is not installed")
    from fastmoco.cli.recipe_commands import ConfigArguments, parse_config

    parsed = parse_config(ConfigArguments, "print-config", [RECIPE, *words.split()])
    assert parsed is not None
    return parsed.config


@dataclass(frozen=True)
class Step:
    """One update of a tiny model with the numbers of a config."""

    config: Config
    before: dict[str, Tensor]
    after: dict[str, Tensor]
    objective: Any
    loss: float

    def move(self, name: str) -> Tensor:
        """What the step added to a tensor."""
        return self.after[name] - self.before[name]


@cache
def step_of(words: str) -> Step:
    """Forward, backward and update at the peak of the learning rate, in float64."""
    whole = config_of(words)
    tiny: dict[str, Any] = {"architecture": "vit_nano", "image_size": 8, "patch_size": 2}
    tiny |= {"hidden_dim": 16, "projection_dim": 8}
    views = {f"view{n}": replace(v, size=8) for n, v in enumerate(whole.data.views, start=1)}  # type: ignore[type-var]
    config = replace(
        whole,
        precision="fp64",
        model=replace(whole.model, **tiny),
        data=replace(whole.data, **views),  # type: ignore[arg-type]
    )
    objective: Any = build_objective(config, torch.device("cpu"))
    optimizer = build_optimizer(config, objective.named_parameters(), objective.averages())
    set_learning_rates(optimizer.param_groups, config.peak_lr, peak=config.peak_lr)
    noise = torch.Generator().manual_seed(0)
    images = [torch.randn(6, 3, 8, 8, generator=noise, dtype=torch.float64) for _ in range(2)]

    before = {n: t.detach().clone() for n, t in objective.state_dict().items()}
    output = objective(*images, at=AT)
    output.loss.backward()
    optimizer.step(ema_momentum=objective.ema_momentum(AT))
    return Step(config, before, objective.state_dict(), objective, float(output.loss.detach()))


def batch(images: int, words: str) -> None:
    """Images of a process, steps of an epoch, and the learning rate of the update."""
    config = config_of(words)
    resolved = resolve(config, world_size=8, sample_count=IMAGENET)
    assert resolved.local_batch_size == images // 8
    assert resolved.steps_per_epoch == IMAGENET // images
    rate(1.5e-4 * images / 4096, words)


def rate(base_lr: float, words: str) -> None:
    """The first update of AdamW is proportional to the learning rate."""
    name = "encoder.blocks.0.mlp.fc1.weight"
    usual = step_of("").move(name)
    assert (step_of(words).move(name) - usual * base_lr / 1.5e-4).abs().max() <= 1e-14
    assert usual.abs().max() > 1e-4


def lamb(base_lr: float, words: str) -> None:
    config = config_of(words)
    assert config.peak_lr == pytest.approx(base_lr * 16)
    if importlib.util.find_spec("apex") is None:
        with pytest.raises(ValueError, match="apex"):
            step_of(words)
        return
    name = "encoder.norm.bias"
    assert not torch.equal(step_of(words).after[name], step_of("").after[name])


def projection(trains: bool, words: str) -> None:
    moved = step_of(words).move("encoder.patch_embed.proj.weight").abs().max()
    assert (float(moved) > 1e-5) is trains
    assert step_of(words).objective.momentum.shares_tokens() is not trains


def positions(kind: str, words: str) -> None:
    step = step_of(words)
    if kind == "none":
        assert "encoder.pos_embed" not in step.after
    else:
        moved = float(step.move("encoder.pos_embed").abs().max())
        assert (moved > 1e-5) is (kind == "learned")
    assert (step.loss == step_of("").loss) is (kind == "sincos")


def pooling(kind: str, words: str) -> None:
    step = step_of(words)
    assert ("encoder.cls_token" in step.after) is (kind == "class")
    assert ("encoder.norm.weight" in step.after) is (kind != "mean")
    assert (step.loss == step_of("").loss) is (kind == "class")
    losses = {step_of(f"--model.pooling {other}").loss for other in ("class", "mean", "norm_mean")}
    assert len(losses) == 3


def no_head_norm(words: str) -> None:
    objective = step_of(words).objective
    heads = (objective.encoder.head, objective.momentum_encoder.head, objective.predictor)
    assert not [m for head in heads for m in head.modules() if isinstance(m, BatchNorm)]
    assert [len(list(head.parameters())) for head in heads] == [3, 3, 2]
    assert step_of(words).loss != step_of("").loss


def no_predictor(words: str) -> None:
    step = step_of(words)
    assert not list(step.objective.predictor.parameters())
    noise = torch.randn(2, 6, 8, dtype=torch.float64)
    assert torch.equal(step.objective.predictor(noise), noise)
    assert step.loss != step_of("").loss


def momentum(start: float, schedule: str, words: str) -> None:
    """The average after the step is m times the old one and 1 - m times the new weight."""
    step = step_of(words)
    progress = (AT.step + 1) / AT.total_steps
    fallen = (1 + math.cos(math.pi * progress)) / 2 if schedule == "cosine" else 1.0
    m = 1 - (1 - start) * fallen
    name = "blocks.1.mlp.fc2.weight"
    old, new = step.before[f"momentum_encoder.{name}"], step.after[f"encoder.{name}"]
    average = step.after[f"momentum_encoder.{name}"]
    assert (average - (m * old + (1 - m) * new)).abs().max() <= 1e-12
    assert (new - old).abs().max() > 1e-4


def size(width: int, depth: int, tokens: int, norm: type[nn.Module] | None, words: str) -> None:
    """The encoder that the whole recipe builds."""
    encoder = whole(words).encoder
    assert (encoder.embed_dim, len(encoder.blocks), encoder.tokens) == (width, depth, tokens)
    norms = [block.norm2 for block in encoder.blocks]
    assert all(isinstance(n, TokenBatchNorm) for n in norms) is (norm is not None)


def conv_stem(words: str) -> None:
    encoder = whole(words).encoder
    assert isinstance(encoder.patch_embed, ConvStem)
    assert len(encoder.blocks) == 11


def whole(words: str) -> Any:
    with torch.device("meta"):
        return build_model(config_of(words))


LAMB = "--optim.name lamb --optim.fused-backend apex --optim.lr"
EMA = "--objective.ema-momentum"
HUGE = "--model.architecture vit_huge --model.patch-size 14"
CHECKS: dict[str, Callable[[str], None]] = {
    **{f"--global-batch-size {n}": partial(batch, n) for n in (1024, 2048, 4096, 6144)},
    **{f"--optim.lr {text}": partial(rate, float(text)) for text in ("0.5e-4", "1e-4", "1.5e-4")},
    **{f"{LAMB} {text}": partial(lamb, float(text)) for text in ("5e-4", "6e-4", "8e-4")},
    "--model.no-freeze-patch-embed": partial(projection, True),
    "--model.freeze-patch-embed": partial(projection, False),
    **{f"--model.positions {k}": partial(positions, k) for k in ("sincos", "learned", "none")},
    **{f"--model.pooling {k}": partial(pooling, k) for k in ("class", "norm_mean", "mean")},
    "--objective.no-head-norm": no_head_norm,
    "--objective.no-predictor": no_predictor,
    **{f"{EMA} {m}": partial(momentum, m, "cosine") for m in (0.9, 0.99, 0.999)},
    **{
        f"{EMA} {m} --objective.ema-schedule constant": partial(momentum, m, "constant")
        for m in (0, 0.99)
    },
    "--model.architecture vit_large": partial(size, 1024, 24, 197, None),
    HUGE: partial(size, 1280, 32, 257, None),
    f"{HUGE} --model.mlp-norm batch": partial(size, 1280, 32, 257, TokenBatchNorm),
    "--model.architecture vit_large --model.patch-size 7 --model.mlp-norm batch": partial(
        size, 1024, 24, 1025, TokenBatchNorm
    ),
    "--model.patch-size 8": partial(size, 768, 12, 785, None),
    "--model.architecture vit_conv_base": conv_stem,
}
"""Options of a row -> what they must change."""


@pytest.mark.parametrize("words", CHECKS)
def test_an_ablation_takes_effect(words: str) -> None:
    CHECKS[words](words)


def test_every_row_of_the_table_is_checked() -> None:
    rows = re.findall(r"^\|[^|]*\| `(--[^`]*)` \|", TABLE.read_text(), re.MULTILINE)
    assert sorted(rows) == sorted(CHECKS)
