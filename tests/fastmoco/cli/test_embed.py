"""`fastmoco eval embed|neighbours|outliers`: on the encoder of a run, with names of files."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

pytest.importorskip("tyro", reason="tyro is not installed")

from benchmarks.ranks import held_port
from fastmoco.checkpoint import save_checkpoint
from fastmoco.cli.images import knn_sets
from fastmoco.config.serial import to_json
from fastmoco.evaluation.embed import embed
from fastmoco.models.encoder_file import ResNetDescription
from fastmoco.models.resnet import RESNETS
from fastmoco.objectives.build import build_objective
from fastmoco.training.encoder_source import load_source
from fastmoco_pipelines import ShardSet, build_eval_loader
from fastmoco_pipelines.spec import EvalLoaderSpec, EvalSpec
from tests.command_line import main
from tests.official_checkpoints import official_checkpoint


@pytest.fixture(scope="module")
def run(small_run, tmp_path_factory) -> Path:
    """The folder of a run that has one checkpoint, of an encoder that was not trained."""
    config = replace(small_run, precision="fp32")
    objective = build_objective(config, torch.device("cpu"))
    tensors = {f"model.{name}": tensor for name, tensor in objective.state_dict().items()}
    folder = tmp_path_factory.mktemp("run")
    state = {"config": to_json(config), "resolved": {}, "data": {}}
    save_checkpoint(folder / "checkpoints", step=3, tensors=tensors, state=state, keep=1)
    return folder


def test_embed_writes_the_features_of_the_encoder(run, small_run, digits, tmp_path, capsys):
    out = tmp_path / "x.npz"
    command = ["eval", "embed", str(run), "--shards", digits[1], "--out", str(out)]
    assert main(command) == 0
    assert capsys.readouterr().out.startswith("wrote features 360 x 64 of step 3, ")
    spec = EvalLoaderSpec(shards=digits[1], image=small_run.eval_spec(), batch_size=256)
    with build_eval_loader(spec) as loader, ShardSet.open(digits[1]) as shards:
        objective = build_objective(small_run, torch.device("cpu"))
        features, labels = embed(objective.encoder, loader)
        paths = shards.paths_of(np.arange(360))
    with np.load(out) as found:
        assert np.array_equal(found["features"], features.numpy())
        assert np.array_equal(found["labels"], labels.numpy())
        assert found["paths"].tolist() == paths
        assert all(path.startswith(f"{label}/") for path, label in zip(paths, labels, strict=True))
    assert main(command) == 2
    assert "exists; choose another file" in capsys.readouterr().err


def test_tokens_the_momentum_encoder_and_a_file(small_run, digits, tmp_path, capsys, monkeypatch):
    objective = build_objective(small_run, torch.device("cpu"))
    with torch.no_grad():
        for parameter in objective.momentum_encoder.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    config = replace(small_run, precision="fp32")
    tensors = {f"model.{name}": tensor for name, tensor in objective.state_dict().items()}
    state = {"config": to_json(config), "resolved": {}, "data": {}}
    two = tmp_path / "two"
    save_checkpoint(two / "checkpoints", step=3, tensors=tensors, state=state, keep=1)
    file = tmp_path / "encoder.safetensors"
    words = ["checkpoint", "consolidate", str(two), "--encoder", "--out", str(file)]
    assert main(words) == 0

    found = {}
    for name, source, options in (
        ("class", two, []),
        ("file", file, []),
        ("momentum", two, ["--which", "momentum"]),
        ("mean", two, ["--tokens", "mean"]),
        ("patch", two, ["--tokens", "patch", "--dtype", "float16"]),
    ):
        out = tmp_path / f"{name}.npz"
        limited = ["--shards", digits[1], "--limit", "5", "--out", str(out)]
        assert main(["eval", "embed", str(source), *limited, *options]) == 0
        with np.load(out) as archive:
            found[name] = torch.from_numpy(archive["features"])
    # A file has no precision: this machine chooses, perhaps bf16.
    torch.testing.assert_close(found["class"], found["file"], atol=0.05, rtol=0)
    assert found["patch"].shape == (5, 16, 64)
    assert found["patch"].dtype == torch.float16

    spec = EvalLoaderSpec(shards=digits[1], image=small_run.eval_spec(), batch_size=256, limit=5)
    with build_eval_loader(spec) as loader, torch.no_grad():
        images = next(iter(loader)).images
        momentum = objective.momentum_encoder.eval()
        torch.testing.assert_close(found["momentum"], momentum(images))
        encoder = objective.encoder.eval()
        torch.testing.assert_close(found["class"], encoder(images))
        tokens = encoder.token_features(images)
    torch.testing.assert_close(found["mean"], tokens.mean(1))
    torch.testing.assert_close(found["patch"], tokens.half())

    # kNN of the same encoders; what a file's features need meanwhile is in the user's cache.
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    accuracies = {}
    for name, source, options in (("base", two, []), ("momentum", two, ["--which", "momentum"])):
        words = ["--train", digits[0], "--test", digits[1], "--k", "5", *options]
        capsys.readouterr()
        assert main(["eval", "knn", str(source), *words, "--json"]) == 0
        line = json.loads(capsys.readouterr().out)
        assert line["source"]["encoder"] == name
        accuracies[name] = line["knn"]
    assert accuracies["base"] != accuracies["momentum"]
    assert main(["eval", "knn", str(file), *words[:6], "--json"]) == 0
    line = json.loads(capsys.readouterr().out)
    assert line["knn"] == pytest.approx(accuracies["base"], abs=0.03)
    assert line["source"]["header"]["architecture"] == "vit_nano"
    assert not list(tmp_path.glob("*.parts"))
    assert not (two / "features").exists()
    assert not (tmp_path / "cache" / "fastmoco" / "features").exists()


def test_a_resnet_has_no_patch_tokens(digits, tmp_path, capsys):
    size = RESNETS["resnet_nano"]
    image = EvalSpec(size=8, resize=8)
    description = ResNetDescription(architecture="resnet_nano", image=image)
    file = tmp_path / "encoder.safetensors"
    save_file(size(image_size=8).state_dict(), file, description.to_metadata())
    options = ["--shards", digits[1], "--limit", "5", "--out", str(tmp_path / "x.npz")]
    assert main(["eval", "embed", str(file), *options, "--tokens", "mean"]) == 2
    assert "is a ResNet, and only vision transformers have patch tokens" in capsys.readouterr().err
    assert main(["eval", "embed", str(file), *options]) == 0
    assert "wrote features 5 x 128 of step 0" in capsys.readouterr().out


def test_an_official_checkpoint(digits, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = tmp_path / "vit.pth.tar"
    torch.save(official_checkpoint("vit", width=64, depth=2), file)
    lines = {}
    for which in ("base", "momentum"):
        words = ["--train", digits[0], "--test", digits[1], "--heads", "4", "--which", which]
        assert main(["eval", "knn", str(file), *words, "--k", "2", "--json"]) == 0
        lines[which] = json.loads(capsys.readouterr().out)
        assert lines[which]["source"]["encoder"] == which
    assert lines["base"]["knn"] != lines["momentum"]["knn"]
    assert not list((tmp_path / "cache").rglob("part-*"))


PROGRAM = """
import json, os, signal, sys
from fastmoco.cli.main import main
from fastmoco.evaluation.feature_cache import FeatureCache
commands, kill_after = json.loads(sys.argv[1])
written, write = [], FeatureCache.write
def counted(self, number, part):
    write(self, number, part)
    written.append(number)
    if len(written) == kill_after:
        os.kill(os.getpid(), signal.SIGKILL)
FeatureCache.write = counted
for words in commands:
    assert main(words) == 0
    print("written", len(written), sorted(written))
    written.clear()
"""


def start(commands, folder, *, ranks=1, kill_after=0):
    """What each process that runs some commands printed, and how it ended."""
    with held_port() as port:
        names = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
        shared = os.environ | (names if ranks > 1 else {}) | {"OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", PROGRAM, json.dumps([commands, kill_after])]
        started = []
        for rank in range(ranks):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
            started.append(
                subprocess.Popen(command, env=shared | place, cwd=folder, stdout=subprocess.PIPE)
            )
        return [(one.communicate(timeout=300)[0].decode(), one.returncode) for one in started]


@pytest.mark.slow
def test_a_killed_command_continues_on_two_processes_with_equal_bytes(
    run, digits, tmp_path, capsys, monkeypatch
):
    sets = ["--train", digits[0], "--query", digits[1], "--k", "3"]

    def commands(folder):
        knn = ["--train", digits[0], "--test", digits[1], "--out", str(folder / "knn.json")]
        embedded = ["--shards", digits[0], "--out", str(folder / "x.safetensors")]
        picture = ["--out", str(folder / "x.png"), "--json"]
        return [
            ["eval", "embed", str(run), *embedded],
            [
                "eval",
                "knn",
                str(run),
                *knn,
                "--k",
                "5",
                "20",
                "--temperature",
                "0.07",
                "1",
                "--json",
            ],
            ["eval", "neighbours", str(run), *sets, *picture],
            ["eval", "outliers", str(run), "--shards", digits[1], "--json"],
        ]

    one, two = tmp_path / "one", tmp_path / "two"
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    printed = []
    for words in commands(one):
        assert main(words) == 0
        printed.append(capsys.readouterr().out)

    # Killed after 2 of 6 parts; two processes compute the other 4, then both sets of kNN.
    assert start(commands(two)[:1], tmp_path, kill_after=2)[0][1] == -signal.SIGKILL
    assert len(list(two.glob("x.safetensors.parts/*/part-*"))) == 2
    assert not (two / "x.safetensors").exists()
    ended = start(commands(two), tmp_path, ranks=2)
    assert [code for _, code in ended] == [0, 0]
    texts = [re.split(r"written \d+ (.*)\n", text) for text, _ in ended]
    parts = [[json.loads(part) for part in text[1::2]] for text in texts]
    assert parts == [
        [[2, 3], [0, 0, 1, 2], [0, 1, 2], [0]],
        [[4, 5], [1, 3, 4, 5], [0, 3, 4, 5], [1]],
    ]
    assert texts[1][0::2] == [""] * 5
    assert texts[0][0:8:2] == [text.replace(str(one), str(two)) for text in printed]
    for name in ("x.safetensors", "x.png", "knn.json"):
        assert (two / name).read_bytes() == (one / name).read_bytes()
    assert sorted(path.name for path in two.iterdir()) == ["knn.json", "x.png", "x.safetensors"]
    results = json.loads((two / "knn.json").read_text())["results"]
    assert [(found["k"], found["temperature"]) for found in results] == [
        (5, 0.07),
        (5, 1.0),
        (20, 0.07),
        (20, 1.0),
    ]
    assert all(low < found["knn"] < high for found in results for low, high in [found["interval"]])


def test_neighbours_and_outliers_name_files_and_draw_them(run, digits, tmp_path, capsys):
    both = ["--train", digits[1], "--query", digits[1], "--limit", "3", "--k", "2"]
    picture = tmp_path / "grid.png"
    assert main(["eval", "neighbours", str(run), *both, "--out", str(picture)]) == 0
    text = capsys.readouterr().out.splitlines()
    assert main(["eval", "neighbours", str(run), *both, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    lines = []
    for query in found["queries"]:
        lines.append(query["path"])
        lines += [f"  {one['cosine']:.4f}  {one['path']}" for one in query["neighbours"]]
        assert query["path"] not in [one["path"] for one in query["neighbours"]]
    assert text == [*lines, f"wrote {picture}"]
    assert found["step"] == 3
    assert found["queries"][0]["class"] == str(found["queries"][0]["label"])
    with Image.open(picture) as image:
        assert image.size == (3 * 118 + 18, 3 * (112 + 2 * 13 + 12) + 6)

    options = ["--shards", digits[1], "--show", "4", "--json"]
    assert main(["eval", "outliers", str(run), *options]) == 0
    outliers = json.loads(capsys.readouterr().out)["outliers"]
    assert len(outliers) == 4
    assert [one["similarity"] for one in outliers] == sorted(one["similarity"] for one in outliers)


def test_a_checkpoint_a_folder_of_images_and_the_best(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    photos, held_out = tmp_path / "photos", tmp_path / "held out"
    for folder, names in ((photos, ("bird", "cat")), (held_out, ("cat",))):
        for number, name in enumerate(names):
            (folder / name).mkdir(parents=True)
            Image.new("L", (9, 9), 40 * number).save(folder / name / "a b.png")
    step = run / "checkpoints" / "step_00000003"
    options = ["--train", str(photos), "--query", str(held_out), "--k", "1"]
    assert main(["eval", "neighbours", str(step), *options]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "cat/a b.png"

    # The labels of a bank, and the option that is wrong.
    bank, held = knn_sets(str(photos), str(held_out), max_side=64)
    with ShardSet.open(bank) as one, ShardSet.open(held) as other:
        assert one.classes == other.classes == ("bird", "cat")
    assert knn_sets(str(photos), str(photos), max_side=64) == (bank, bank)
    with pytest.raises(ValueError, match=r"test=.* has classes that train=.* has not: bird"):
        knn_sets(str(held_out), str(photos), max_side=64)
    for sets, words in (
        ((photos / "cat", photos), "^train=.* no class"),
        ((photos, ""), "^test='"),
    ):
        with pytest.raises(ValueError, match=words):
            knn_sets(*map(str, sets), max_side=64)
    options[3] = str(tmp_path / "nowhere")
    assert main(["eval", "neighbours", str(step), *options]) == 2
    assert f"--query {options[3]}: there is no file" in capsys.readouterr().err
    for folder, words in ((run, "no checkpoint was saved at the step of a kNN"), (step, "is one")):
        assert main(["eval", "outliers", str(folder), "--shards", str(photos), "--best"]) == 2
        assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["outliers", "--shards", "x", "--k", "0"], "--k 0: must be at least 1"),
        (
            ["embed", "--shards", "x", "--out", "x.csv"],
            "must end in .npz, .npy, .safetensors or .parquet",
        ),
        (["outliers", "--shards", "x"], "contains no checkpoint"),
    ],
    ids=str,
)
def test_wrong_commands_are_refused(tmp_path, capsys, options, words):
    assert main(["eval", options[0], str(tmp_path), *options[1:]]) == 2
    assert words in capsys.readouterr().err


def test_the_normalisation_of_a_file_can_be_given(run, digits, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = tmp_path / "vit.pth.tar"
    torch.save(official_checkpoint("vit", width=64, depth=1), file)
    more = ["--shards", digits[1], "--limit", "6"]
    base = ["eval", "embed", str(file), *more, "--heads", "4", "--which", "base"]
    found = {}
    for name, words in (("own", []), ("half", ["--mean", *["0.5"] * 3, "--std", *["0.5"] * 3])):
        assert main([*base, "--out", str(tmp_path / f"{name}.npz"), *words]) == 0
        found[name] = np.load(tmp_path / f"{name}.npz")["features"]
    assert found["own"].shape == found["half"].shape == (6, 64)
    assert not np.allclose(found["own"], found["half"])
    half = (0.5,) * 3
    source = load_source(file, which="base", heads=4, normalised=(half, half))
    assert (source.image.mean, source.image.std) == (half, half)

    # Both are needed, of three channels; a run has its own.
    capsys.readouterr()
    given = ["--mean", "1", "1", "1", "--std", "1", "1", "1"]
    for command, text in (
        ([*base, *given[:4]], "--std is missing: be three numbers above 0; give --mean and --std"),
        ([*base, *given[:4], "--std", "0", "1", "1"], "--std 0 1 1: must be three numbers above 0"),
        ([*base, "--mean", "1", *given[4:]], "--mean 1: must be three numbers; give --mean and"),
        (["eval", "embed", str(run), *more, *given], "leave out --mean and --std"),
    ):
        assert main([*command, "--out", str(tmp_path / "x.npz")]) == 2
        assert text in capsys.readouterr().err
