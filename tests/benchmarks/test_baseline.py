"""The baseline: MoCo v3 by the golden numbers, and equal to fastmoco on the same images."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.baseline.data import batches, sample_count
from benchmarks.baseline.optim import LARS
from benchmarks.baseline.trainer import Baseline
from fastmoco.config import Config, DataConfig, KnnConfig, MoCoV3Config, ModelConfig, OptimConfig
from fastmoco.distributed.mesh import start_world
from fastmoco.models import vit
from fastmoco.training.trainer import Trainer
from fastmoco_pipelines import pack_folder
from fastmoco_pipelines.sets.shard_set import ShardSet
from fastmoco_pipelines.spec import moco_v3_views
from fastmoco_pipelines.views.draws import draw_views
from fastmoco_pipelines.views.reference import reference_view

GOLDEN = Path(__file__).parent.parent / "golden"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> str:
    """72 photographs of smooth noise, some wide and some tall, in several tars."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for number in range(72):
        coarse = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8))
        size = (64, 48) if number % 2 else (40, 72)
        coarse.resize(size, Image.Resampling.BICUBIC).save(folder / f"{number:03d}.jpg")
    report = pack_folder(folder, tmp_path_factory.mktemp("shards"), shard_samples=30)
    return report.pattern


def config_of(shards: str, **changed: object) -> Config:
    """A tiny ViT on views of 16 pixels, in the first epochs of a long run."""
    view1, view2 = moco_v3_views(16)
    config = Config(
        device="cpu",
        threads=1,
        epochs=40,
        global_batch_size=32,
        model=ModelConfig(
            architecture="vit_nano", image_size=16, patch_size=4, hidden_dim=64, projection_dim=256
        ),
        objective=MoCoV3Config(),
        optim=OptimConfig(lr=1e-3, warmup_epochs=10),
        data=DataConfig(shards=shards, view1=view1, view2=view2),
        knn=KnnConfig(every_epochs=0),
    )
    return replace(config, **changed)


def losses_of_both(config: Config, folder: Path, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Losses of fastmoco's trainer and of the baseline, each on its own loader's samples, and both
    on the views of the baseline."""
    trainer = Trainer.build(config, folder / "run", start_world("cpu"))
    try:
        baseline = Baseline(config, CPU, sample_count=sample_count(config))
        baseline.load_from(trainer.objective)
        ours, plain = [], []
        for _, (view1, view2, ids) in zip(range(steps), batches(config), strict=False):
            batch = trainer.loader.next()
            assert batch.sample_ids.tolist() == ids.tolist()
            ours.append(trainer.step(replace(batch, views=(view1, view2))).loss.item())
            plain.append(baseline.step(view1, view2).item())
    finally:
        trainer.close()
    return np.array(ours), np.array(plain)


# The bounds of 200 steps are 1e-9, 1e-5 and 1e-3. With few images the batch norms of new heads
# amplify the rounding of bf16, and two orders of the same sums differ by as much.
@pytest.mark.parametrize(("precision", "most"), [("fp64", 1e-11), ("fp32", 1e-5), ("bf16", 5e-3)])
def test_losses_equal_those_of_fastmoco(shards, tmp_path, precision, most):
    config = config_of(shards, precision=precision)
    ours, plain = losses_of_both(config, tmp_path, steps=12)
    assert np.abs(ours - plain).max() <= most
    assert np.ptp(ours) > 0.01  # other images and other weights in each step


def test_losses_equal_with_lars_explicit_attention_and_a_trained_stem(shards, tmp_path):
    config = config_of(shards, precision="fp64", optim=OptimConfig(name="lars", lr=0.5))
    config = replace(config, model=replace(config.model, freeze_patch_embed=False))
    ours, plain = losses_of_both(config, tmp_path, steps=5)
    assert np.abs(ours - plain).max() <= 1e-10
    assert np.ptp(ours) > 0.01


def test_golden_losses_are_repeated(monkeypatch):
    """Numbers that no code of this repository has made."""
    with np.load(GOLDEN / "trace.npz") as data:
        golden = dict(data)
    image, patch, width, depth, heads, _, dim = golden["cfg"].tolist()
    monkeypatch.setitem(vit.ARCHITECTURES, "vit_nano", vit.ViTArchitecture(width, depth, heads))
    count, pool, seed = (int(golden[name]) for name in ("batch", "pool", "seed"))
    view1, view2 = moco_v3_views(image)
    config = Config(
        precision="fp64",
        epochs=float(golden["epochs"]),
        global_batch_size=count,
        model=ModelConfig(
            architecture="vit_nano",
            image_size=image,
            patch_size=patch,
            hidden_dim=len(golden["init/predictor.0.weight"]),
            projection_dim=dim,
        ),
        objective=MoCoV3Config(temperature=float(golden["T"]), ema_momentum=float(golden["m0"])),
        optim=OptimConfig(
            lr=float(golden["base_lr"]),
            weight_decay=float(golden["weight_decay"]),
            warmup_epochs=float(golden["warmup_epochs"]),
        ),
        data=DataConfig(synthetic=True, view1=view1, view2=view2),
    )
    baseline = Baseline(
        config, CPU, attention="explicit", sample_count=count * int(golden["iters_per_epoch"])
    )
    with torch.no_grad():
        for name, parameter in baseline.model.named_parameters():
            stored = "init/" + name.replace("momentum_encoder.", "base_encoder.")
            stored = stored.replace("init/encoder.", "init/base_encoder.")
            if "pos_embed" not in name:
                parameter.copy_(torch.from_numpy(golden[stored]))

    def noise(*key: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(key=list(key)))

    base = noise(seed, 0).standard_normal((pool, 3, image, image))
    losses = []
    for step in range(20):
        g = noise(seed, 1 + step)
        rows = base[g.permutation(pool)[:count]]
        pair = [torch.from_numpy(rows + 0.5 * g.standard_normal(rows.shape)) for _ in range(2)]
        losses.append(baseline.step(*pair).item())
    assert np.abs(np.array(losses) - golden["loss"][:20]).max() < 1e-9
    assert baseline.learning_rate(19) == pytest.approx(golden["lr"][19])
    assert baseline.ema_momentum(19) == pytest.approx(golden["m"][19])


def test_golden_updates_of_lars_are_repeated():
    with np.load(GOLDEN / "lars.npz") as data:
        golden = dict(data)
    names = [str(name) for name in golden["names"]]
    parameters = [
        torch.nn.Parameter(torch.from_numpy(golden[f"init/{name}"]).double()) for name in names
    ]
    optimizer = LARS(
        parameters,
        lr=0.0,
        weight_decay=float(golden["weight_decay"]),
        momentum=float(golden["momentum"]),
        trust_coefficient=float(golden["trust_coefficient"]),
    )
    for step, lr in enumerate(golden["lr"].tolist()):
        optimizer.param_groups[0]["lr"] = lr
        for name, parameter in zip(names, parameters, strict=True):
            parameter.grad = torch.from_numpy(golden[f"grads/{name}"][step]).double()
        optimizer.step()
        for name, parameter in zip(names, parameters, strict=True):
            expected = golden[f"params_f64/{name}"][step]
            assert np.abs(parameter.detach().numpy() - expected).max() < 1e-12


def test_views_are_those_of_the_reference_and_workers_change_nothing(shards):
    config = config_of(shards)
    here, apart = batches(config), batches(config, workers=2)
    for _ in range(3):
        view1, view2, ids = next(here)
        for mine, theirs in zip((view1, view2, ids), next(apart), strict=True):
            assert torch.equal(mine, theirs)
    data = ShardSet.open(config.data.shards)
    images = [Image.open(path_or_file) for path_or_file in _files(data.read(ids.numpy()))]
    for number, (view, spec) in enumerate(zip((view1, view2), config.data.views, strict=True), 1):
        draws = draw_views(
            spec,
            seed=config.seed,
            epoch=1,  # of 72 images in batches of 32
            sample_ids=ids.numpy(),
            sizes=data.sizes_of(ids.numpy()),
            view=number,
        )
        truth = np.stack([reference_view(image, spec, draws, i) for i, image in enumerate(images)])
        levels = np.abs(view.numpy() - truth) * 255 * np.array(spec.std)[:, None, None]
        assert levels.mean() < 0.05  # Pillow 13 resizes tall windows in another order
        assert np.median(levels) < 1e-4


def _files(encoded):
    return [io.BytesIO(bytes(data)) for data in encoded]


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"model": ModelConfig(architecture="vit_conv_small")}, "vit_conv_small"),
        ({"objective": MoCoV3Config(predictor=False)}, "objective.predictor=False"),
        ({"optim": OptimConfig(name="sgd")}, "optim.name='sgd'"),
    ],
)
def test_what_the_baseline_is_not_is_refused_by_name(shards, changed, named):
    config = config_of(shards)
    config = Config(model=changed["model"]) if "model" in changed else replace(config, **changed)
    with pytest.raises(ValueError, match=named):
        Baseline(config, CPU)
