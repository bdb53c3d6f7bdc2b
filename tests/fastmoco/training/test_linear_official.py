"""`eval linear` by the official protocol: a run that equals plain steps of torch, on an encoder that
stays as it was."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from fastmoco.checkpoint import CheckpointError, find_checkpoint
from fastmoco.config import Config
from fastmoco.distributed import World
from fastmoco.evaluation import feature_cache
from fastmoco.evaluation.confidence import wilson
from fastmoco.evaluation.embed import embed
from fastmoco.optim.build import build_optimizer
from fastmoco.recipes.supervised import linear_probe
from fastmoco.training import probe, setup
from fastmoco.training.encoder_source import load_source
from fastmoco.training.linear_fast import probe_view
from fastmoco.training.linear_official import (
    PROTOCOLS,
    OfficialOptions,
    official_config,
    protocol_of,
    require_unchanged,
)
from fastmoco.training.source_model import log_every
from fastmoco.training.trainer import Trainer
from fastmoco_pipelines import EvalLoaderSpec, build_eval_loader
from fastmoco_pipelines.files import whole
from fastmoco_pipelines.spec import EvalSpec
from tests.command_line import main

Probe = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def run(small_run: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step; its two encoders differ."""
    folder = tmp_path_factory.mktemp("run")
    optim = replace(small_run.optim, warmup_epochs=0)
    trainer = Trainer.build(replace(small_run, epochs=0.2, optim=optim), folder, World())
    try:
        assert trainer.run() == 0
    finally:
        trainer.close()
    return folder


def words(run: Path, digits: tuple[str, str], *more: str) -> list[str]:
    return ["eval", "linear", str(run), "--train", digits[0], "--test", digits[1], *more]


def test_it_is_the_result_of_plain_steps(run, digits, tmp_path, capsys) -> None:
    out = tmp_path / "probe"
    asked = ["--epochs", "2", "--batch", "256", "--which", "momentum", "--out", str(out), "--json"]
    assert main(words(run, digits, *asked)) == 0
    result = json.loads(capsys.readouterr().out)
    assert result == json.loads((out / "linear.json").read_text())

    # Plain SGD on the views of the training loader.
    source = load_source(run, which="momentum")
    encoder: Any = source.encoder.eval()
    head = nn.Linear(encoder.embed_dim, 10)
    trained = find_checkpoint(out)
    options = OfficialOptions(epochs=2, batch_size=256)
    config = official_config(source, *digits, tmp_path / "other", options, recipe=linear_probe())
    torch.manual_seed(0)
    start = Trainer.build(
        replace(config, objective=replace(config.objective, classes=10)),
        tmp_path / "start",
        World(),
    )
    head.load_state_dict(
        {name: value.clone() for name, value in start.objective.encoder.head.state_dict().items()}
    )
    start.close()
    assert head.bias.abs().max() == 0
    assert head.weight.std().item() == pytest.approx(0.01, rel=0.1)
    optimizer = torch.optim.SGD(head.parameters(), lr=1.0, momentum=0.9)
    loader_config = replace(config, objective=replace(config.objective, classes=10))
    with setup.build_train_loader(loader_config, World(), threads=1) as loader:
        assert loader.steps_per_epoch == 5
        for step in range(10):
            batch = loader.next()
            epoch = step // 5
            optimizer.param_groups[0]["lr"] = 3.0 * 0.5 * (1 + math.cos(math.pi * epoch / 2))
            optimizer.zero_grad()
            with torch.no_grad():
                rows = encoder(batch.views[0])
            cross_entropy(head(rows), torch.from_numpy(batch.labels)).backward()
            optimizer.step()
    for name, value in head.state_dict().items():
        torch.testing.assert_close(
            trained.tensors[f"model.encoder.head.{name}"], value, atol=1e-4, rtol=0
        )

    # Accuracy of the last epoch.
    spec = EvalLoaderSpec(shards=digits[1], image=source.image, batch_size=256, threads=1)
    with build_eval_loader(spec) as test:
        features, labels = embed(encoder, test)
    right = int((head(features).argmax(dim=1) == labels).sum())
    assert abs(result["top1"] * 360 - right) < 1.5
    assert result["best"]["top1"] >= result["top1"]
    assert result["best"]["epoch"] in (1, 2)
    interval = wilson(round(result["top1"] * 360), 360)
    assert result["top1_interval"] == pytest.approx(interval, abs=1e-6)
    expected = {"protocol": "official", "encoder": "momentum", "images": 360, "classes": 10}
    expected |= {"train_images": 1437, "lr": 3.0, "weight_decay": 0.0, "step": 1}
    assert {name: result[name] for name in expected} == expected

    # Every tensor of the encoder is that of the run, and the command again trains nothing.
    require_unchanged(encoder, dict(trained.tensors), "the probe")
    capsys.readouterr()
    assert main(words(run, digits, *asked)) == 0
    assert json.loads(capsys.readouterr().out) == result

    # With another encoder the result is refused.
    other = load_source(run).encoder
    with pytest.raises(CheckpointError, match="tensors of the frozen encoder are not those"):
        require_unchanged(other, dict(trained.tensors), "the probe")
    assert main(words(run, digits, *[w for w in asked if w not in ("--which", "momentum")])) == 2
    assert "choose another --out" in capsys.readouterr().err

    # Other options are refused without advice that the command does not take, and the folder of
    # another run keeps its files.
    assert main(words(run, digits, *["3" if w == "2" else w for w in asked])) == 2
    told = capsys.readouterr().err
    assert "changed: epochs: 2 -> 3. Repeat the original command" in told
    assert "--allow" not in told
    assert main(words(run, digits, "--epochs", "2", "--out", str(run))) == 2
    told = capsys.readouterr().err
    assert "is the folder of another run: it has config.json and checkpoints; choose" in told
    assert not (run / "encoder.safetensors").exists()


def test_the_probe_of_moby_has_its_numbers(run, digits, tmp_path) -> None:
    options = OfficialOptions(protocol="moby")
    source = load_source(run)
    config = official_config(source, *digits, tmp_path / "moby", options, recipe=linear_probe())
    optim = config.optim
    assert (optim.lr, optim.warmup_epochs, optim.nesterov, config.epochs) == (0.5, 5, True, 100)
    assert config.objective.label_smoothing == 0.1
    assert build_optimizer(config, [("w", nn.Parameter(torch.ones(2)))], {}).param_groups[0][
        "nesterov"
    ]
    with pytest.raises(ValueError, match="nesterov=True: is a choice of sgd alone"):
        replace(optim, name="adamw")


def test_the_probe_of_mae_has_its_numbers(run, digits, tmp_path) -> None:
    options = OfficialOptions(protocol="mae")
    source = load_source(run)
    config = official_config(source, *digits, tmp_path / "mae", options, recipe=linear_probe())
    optim = config.optim
    assert (optim.name, optim.lr, optim.warmup_epochs, optim.weight_decay) == ("lars", 0.1, 10, 0)
    assert (optim.schedule, config.epochs, config.objective.feature_norm) == ("cosine", 90, True)
    options = OfficialOptions(protocol="mae", epochs=9)
    short = official_config(source, *digits, tmp_path / "short", options, recipe=linear_probe())
    assert short.optim.warmup_epochs == pytest.approx(1)
    assert (config.data.view1.interpolation, config.data.view1.crop_misfit) == ("bicubic", "clip")
    for architecture in ("vit_large", "vit_huge"):
        large = protocol_of("mae", architecture)
        assert (large.epochs, large.warmup_epochs, large.lr) == (50, 10, 0.1)
    assert tuple(PROTOCOLS) == probe.PROTOCOLS
    with pytest.raises(ValueError, match="protocol='mea': must be one of moco_v3, moby, mae"):
        probe.probe_view(EvalSpec(size=224), protocol="mea")
    assert protocol_of("moco_v3", "vit_large").epochs == 90
    trainer = Trainer.build(config, tmp_path / "mae", World())
    before = trainer.objective.encoder.head[0].running_mean.clone()
    trainer.step(trainer.loader.next())
    state = trainer.objective.encoder.state_dict()
    assert not torch.equal(state["head.0.running_mean"], before)
    require_unchanged(
        source.encoder, {f"model.encoder.{name}": value for name, value in state.items()}, "probe"
    )
    trainer.close()


@pytest.mark.parametrize(
    ("steps", "every"), [(5, 5), (22, 22), (97, 97), (101, 101), (150, 75), (1251, 9), (312, 78)]
)
def test_each_epoch_ends_with_a_logged_step(steps: int, every: int) -> None:
    assert log_every(steps) == every
    assert steps % every == 0


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ([], "--out is missing: the official protocol is a run of its own"),
        (["--out", "o", "--lr", "1", "2"], "several need --fast"),
        (["--out", "o", "--copies", "3"], "--copies 3: needs --fast"),
        (["--out", "o", "--precision", "bf16"], "needs --fast"),
        (["--fast", "--protocol", "moby"], "--protocol moby: leave out --fast"),
        (["--fast", "--heads", "3"], "has 4 attention heads; leave out --heads 3"),
        (["--out", "o", "--epochs", "0"], "--epochs 0: must be at least 1"),
        (["--fast", "--epochs", "0"], "--epochs 0: must be at least 1"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    more, text, run, digits, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        raise SystemExit(main(words(run, digits, *more)))
    assert ended.value.code == 2
    assert text in " ".join(capsys.readouterr().err.split())


def test_a_folder_of_features_needs_no_home(run, digits, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(whole, "user_cache", homeless)
    named = ["--cache", str(tmp_path / "features")]
    assert main(words(run, digits, "--fast", "--epochs", "0", *named)) == 2
    assert "--epochs 0: must be at least 1" in " ".join(capsys.readouterr().err.split())


def homeless() -> Path:
    raise OSError(errno.ENOENT, "this user has no home folder")


def test_features_make_room_when_the_result_is_out(run, digits, tmp_path, capfd, monkeypatch):
    """To remove them takes long, and the command may be ended meanwhile."""
    pytest.importorskip("tyro", reason="tyro is not installed")
    shown = []

    def ended(folder: Path) -> tuple[int, int]:
        shown.append((folder, capfd.readouterr().out))
        raise KeyboardInterrupt

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(feature_cache, "make_room", ended)
    monkeypatch.setattr("fastmoco.cli.linear._fast", lambda *_, **__: {"top1": 0.5})
    main(words(run, digits, "--fast", "--json"))
    main(words(run, digits, "--fast", "--json", "--cache", str(tmp_path / "named")))
    assert shown == [(tmp_path / "fastmoco" / "features", '{"top1": 0.5}\n')]


@pytest.mark.parametrize(("reason", "rooms"), [(errno.ENOSPC, 1), (errno.EACCES, 0)])
def test_features_make_room_at_a_full_disk(
    reason, rooms, run, digits, tmp_path, capsys, monkeypatch
):
    def fails(*_: object, **__: object) -> None:
        raise OSError(reason, os.strerror(reason), "part-000000.features")

    pytest.importorskip("tyro", reason="tyro is not installed")
    made = []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(feature_cache, "make_room", lambda folder: (made.append(folder) or 2, 3e9))
    monkeypatch.setattr("fastmoco.cli.linear._fast", fails)
    assert main(words(run, digits, "--fast")) == 2
    assert main(words(run, digits, "--fast", "--cache", str(tmp_path / "named"))) == 2
    assert made == [tmp_path / "fastmoco" / "features"] * rooms
    told = " ".join(capsys.readouterr().err.split())
    assert told.count(os.strerror(reason)) == 2
    assert told.count("2 caches of features, used longest ago, removed (3.0 GB)") == rooms


def test_the_views_of_a_photograph_are_those_of_the_protocol(small_run: Config) -> None:
    view = probe_view(EvalSpec(size=224, resize=256), small_run)
    assert (view.size, view.crop_scale, view.flip_probability) == (224, (0.08, 1.0), 0.5)
    drawn = (view.jitter_probability, view.grayscale_probability, view.blur_probability)
    assert (*drawn, view.solarize_probability) == (0, 0, 0, 0)
