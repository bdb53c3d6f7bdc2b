"""Mistakes on the command line: what was typed is named, and what was meant."""

from __future__ import annotations

import pytest

from tests.command_line import main

pytest.importorskip("tyro", reason="tyro is not installed")


def refusal(capsys, *words):
    assert main(list(words)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert all(line.startswith("fastmoco: ") for line in lines)
    return [line.removeprefix("fastmoco: ") for line in lines]


MEANT = {
    "--learning-rate": "--optim.lr",
    "--lr": "--optim.lr",
    "--batch-size": "--global-batch-size",
    "--batch_size": "--global-batch-size",
    "--bs": "--global-batch-size",
    "--epoch": "--epochs",
    "--weight-decay": "--optim.weight-decay",
    "--wd": "--optim.weight-decay",
    "--warmup": "--optim.warmup-epochs",
    "--momentum": "--objective.ema-momentum",
    "--ema": "--objective.ema-momentum",
    "--moco-m": "--objective.ema-momentum",
    "--temperature": "--objective.temperature",
    "--tau": "--objective.temperature",
    "--workers": "--data.threads",
    "--num_workers": "--data.threads",
    "--data": "--data.shards",
    "--data-path": "--data.shards",
    "--dataset": "--data.shards",
    "--output": "--out",
    "--output-dir": "--out",
    "--save-dir": "--out",
    "-o": "--out",
    "--cuda": "--device",
    "--gpu": "--gpus",
    "--amp": "--precision",
    "--fp16": "--precision",
    "--arch": "--model.architecture",
    "--model": "--model.architecture",
    "--img-size": "--model.image-size",
    "--crop-min": "--data.view1.crop-scale",
    "--print-freq": "--log-every-steps",
    "--optim.learning-rate": "--optim.lr",
    "--view1.size": "--data.view1.size",
    "--optim.lrr": "--optim.lr",
    "--data.thraeds": "--data.threads",
    "--knn.neighbors": "--knn.k",
    "--optimizer": "--optim.name",
}


@pytest.mark.parametrize("word", MEANT)
def test_an_option_is_found_by_meaning_and_by_spelling(word, capsys):
    first = refusal(capsys, "train", "quickstart_digits", "--out", "x", word, "3")[0]
    assert first.startswith(f"unknown option {word}; did you mean ")
    assert MEANT[word] in first.partition("did you mean ")[2].rstrip("?").replace(
        " or ", ", "
    ).split(", ")


@pytest.mark.parametrize(
    ("word", "note"),
    [("--resume", "the same command again continues"), ("--wandb", "metrics.jsonl")],
)
def test_a_word_without_an_option_gets_what_to_do_instead(word, note, capsys):
    assert note in refusal(capsys, "train", "quickstart_digits", "--out", "x", word)[0]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["data", "pack", "a", "b", "--size", "3"], "did you mean --max-side"),
        (["data", "check", "a", "--num-workers", "3"], "did you mean --workers?"),
        (["data", "views", "a", "--crop-scale", "1"], "--view1.crop-scale or --view2.crop-scale"),
        (["eval", "knn", "run", "--test", "t", "--val", "x"], "did you mean --test?"),
    ],
)
def test_commands_without_a_recipe_do_the_same(words, line, capsys):
    assert line in refusal(capsys, *words)[0]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--epochs", "x"], "--epochs x: must be a number, e.g. --epochs 130"),
        (["--global_batch_size", "1e3"], "--global-batch-size 1e3: must be a whole number, e.g."),
        (["--epochs"], "--epochs needs a number, e.g. --epochs 130"),
        (["--epochs", "--seed", "3"], "--epochs needs a number, e.g. --epochs 130"),
        (["--optim.betas", "1"], "--optim.betas needs 2 numbers, e.g. --optim.betas 0.9 0.98"),
        (["--precision", "bf-16"], "must be one of auto, bf16, fp32, fp64; did you mean bf16?"),
        (["--data.synthetic", "True"], "it takes no value; give --data.synthetic or --data.no-"),
        (["-epochs", "3"], "-epochs: long options have two dashes, --epochs"),
        (["--data.shards", "a.tar", "b.tar"], "the shell has expanded a pattern; put it in quotes"),
        (["--optim.lr", "-1"], "--optim.lr -1: must not be negative"),
        (["--knn.k", "0"], "--knn.k 0: must be at least 1"),
        (["--batch.chunk=0"], "--batch.chunk 0: must be auto or none, or an integer"),
        (
            ["--data.view2.size", "16"],
            "--data.view2.size 16: both views must have the same size; "
            "--data.view1.size 8 (of the recipe)",
        ),
        (
            ["--model.image-size", "16", "--data.view1.size", "8"],
            "--data.view2.size 16 (follows --model.image-size): both views must have the same "
            "size; --data.view1.size 8",
        ),
        (
            ["--model.patch-size", "3"],
            "--model.image-size 8 (of the recipe): must be a multiple of --model.patch-size 3",
        ),
        (
            ["--model.image-size", "9"],
            "--model.image-size 9: must be a multiple of --model.patch-size 2 (of the recipe)",
        ),
        (
            ["--faults.rollback-spike", "9"],
            "--checkpoint.every-steps 0 (of the recipe): must be set",
        ),
        (["--optim.clip-tensor-norm", "inf"], "--optim.clip-tensor-norm inf: must be finite"),
        (["--optim.final-lr=inf", "--optim.schedule=cosine_inclusive"], "inf: must be finite"),
        (
            ["--model.mlp-norm", "batch", "--model.keep-tokens", "0.5"],
            "than evaluation has: use --model.mlp-norm layer",
        ),
    ],
)
def test_a_refused_value_is_named_as_it_was_typed(words, line, capsys):
    assert line in refusal(capsys, "print-config", "quickstart_digits", *words)[0]


def test_small_crops_of_a_recipe_without_them_name_those_that_have_them(capsys):
    word = "--data.more-views.0.copies"
    first = refusal(capsys, "train", "quickstart_digits", "--out", "x", word, "6")[0]
    assert first.startswith(f"unknown option {word}: this recipe has no small crops")
    known = refusal(
        capsys, "train", "swav_crops_digits", "--out", "x", "--data.more-views.1.size", "6"
    )
    assert "did you mean --data.more-views.0.size" in known[0]
    words = ("--data.more-views.0.copies", "-1")
    assert refusal(capsys, "print-config", "swav_crops_digits", *words)[0] == (
        "--data.more-views.0.copies -1: counts views; 0 leaves them out"
    )


def test_what_is_missing_is_named_with_its_meaning(capsys):
    assert refusal(capsys, "train", "quickstart_digits")[0] == (
        "--out is missing: Folder of the run: checkpoints, metrics.jsonl, config.json, curves.png."
    )
    assert refusal(capsys, "data", "pack", "a")[0] == "OUT is missing: Folder for the shards."


def test_all_mistakes_are_named_at_once(capsys):
    lines = refusal(capsys, "train", "quickstart_digits", "--lr", "3", "--bs", "8")
    assert [line.split(";")[0] for line in lines[:2]] == [
        "unknown option --lr",
        "unknown option --bs",
    ]
    assert lines[2].startswith("--out is missing")


def test_shards_of_two_options_are_told_apart():
    from fastmoco.cli.delayed import eval_knn
    from fastmoco.cli.mistakes import Wording
    from fastmoco.cli.options import describe

    words = ["run", "--train", "a/*.tar", "--test", "none/*.tar"]
    error = ValueError("shards='none/*.tar': there is no file none/*.tar")
    assert Wording(describe(eval_knn), words)(error) == (
        "--test none/*.tar: there is no file none/*.tar"
    )
