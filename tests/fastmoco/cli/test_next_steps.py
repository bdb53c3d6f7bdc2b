"""The commands that a run prints at its end can be pasted, whatever its folder is called."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from fastmoco.cli import next_steps
from fastmoco.config import Config
from fastmoco.recipes import get_recipe


def config(shards: str, test: str) -> Config:
    recipe = get_recipe("quickstart_digits")
    return replace(
        recipe,
        data=replace(recipe.data, shards=shards),
        knn=replace(recipe.knn, test_shards=test),
    )


@pytest.mark.parametrize(
    "name",
    [
        "plain",
        "with space",
        "it's [v1] {a,b} $HOME `x`",
        "-dash",
        "line\nbreak \x1b]0;x\x07",
        "\udce9",
    ],
)
def test_a_shell_reads_the_words_as_they_were(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(next_steps, "program", lambda: "printf '%s\\0'")
    given = config(f"{name}/train-*.tar", f"{name}/test-*.tar")
    lines = next_steps.after_finish(Path("runs") / name, given, best=True)
    said = [
        subprocess.run(
            ["bash", "-c", line.encode("utf-8", "surrogateescape")], capture_output=True, check=True
        )
        .stdout.decode("utf-8", "surrogateescape")
        .split("\0")[:-1]
        for line in lines
    ]
    run = f"runs/{name}"
    sets = ["--train", f"{name}/train-*.tar", "--test", f"{name}/test-*.tar"]
    out = f"{run}/encoder.safetensors"
    assert said == [
        ["eval", "knn", run, "--best", *sets],
        ["checkpoint", "consolidate", run, "--encoder", "--best", "--out", out],
        ["curves", run],
    ]
    assert all(line.isprintable() for line in lines)


def test_no_password_is_printed_and_a_set_that_is_not_there_is_not_invented() -> None:
    lines = next_steps.after_finish(
        Path("r"), config("https://me:secret@host/train.tar?sig=abc", ""), best=False
    )
    same = "--train https://host/train.tar --query https://host/train.tar"
    assert lines[0].endswith(f"eval neighbours r {same}")
    assert not any("secret" in line or "sig=" in line or "--best" in line for line in lines)
    synthetic = config("", "")
    synthetic = replace(synthetic, data=replace(synthetic.data, synthetic=True))
    assert not any(
        "eval" in line for line in next_steps.after_finish(Path("r"), synthetic, best=False)
    )
    stopped = next_steps.after_stop(["train", "x", "--data.shards=s3://a:b@c/d", "--out", "my run"])
    assert stopped.endswith("train x --data.shards=s3://c/d --out 'my run'")


def test_curves_are_named_only_where_they_can_be_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    given = config("a/train-*.tar", "a/test-*.tar")
    whole = next_steps.after_finish(Path("r"), given, best=False)
    assert whole[-1].endswith("curves r")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert next_steps.after_finish(Path("r"), given, best=False) == whole[:-1]
