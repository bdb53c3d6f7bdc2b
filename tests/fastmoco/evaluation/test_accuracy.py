"""Top-1 and top-5 during training, against an independent count; and which sets are refused."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from fastmoco.config import AccuracyConfig, Config
from fastmoco.distributed.mesh import World
from fastmoco.evaluation.accuracy import AccuracyMonitor, _counts
from fastmoco.evaluation.interface import Unmeasurable
from fastmoco.objectives.build import build_objective
from fastmoco.recipes.supervised import SupervisedConfig, one_view
from fastmoco.run.folder import RunFolder
from fastmoco.training import setup
from fastmoco.training.load_run import load_run
from fastmoco.training.trainer import Trainer
from fastmoco_pipelines import ShardError, build_eval_loader, pack_folder
from fastmoco_pipelines.spec import EvalLoaderSpec


@pytest.fixture
def config(small_run: Config, digits: tuple[str, str]) -> Config:
    return replace(
        small_run,
        epochs=2,
        objective=SupervisedConfig(classes=10),
        data=replace(one_view(small_run.data.view1), shards=digits[0]),
        knn=replace(small_run.knn, test_shards=digits[1]),
        accuracy=AccuracyConfig(max_share=1.0),
        checkpoint=replace(small_run.checkpoint, every_steps=0, every_minutes=1e6, keep=1),
    )


def monitor_of(config: Config) -> AccuracyMonitor:
    (found,) = setup.build_monitors(config, World(), threads=1, precision="fp32")
    assert isinstance(found, AccuracyMonitor)
    return found


def test_it_counts_what_the_model_says_and_leaves_no_trace(config: Config) -> None:
    objective = build_objective(config, torch.device("cpu"))
    before = copy.deepcopy(objective.state_dict())
    monitor = monitor_of(config)
    figures = monitor.evaluate(monitor.subject(objective))
    spec = EvalLoaderSpec(
        shards=config.knn.test_shards, image=config.eval_spec(), batch_size=360, threads=1
    )
    with build_eval_loader(spec) as loader:
        (batch,) = loader
    best = objective.encoder.head(objective.encoder(batch.images)).topk(5).indices
    found = best == torch.from_numpy(batch.labels)[:, None]
    assert figures == {"top1": found[:, 0].sum().item() / 360, "top5": found.sum().item() / 360}
    assert monitor.classified == monitor.images == 360
    assert objective.training
    assert objective.encoder.training
    assert all(torch.equal(value, before[name]) for name, value in objective.state_dict().items())

    # Of the digits the most frequent one, and the five most frequent.
    counts = torch.bincount(torch.from_numpy(batch.labels)).sort(descending=True).values
    assert monitor.chance == {
        "top1": counts[0].item() / 360,
        "top5": counts[:5].sum().item() / 360,
    }

    # A part of the set, spread over it; and logits without a value.
    few = monitor_of(replace(config, accuracy=AccuracyConfig(max_images=40)))
    few.evaluate(few.subject(objective))
    assert few.classified == few.images == 40
    with torch.no_grad():
        objective.encoder.head.bias[3] = torch.nan
    with pytest.raises(Unmeasurable, match="logits of 360 of 360 images are not finite"):
        monitor.evaluate(monitor.subject(objective))


def test_equal_logits_count_for_the_lower_class() -> None:
    logits = torch.tensor([[1.0, 1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0]])
    assert _counts(logits, torch.tensor([1, 5])).tolist() == [2, 0, 1, 0]
    assert _counts(logits, torch.tensor([0, 4])).tolist() == [2, 1, 2, 0]


def test_a_run_reports_it_and_keeps_its_best_checkpoint(config: Config, tmp_path: Path) -> None:
    """The number of classes comes from the set, and a continued run has it from its checkpoint."""
    trainer = Trainer.build(
        replace(config, objective=SupervisedConfig()), tmp_path / "run", World()
    )
    try:
        assert trainer.config.objective == SupervisedConfig(classes=10)
        assert trainer.run() == 0
    finally:
        trainer.close()
    top1 = dict(RunFolder(tmp_path / "run").read_metric("top1"))
    assert list(top1) == [0, 5, 10]
    best = max((5, 10), key=lambda step: top1[step])
    _, saved, checkpoint = load_run(tmp_path / "run", best=True)
    assert (checkpoint.step, saved.objective) == (best, SupervisedConfig(classes=10))
    assert checkpoint.state["score"]["name"] == "top1"
    again = Trainer.build(replace(config, objective=SupervisedConfig()), tmp_path / "run", World())
    again.close()
    assert again.step_count == 10


def test_sets_with_other_classes_or_without_labels_are_refused(
    config: Config, digits: tuple[str, str], tmp_path: Path
) -> None:
    for i in range(3):
        for folder in ("flat", "classes/cat", "classes/dog"):
            (tmp_path / folder).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (i * 40, 9, 9)).save(tmp_path / folder / f"{i}.png")
    flat = pack_folder(tmp_path / "flat", tmp_path / "a").pattern
    others = pack_folder(tmp_path / "classes", tmp_path / "b").pattern
    with pytest.raises(ShardError, match=r"3 of 3 images have no label.*one folder per class"):
        monitor_of(replace(config, accuracy=AccuracyConfig(test_shards=flat)))
    with pytest.raises(ValueError, match="other classes than the training set"):
        monitor_of(replace(config, accuracy=AccuracyConfig(test_shards=others)))

    # The training set itself.
    few = replace(config, global_batch_size=2, data=replace(config.data, shards=flat))
    with pytest.raises(ShardError, match="3 of 3 images have no label"):
        Trainer.build(few, tmp_path / "run", World())
    wrong = replace(config, objective=SupervisedConfig(classes=7))
    with pytest.raises(ShardError, match=r"has 10 classes.*--objective\.classes 10"):
        Trainer.build(wrong, tmp_path / "run", World())

    # A run that learns no classes.
    none = replace(config, objective=Config().objective)
    assert setup.build_monitors(none, World(), threads=1, precision="fp32") == []
    given = replace(none, accuracy=AccuracyConfig(test_shards=digits[1]))
    with pytest.raises(ValueError, match="moco_v3 learns no classes"):
        setup.build_monitors(given, World(), threads=1, precision="fp32")
