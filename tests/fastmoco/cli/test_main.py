"""The command line: what it prints, what it refuses, and with which exit code."""

from __future__ import annotations

import json

import pytest

from fastmoco.config.serial import from_json
from fastmoco.recipes import RECIPES, get_recipe
from tests.command_line import main


def test_help_names_every_verb(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for verb in (
        "train",
        "recipes",
        "print-config",
        "data pack",
        "data check",
        "data stats",
        "data views",
        "data sample",
        "run images",
        "eval knn",
        "eval embed",
        "eval neighbours",
        "eval outliers",
        "quickstart",
    ):
        assert f"fastmoco {verb}" in text
    assert main(["data"]) == 0
    assert "data pack" in capsys.readouterr().out


def test_the_help_describes_each_verb_in_whole_sentences(capsys):
    assert main(["--help"]) == 0
    lines = [
        line for line in capsys.readouterr().out.splitlines() if line.startswith("  fastmoco ")
    ]
    assert len(lines) == 19
    assert not [line for line in lines if not line.endswith(".")]


@pytest.mark.parametrize(
    ("args", "hint"),
    [(["trian"], "train"), (["data", "pakc"], "data pack"), (["eval", "kn"], "eval knn")],
)
def test_a_wrong_verb_gets_the_nearest(args, hint, capsys):
    assert main(args) == 2
    assert f"did you mean {hint}" in capsys.readouterr().err


def test_recipes_lists_them(capsys):
    assert main(["recipes"]) == 0
    listed = capsys.readouterr().out
    assert "vit_b16_e300_b4096" in listed
    assert len(listed.splitlines()) == len(RECIPES)
    assert not [line for line in listed.splitlines() if not line.endswith(".")]
    assert main(["train"]) == 2
    assert capsys.readouterr().out.endswith(listed)


def test_print_config_takes_overrides(capsys):
    assert (
        main(
            [
                "print-config",
                "vit_s16_e300_b1024",
                "--optim.lr",
                "3e-4",
                "--data.view2.blur-probability",
                "0.5",
            ]
        )
        == 0
    )
    config = json.loads(capsys.readouterr().out)
    assert config["optim"]["lr"] == 3e-4
    assert config["data"]["view2"]["blur_probability"] == 0.5
    assert config["data"]["view1"]["blur_probability"] == 1.0


@pytest.mark.parametrize("recipe", ["quickstart_digits", "vit_b16_e300_b4096"])
def test_print_config_without_overrides_prints_the_recipe(recipe, capsys):
    assert main(["print-config", recipe]) == 0
    assert from_json(json.loads(capsys.readouterr().out)) == get_recipe(recipe)


def test_an_image_size_carries_the_views_along(capsys):
    assert main(["print-config", "vit_s16_e300_b1024", "--model.image-size=112"]) == 0
    assert json.loads(capsys.readouterr().out)["data"]["view2"]["size"] == 112


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["--optim.lrr", "1"], "--optim.lr"),
        (["--optim.lr", "-1"], "must not be negative"),
        (["--model.image-size", "100"], "must be a multiple of patch_size=16"),
        (["--objective.temperature", "warm"], "temperature"),
        (["--epochs", "10"], "optim.warmup_epochs=40: must be at most epochs=10"),
        (["--global-batch-size", "1"], "global_batch_size=1"),
    ],
)
def test_wrong_overrides_are_refused_by_name(args, text, capsys):
    try:
        code = main(["print-config", "vit_s16_e300_b1024", *args])
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    assert code == 2
    assert text in captured.err + captured.out


def test_a_wrong_recipe_gets_the_nearest(capsys):
    assert main(["train", "vit_s16_e300_b409", "--out", "x"]) == 2
    assert "did you mean vit_s16_e300_b4096" in capsys.readouterr().err


def test_train_without_shards_says_how_to_name_them(tmp_path, capsys):
    assert main(["train", "quickstart_digits", "--out", str(tmp_path / "run")]) == 2
    assert "--data.shards" in capsys.readouterr().err


def test_eval_of_a_folder_without_checkpoints_is_refused(tmp_path, capsys):
    assert main(["eval", "knn", str(tmp_path), "--train", "a.tar", "--test", "b.tar"]) == 2
    assert "contains no checkpoint" in capsys.readouterr().err


def test_pack_of_a_missing_folder_is_refused_in_one_line(tmp_path, capsys):
    assert main(["data", "pack", str(tmp_path / "none"), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "none" in error
    assert len(error.strip().splitlines()) == 1


def test_an_interrupt_outside_training_is_one_line(monkeypatch, capsys):
    pytest.importorskip("tyro", reason="tyro is not installed")
    from fastmoco.cli import main as cli

    def interrupted(_name):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "get_recipe", interrupted)
    assert main(["print-config", "quickstart_digits"]) == 130
    assert capsys.readouterr().err == "fastmoco: interrupted\n"


def test_a_number_out_of_range_is_refused_in_one_line(tmp_path, capsys):
    assert main(["data", "stats", str(tmp_path), "--cache-size-gb", "-1"]) == 2
    assert capsys.readouterr().err == "fastmoco: cache_size_gb=-1.0: a size in GB is above 0\n"
