"""The command line: what it prints, what it refuses, and with which exit code."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

import fastmoco
from fastmoco.config.serial import from_json
from fastmoco.errors import RunError
from fastmoco.recipes import EXPECTED, RECIPES, get_recipe
from fastmoco_pipelines.processes import leave_current_folder
from tests.command_line import main


@pytest.mark.parametrize(
    ("args", "hint"),
    [
        (["trian"], "train?"),
        (["data", "pakc"], "data pack"),
        (["eval", "kn"], "eval knn"),
        (["pretrain"], "train?"),
        (["pack"], "data pack?"),
        (["data-stats", "x"], "data stats?"),
        (["consolidate"], "checkpoint consolidate?"),
        (["convert-checkpoint"], "export?"),
        (["help", "recipez"], "recipes?"),
        (["vit_s16_e300_b1024"], "train vit_s16_e300_b1024?"),
    ],
)
def test_a_wrong_verb_gets_the_nearest(args, hint, capsys):
    assert main(args) == 2
    assert f"did you mean {hint}" in capsys.readouterr().err


@pytest.fixture
def searched(tmp_path, monkeypatch):
    """`sys.path` as interpreters make it in a folder of somebody."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return str(tmp_path)


@pytest.mark.parametrize(
    ("argv", "words", "named", "first", "gone"),
    [
        (["-m"], ["python", "-m", "fastmoco"], "", 1, True),
        (["-m"], ["python", "-m", "fastmoco"], ":/x", 2, True),
        (["/bin/fastmoco"], ["python", "/bin/fastmoco"], "/x:", 1, True),
        (["/bin/fastmoco"], ["python", "/bin/fastmoco"], "./:/x", 1, True),
        (["/bin/fastmoco"], ["python", "/bin/fastmoco"], "{here}", 1, False),
        (["own.py"], ["python", "own.py"], ":/x", 1, False),
    ],
)
def test_modules_of_the_current_folder_do_not_run_in_the_command_itself(
    argv, words, named, first, gone, searched, monkeypatch
):
    rest = list(sys.path)
    sys.path[:0] = [searched] * first
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(sys, "orig_argv", words)
    monkeypatch.setenv("PYTHONPATH", named.format(here=searched))
    fastmoco._current_folder_last()
    if gone:
        assert sys.path == [*rest, searched]
        leave_current_folder()
        assert sys.path == rest
    else:
        assert sys.path == [searched, *rest]


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ("recipes", 0),
        ("--help", 0),
        ("data pack --help", 0),
        ("train --help", 0),
        ("checkpoint list r", 2),
        ("train quickstart_digits --out r", 2),
        ("eval knn r --train a --test b", 2),
    ],
)
def test_only_commands_of_ranks_follow_a_launcher(words, code, monkeypatch, tmp_path, capsys):
    def refuse():
        raise RunError("a stray variable")

    monkeypatch.chdir(tmp_path)
    pytest.importorskip("tyro", reason="tyro is not installed")
    from fastmoco.cli import main as main_module

    monkeypatch.setattr(main_module, "follow_launcher", refuse)
    assert main_module._main(words.split(), process_ends=True) == code
    follows = code == 2 and not words.startswith("checkpoint")
    assert ("a stray variable" in capsys.readouterr().err) == follows
    assert os.listdir() == []


def test_recipes_lists_them(capsys):
    assert main(["recipes"]) == 0
    listed = capsys.readouterr().out
    assert "vit_b16_e300_b4096" in listed
    assert len(listed.splitlines()) == len(RECIPES) + len(EXPECTED)
    assert "Linear top-1 76.7 % (official release); on 8 nodes, 64 V100 GPUs of 32 GB." in listed
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
                "--format",
                "json",
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
    assert main(["print-config", recipe, "--format", "json"]) == 0
    assert from_json(json.loads(capsys.readouterr().out)) == get_recipe(recipe)


def test_an_image_size_carries_the_views_along(capsys):
    words = ["--model.image-size=112", "--format=json"]
    assert main(["print-config", "vit_s16_e300_b1024", *words]) == 0
    assert json.loads(capsys.readouterr().out)["data"]["view2"]["size"] == 112


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["--optim.lrr", "1"], "--optim.lr"),
        (["--optim.lr", "-1"], "must not be negative"),
        (
            ["--model.image-size", "100"],
            "--model.image-size 100: must be a multiple of --model.patch-size 16",
        ),
        (["--objective.temperature", "warm"], "temperature"),
        (
            ["--epochs", "10"],
            "--optim.warmup-epochs 40 (of the recipe): must be at most --epochs 10",
        ),
        (["--global-batch-size", "1"], "--global-batch-size 1: "),
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


@pytest.mark.parametrize(
    ("word", "near"),
    [
        ("vit_s16_e300_b409", "vit_s16_e300_b4096"),
        ("vit_s", "vit_s16_e300_b4096"),
        ("ViT-S/16", "vit_s16_e300_b4096"),
        ("vit_base_16", "vit_b16_e300_b4096"),
        ("moco_v3_vit_s", "vit_s16_e300_b4096"),
        ("digits", "quickstart_digits"),
        ("byol", "byol_vit_s16_e300_b4096"),
    ],
)
def test_a_wrong_recipe_gets_the_nearest(word, near, capsys):
    assert main(["train", word, "--out", "x"]) == 2
    assert f"did you mean {near}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options", [["--epochs", "3"], ["--epochs=3"], ["--optim.betas", "0", "0"]]
)
def test_options_may_come_before_the_recipe(options, capsys):
    assert main(["print-config", *options, "quickstart_digits", "--seed", "4"]) == 0
    before = capsys.readouterr().out
    assert main(["print-config", "quickstart_digits", *options, "--seed", "4"]) == 0
    assert capsys.readouterr().out == before


def test_options_without_a_recipe_are_refused_in_one_line(capsys):
    assert main(["train", "--epochs", "3"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == (
        "fastmoco: name a recipe: fastmoco train RECIPE --epochs 3; `fastmoco recipes` lists them\n"
    )


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
    from fastmoco.cli import recipe_commands as cli

    def interrupted(_name):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "get_recipe", interrupted)
    assert main(["print-config", "quickstart_digits"]) == 130
    assert capsys.readouterr().err == "fastmoco: interrupted\n"


def test_after_an_interrupt_the_line_says_whether_the_command_continues(monkeypatch, capsys):
    pytest.importorskip("tyro", reason="tyro is not installed")
    from fastmoco.cli import delayed

    def interrupted(_text):
        raise KeyboardInterrupt

    monkeypatch.setattr(delayed, "say_first", interrupted)
    assert main(["eval", "knn", "run", "--train", "a.tar", "--test", "b.tar"]) == 130
    told = "fastmoco: interrupted; to continue: the same command again\n"
    assert capsys.readouterr().err == told


def test_a_number_out_of_range_is_refused_in_one_line(tmp_path, capsys):
    assert main(["data", "stats", str(tmp_path), "--cache-size-gb", "-1"]) == 2
    assert capsys.readouterr().err == "fastmoco: --cache-size-gb -1: a size in GB is above 0\n"


@pytest.mark.parametrize("buffering", [-1, 1, 64])
def test_a_reader_that_closes_its_pipe_is_no_error(buffering, monkeypatch, capsys):
    """As `| head`: the output fails when it is flushed at the end, with a line, or with a buffer that is full."""
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w", buffering) as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        assert main(["recipes"]) == 141
        print("more", flush=True)  # is dropped
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("buffering", [-1, 1])
@pytest.mark.parametrize("words", [["recipes"], ["--help"], ["--version"], ["train"]])
def test_output_that_cannot_be_written_is_one_line(words, buffering, monkeypatch, capsys):
    with open("/dev/full", "w", buffering) as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert main(words) == 1
        print("more", flush=True)  # is dropped
    said = capsys.readouterr().err
    assert said.startswith("fastmoco: standard output: No space left on device; free some space")
    assert said.count("\n") == 1


def test_files_do_not_take_the_numbers_of_closed_streams(tmp_path):
    """What a library prints would be written into them."""
    script = """
import os, sys
from fastmoco.errors.streams import open_closed_streams
open_closed_streams()
print("out"); print("err", file=sys.stderr); sys.stdin.read()
with open("file", "w") as file:
    os.write(1, b"of a library")
    file.write(f"{file.fileno() > 2} {os.get_inheritable(1)}")
"""
    command = [sys.executable, "-c", script]
    closed = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *command]
    assert subprocess.run(closed, cwd=tmp_path, timeout=120, check=False).returncode == 0
    assert (tmp_path / "file").read_text() == "True True"


def test_a_current_folder_that_is_gone_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tmp_path.rmdir()
    assert main(["checkpoint", "list", "."]) == 2
    assert "the current folder has been removed: cd to another one" in capsys.readouterr().err
    assert main(["--version"]) == 0
