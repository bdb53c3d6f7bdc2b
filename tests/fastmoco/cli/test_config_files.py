"""A config file in place of a recipe, for every command that takes one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("tyro", reason="tyro is not installed")
pytest.importorskip("yaml", reason="PyYAML is not installed")

import yaml

from fastmoco.config.serial import from_json
from tests.command_line import main


def run(capsys, *words: str) -> tuple[int, str, str]:
    try:
        code = main(list(words))
    except SystemExit as stop:
        code = int(stop.code or 0)
    said = capsys.readouterr()
    return code, said.out, said.err


@pytest.mark.parametrize("how", ["yaml", "toml", "json"])
def test_what_is_printed_is_a_file_to_train_from(how, tmp_path: Path, capsys) -> None:
    words = ["print-config", "quickstart_digits", "--optim.lr", "1e-3", "--format", how]
    path = tmp_path / f"my.{how}"
    path.write_text(run(capsys, *words)[1])
    code, text, errors = run(capsys, "print-config", str(path), "--seed", "3", "--format", "json")
    assert (code, errors) == (0, "")
    config = from_json(json.loads(text))
    assert (config.optim.lr, config.seed, config.recipe) == (1e-3, 3, "quickstart_digits")


def test_yaml_has_the_help_of_each_field_unless_it_is_not_wanted(capsys) -> None:
    _, text, _ = run(capsys, "print-config", "quickstart_digits")
    assert "  # Base learning rate, to be scaled by `lr_scaling`.\n  lr: " in text
    _, bare, _ = run(capsys, "print-config", "quickstart_digits", "--no-comments")
    assert "#" not in bare
    assert yaml.safe_load(bare) == yaml.safe_load(text)


def test_an_option_overrides_the_file_and_the_views_follow(tmp_path: Path, capsys) -> None:
    path = tmp_path / "my.yaml"
    path.write_text("recipe: vit_s16_e300_b1024\noptim: {lr: 1e-3, warmup_epochs: 5}\nepochs: 50\n")
    words = ["--optim.lr", "3e-4", "--model.image-size", "112", "--format", "json"]
    _, text, _ = run(capsys, "print-config", str(path), *words)
    config = from_json(json.loads(text))
    assert (config.optim.lr, config.epochs, config.data.view1.size) == (3e-4, 50, 112)
    code, _, errors = run(capsys, "print-config", str(path), "--epochs", "3")
    assert code == 2
    assert errors == (
        f"fastmoco: --optim.warmup-epochs 5 (of {path}): must be at most --epochs 3\n"
    )


def test_each_command_of_a_recipe_takes_a_file(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my.yaml").write_text("recipe: quickstart_digits\nepochs: 77\n")
    for verb in ("train", "print-config", "plan", "profile", "tune"):
        code, text, _ = run(capsys, verb, "my.yaml", "--help")
        assert code == 0
        assert f"usage: fastmoco {verb} my.yaml" in text
        assert "(default 77)" in text
    Path("my.yaml").write_text("recipe: quickstart_digits\nepochs: 0\nbatch_size: 4\n")
    for verb in ("train", "print-config", "plan", "profile", "tune"):
        code, text, errors = run(capsys, verb, "my.yaml", "--out", "x")
        assert (code, text) == (2, "")
        assert errors == (
            "fastmoco: my.yaml:3: unknown key batch_size; did you mean global_batch_size?\n"
        )


def test_several_mistakes_are_a_line_each(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my.toml").write_text('epochs = "a"\n[optim]\nlearning_rate = 3\n')
    assert run(capsys, "train", "my.toml")[2].splitlines() == [
        "fastmoco: my.toml:1: epochs: got the text 'a', must be a number",
        "  my.toml:3: unknown key optim.learning_rate; did you mean optim.lr?",
    ]
    assert "none.yaml: No such file" in run(capsys, "train", "none.yaml")[2]
    code, _, errors = run(capsys, "train", "quickstart_digits", "--config", "a.yaml", "--out", "x")
    assert code == 2
    assert "unknown option --config; name the file in place of a recipe" in errors


def test_shards_of_a_file_that_do_not_exist_are_named_with_the_file(
    tmp_path: Path, capsys, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my.yaml").write_text("recipe: quickstart_digits\ndata: {shards: none.tar}\n")
    code, _, errors = run(capsys, "train", "my.yaml", "--out", "x")
    assert code == 2
    assert "--data.shards none.tar (of my.yaml): there is no file none.tar" in errors


def test_a_text_in_a_file_is_a_path_as_on_the_command_line(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my.yaml").write_text("recipe: quickstart_digits\ndata: {shards: $DATA/train}\n")
    assert "my.yaml:2: data.shards: '$DATA/train'" in run(capsys, "print-config", "my.yaml")[2]


def test_a_file_of_a_recipe_hides_secrets(tmp_path: Path, capsys) -> None:
    path = tmp_path / "my.yaml"
    path.write_text("recipe: quickstart_digits\ndata: {shards: 'https://me:word@host/a.tar?k=1'}")
    assert "word" not in run(capsys, "print-config", str(path))[1]
    path.write_text("recipe: quickstart_digits\nseed: https://me:word@host/a.tar?k=1")
    assert "word" not in run(capsys, "print-config", str(path))[2]
