"""`eval finetune`: it starts from the encoder of a run, continues, and reports accuracies."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import layer_norm

from fastmoco.config import Config
from fastmoco.distributed.mesh import World
from fastmoco.errors import EXIT_FINISHED, EXIT_STOPPED
from fastmoco.models.encoder_file import describe_run
from fastmoco.objectives.build import build_objective
from fastmoco.recipes import quickstart_digits
from fastmoco.recipes.mae import mae_digits
from fastmoco.recipes.supervised import FineTuning, SupervisedConfig, fine_tuning
from fastmoco.run.folder import RunFolder
from fastmoco.run.report.health import health_of
from fastmoco.run.report.reading import read_run
from fastmoco.training.encoder_source import EncoderSource, load_source
from fastmoco.training.initial_weights import start_from
from fastmoco.training.report_pictures import make_pictures
from fastmoco.training.source_model import model_config, prepare
from fastmoco.training.trainer import Trainer
from tests.command_line import main


def stopped(trainer: Trainer, max_steps: int | None = None, *, process_ends: bool = False) -> int:
    """Three steps and a save, as after a signal."""
    trainer._measure(force=True)
    while trainer.step_count < 3:
        trainer._one_step()
    trainer._save(force=True)
    return EXIT_STOPPED


def test_a_run_is_fine_tuned_and_continued(
    small_run: Config,
    digits: tuple[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    trainer = Trainer.build(replace(small_run, epochs=1), tmp_path / "run", World())
    assert trainer.run() == 0
    trainer.close()
    out = tmp_path / "tuned"
    command = ["eval", "finetune", str(tmp_path / "run"), "--train", digits[0], "--test", digits[1]]
    command += [
        "--out",
        str(out),
        "--epochs",
        "2",
        "--batch",
        "256",
        "--lr",
        "2e-3",
        "--mixup",
        "0",
        "--json",
    ]

    # Stopped after 3 of 10 steps, then continued by the same command.
    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "run", stopped)
        assert main(command) == EXIT_STOPPED
    assert not (out / "finetune.json").exists()
    capsys.readouterr()
    assert main(command) == EXIT_FINISHED
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((out / "finetune.json").read_text())
    assert [step for step, _ in RunFolder(out).read_metric("loss")][-1] == 10

    # It began with the encoder of the run, whose facts it reports.
    saved = RunFolder(out).read_config()
    assert saved["initial_weights"]["filled"] == ["encoder"]
    assert found["source"] == load_source(tmp_path / "run").facts
    assert (found["epoch"], found["images"], found["classes"]) == (2.0, 360, 10)
    top1 = dict(RunFolder(out).read_metric("top1"))
    assert found["top1"] == pytest.approx(top1[10], abs=1e-6)
    assert found["best"]["top1"] == pytest.approx(
        max(v for step, v in top1.items() if step), abs=1e-6
    )
    low, high = found["top1_interval"]
    assert low < found["top1"] < high
    settings = found["settings"]
    assert (settings["layer_decay"], settings["mixup"], settings["cutmix"]) == (0.65, 0.0, 1.0)
    assert (settings["drop_path"], settings["batch"], settings["lr"]) == (0.1, 256, 2e-3)

    # A report shows it as it shows a pre-training, on the test images.
    report = read_run(out)
    assert report.state == "finished"
    assert any("top1" in reason or "top-1" in reason for reason in health_of(report).reasons)
    assert "held-out images" in make_pictures(report).neighbours.note

    # The run there began with the base encoder.
    assert main([*command, "--which", "momentum"]) == 2
    assert "began with another encoder (encoder 'base' -> 'momentum')" in capsys.readouterr().err


def test_defaults_are_those_of_mae_and_of_the_encoder() -> None:
    vit, resnet = Config().model, replace(Config().model, architecture="resnet50")
    image = Config().eval_spec()

    def made(model: object, options: FineTuning, images: int = 10**6) -> Config:
        return fine_tuning(
            model,  # type: ignore[arg-type]
            image,
            options,
            train="a",
            test="b",
            images=images,
            before=None,
        )

    config = made(replace(vit, freeze_patch_embed=False), FineTuning())
    assert isinstance(config.objective, SupervisedConfig)
    assert (config.epochs, config.optim.warmup_epochs, config.global_batch_size) == (100, 5, 1024)
    assert (config.optim.lr, config.optim.weight_decay, config.optim.betas) == (
        5e-4,
        0.05,
        (0.9, 0.999),
    )
    assert (config.objective.layer_decay, config.objective.head_std) == (0.65, 2e-5)
    assert (config.model.drop_path, config.data.view1.crop_scale) == (0.1, (0.08, 1.0))
    assert (config.data.view2.copies, config.accuracy.test_shards, config.knn.every_epochs) == (
        0,
        "b",
        0,
    )
    assert made(vit, FineTuning(), images=1437).global_batch_size == 64
    assert made(vit, FineTuning(epochs=20)).optim.warmup_epochs == 1
    large = made(replace(vit, architecture="vit_large"), FineTuning())
    assert isinstance(large.objective, SupervisedConfig)
    assert (large.epochs, large.optim.warmup_epochs, large.optim.lr) == (50, 5, 1e-3)
    assert (large.objective.layer_decay, large.model.drop_path) == (0.75, 0.2)
    huge = made(replace(vit, architecture="vit_huge", patch_size=14), FineTuning())
    assert (huge.epochs, huge.optim.lr, huge.model.drop_path) == (50, 1e-3, 0.3)
    fused = replace(vit, blocks="fused")
    assert made(fused, FineTuning()).model.blocks == "modules"
    assert made(fused, FineTuning(drop_path=0.0)).model.blocks == "fused"
    of_resnet = made(resnet, FineTuning())
    assert isinstance(of_resnet.objective, SupervisedConfig)
    assert (of_resnet.objective.layer_decay, of_resnet.model.drop_path) == (1.0, 0.0)
    for name in ("drop_path", "layer_decay"):
        with pytest.raises(ValueError, match=rf"{name}=0\.1: needs the blocks of a ViT"):
            made(resnet, FineTuning(**{name: 0.1}))


def test_a_masked_encoder_is_fine_tuned_by_the_mean_of_its_patches(tmp_path: Path) -> None:
    """With a norm of its own in place of that of the tokens, unless an option says otherwise."""
    base = mae_digits()
    with torch.no_grad():
        encoder = build_objective(base, torch.device("cpu")).encoder
        encoder.norm.weight.fill_(3.0)
        encoder.norm.bias.fill_(2.0)

    def prepared(before: Config | None, **options: Any) -> Config:
        source = EncoderSource(
            encoder=encoder,
            image=base.eval_spec(),
            config=before,
            step=0,
            facts={"source": "run"},
            description=describe_run(base),
        )
        model, given = model_config(source), FineTuning(**options)
        sets = {"train": "a", "test": "b", "images": 640, "before": before}
        config = fine_tuning(model, source.image, given, **sets)
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        return prepare(source, replace(config, model=replace(config.model, drop_path=0.0)), out)

    config = prepared(base)
    assert config.model.pooling == "mean_norm"
    assert config.model.positions == "learned"
    tuned = build_objective(with_ten_classes(config), torch.device("cpu"))
    start_from(config, tuned, World())
    assert tuned.encoder.pos_embed.requires_grad
    assert torch.equal(tuned.encoder.pos_embed, encoder.pos_embed)
    images = torch.randn(3, 3, 8, 8)
    tokens = encoder.blocks[1](
        *encoder.blocks[0](encoder._all_tokens(encoder.patch_tokens(images)))
    )
    wanted = layer_norm(sum(tokens)[:, 1:].mean(dim=1), (encoder.embed_dim,), eps=1e-6)
    assert torch.allclose(tuned.encoder(images), wanted, atol=1e-5)

    # Of a file the method is not known; without a class token there is no choice.
    assert prepared(None).model.pooling == "class"
    assert prepared(None, pooling="mean_norm").model.pooling == "mean_norm"
    assert prepared(base, pooling="class").model.pooling == "class"
    pooled = replace(base.model, pooling="mean")
    with pytest.raises(ValueError, match="pooling='class': needs a ViT with a class token"):
        fine_tuning(
            pooled,
            base.eval_spec(),
            FineTuning(pooling="class"),
            train="a",
            test="b",
            images=640,
            before=None,
        )


def with_ten_classes(config: Config) -> Config:
    assert isinstance(config.objective, SupervisedConfig)
    return replace(config, objective=replace(config.objective, classes=10))


@pytest.mark.parametrize("of_run", [True, False])
def test_an_encoder_is_described_whole(of_run: bool) -> None:
    """Its pooling and norms, too; and nothing of its run that has no place in the new one."""
    base = quickstart_digits()
    own = replace(base.model, pooling="norm_mean", positions="learned", mlp_norm="batch")
    config = replace(base, model=replace(own, drop_path=0.2, init="somewhere"))
    source = EncoderSource(
        encoder=None,
        image=config.eval_spec(),
        config=config if of_run else None,
        step=0,
        facts={"source": "run"},
        description=describe_run(config),
    )
    found = model_config(source)
    wanted = replace(own, freeze_patch_embed=False)
    heads = {} if of_run else {"projection_dim": 256, "hidden_dim": 4096}
    assert found == replace(wanted, **heads)
    custom = replace(source, description=replace(source.description, architecture="custom"))
    with pytest.raises(ValueError, match="no architecture of fastmoco has the shape"):
        model_config(custom)
