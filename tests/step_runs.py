"""Runs of a few steps on either device, for the tests of the training step: a small model, distinct
images, and an error measure.

Every test of a step takes its device as a parameter: so it has run on a CPU
before it runs on a GPU machine.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmoco.config import BatchConfig, Config, ModelConfig
from fastmoco.distributed.mesh import World
from fastmoco.objectives import MoCoV3, Output
from fastmoco.objectives.reference import plain_forward
from fastmoco.recipes import vit_nano8_e60_b256, with_image_size
from fastmoco.training.trainer import Trainer
from fastmoco_pipelines import Batch

IMAGES = 48
STEPS = 12


def short_run(
    device: str,
    *,
    precision: str = "fp32",
    chunk: Any = "none",
    kept: Any = "auto",
    steps: int = STEPS,
    **model: Any,
) -> Config:
    """A few steps of 48 synthetic images; beyond the first and the last,
    nothing is logged or saved.

    On a CPU width 64 and 17 tokens, seconds for a whole test; on a GPU width 128 and 65 tokens,
    which fills its tiles.
    """
    large = device == "cuda"
    base = with_image_size(vit_nano8_e60_b256(), 32 if large else 16, patch_size=4)
    fields: dict[str, Any] = {
        "architecture": "vit_micro" if large else "vit_nano",
        "projection_dim": 64,
    }
    fields |= {"hidden_dim": 64, "compile": False, **model}
    config = replace(
        base,
        epochs=steps / (1_281_167 // IMAGES),  # the synthetic set has the length of ImageNet-1k
        global_batch_size=IMAGES,
        precision=precision,  # type: ignore[arg-type]
        threads=1,
        log_every_steps=1000,
        batch=BatchConfig(chunk=chunk, kept=kept),
        data=replace(base.data, synthetic=True),
        knn=replace(base.knn, every_epochs=0),
        optim=replace(base.optim, warmup_epochs=0),
    )
    assert isinstance(config.model, ModelConfig)
    return replace(config, model=replace(config.model, **fields))


@contextmanager
def running(config: Config, out: Path, device: str) -> Iterator[Trainer]:
    """A trainer on one device, its weights moved apart from their start; it is
    closed after the block.
    """
    trainer = Trainer.build(
        config,
        out,
        World(device=torch.device(device, 0) if device == "cuda" else torch.device(device)),
    )
    try:
        if trainer.step_count == 0:
            _move_apart(trainer.objective)
        yield trainer
    finally:
        trainer.close()


@torch.no_grad()
def _move_apart(objective: MoCoV3) -> None:
    """Noise on every weight of the trunk, and more on the momentum encoder's.

    At the start nearly all of the gradient is that of the class token, and a momentum update of
    equal weights has no effect.
    """
    noise = torch.Generator().manual_seed(7)

    def add(parameter: Tensor, scale: float) -> None:
        parameter.add_(
            scale * torch.randn(parameter.shape, generator=noise, dtype=torch.float64).to(parameter)
        )

    own = dict(objective.encoder.named_parameters())
    for name, average in objective.momentum_encoder.named_parameters():
        if own[name].requires_grad:
            add(own[name], 0.0 if name.startswith("head.") else 0.05)
            average.copy_(own[name])
            add(average, 0.02)


@contextmanager
def after_backward(trainer: Trainer, act: Callable[[], object]) -> Iterator[None]:
    """Within it, every step calls `act` between its backward and its pass over the gradients."""
    plain = trainer.train_step.forward_backward

    def with_act(*views: Tensor, **options: Any) -> Output:
        output = plain(*views, **options)
        act()
        return output

    trainer.train_step.forward_backward = with_act
    try:
        yield
    finally:
        trainer.train_step.forward_backward = plain


def images_of(config: Config, step: int, device: str, *, rows: int = IMAGES) -> Batch:
    """Two views of images with different large structures: features of plain noise are alike, and
    batch norms amplify rounding.
    """
    noise = torch.Generator().manual_seed(100 + step)
    scene, *changes = torch.randn(3, rows, 3, 4, 4, generator=noise)
    size = config.model.image_size
    views = [
        F.interpolate(scene + 0.5 * change, size=(size, size)).to(device) for change in changes
    ]
    ids = torch.arange(rows).numpy()
    return Batch(views=tuple(views), sample_ids=ids, step=step)


def clear_images(config: Config, exact: MoCoV3, device: str) -> Batch:
    """A batch without inputs near the kink of a ReLU, where rounding would
    change a gradient on one device only.

    Args:
        config: of the run.
        exact: its objective in float64, on the CPU.
        device: of the batch.
    """
    for step in range(64):
        batch = images_of(config, step, device)
        if _nearest_kink(exact, batch) > 1e-4:
            return batch
    raise AssertionError("64 batches, and in each some ReLU within 1e-4 of its kink")


@torch.no_grad()
def _nearest_kink(exact: MoCoV3, batch: Batch) -> float:
    """The smallest absolute input of any ReLU."""
    nearest: list[float] = []
    units = [part for part in exact.modules() if isinstance(part, nn.ReLU)]
    look = [
        unit.register_forward_pre_hook(lambda _, x: nearest.append(float(x[0].abs().min())))
        for unit in units
    ]
    plain_forward(copy.deepcopy(exact), *(view.cpu().double() for view in batch.views))
    for handle in look:
        handle.remove()
    return min(nearest)


def poisoned(batch: Batch) -> Batch:
    """The same batch with one pixel that is NaN."""
    view1 = batch.views[0].clone()
    view1[0, 0, 0, 0] = torch.nan
    return replace(batch, views=(view1, *batch.views[1:]))


def gradients_of(objective: MoCoV3) -> dict[str, Tensor]:
    """Copies in float64 on the CPU for comparisons."""
    named = (
        (name, parameter.grad)
        for name, parameter in objective.named_parameters()
        if parameter.requires_grad
    )
    return {
        name: gradient.detach().cpu().double() for name, gradient in named if gradient is not None
    }


def plain_step(objective: MoCoV3, batch: Batch, precision: str) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients by the plain forward, on a copy of the objective, on
    its device and in its dtype.
    """
    objective = copy.deepcopy(objective)
    place = objective.encoder.pos_embed
    view1, view2 = (view.to(place) for view in batch.views)
    with torch.autocast(place.device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
        loss = plain_forward(objective, view1, view2).loss
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.item(), gradients_of(objective)


def distance(ours: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """Norm of the difference of all tensors as one vector, relative to the
    norm of the reference.
    """
    assert ours.keys() == other.keys()
    pairs = [
        (ours[name].detach().cpu().double(), other[name].detach().cpu().double()) for name in ours
    ]
    apart = sum((a - b).square().sum() for a, b in pairs)
    whole = sum(b.square().sum() for _, b in pairs)
    return float(torch.as_tensor(apart / whole).sqrt())
