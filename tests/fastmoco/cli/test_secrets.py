"""What is typed in a wrong place is shown without its secrets, by every command."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from fastmoco.cli.commands import COMMANDS
from tests.command_line import main

pytest.importorskip("tyro", reason="tyro is not installed")

URL = "https://user:SECRET@host/x?token=SECRET"
RECIPE = ["print-config", "quickstart_digits"]


@pytest.mark.parametrize(
    "words",
    [
        [*RECIPE, "--data.shrads", URL],
        [*RECIPE, f"--data.shrads={URL}"],
        [*RECIPE, URL],
        [*RECIPE, URL, "b"],
        [*RECIPE, "--epochs", URL],
        [*RECIPE, f"--epochs={URL}"],
        [*RECIPE, "--epochs", f"{URL}&a=b SECRET"],
        [*RECIPE, "--optim.betas", URL, URL],
        [*RECIPE, "--precision", URL],
        [*RECIPE, "--batch.chunk", URL],
        [*RECIPE, "--optim.final-weight-decay", URL],
        [*RECIPE, f"--data.synthetic={URL}"],
        [*RECIPE, "--data.no-synthetic", URL],
        [*RECIPE, "--data.images", URL, "--data.shards", URL],
        [*RECIPE, "--model.init", URL, "--knn.holdout", URL],
        [*RECIPE, f"--{URL}"],
        ["train", URL, "--out", "r"],
        ["train", "--data.shards", URL.replace("://", ":/"), "--out", "r"],
        ["train", "quickstart_digits", "--gpus", URL, "--allow", URL],
        ["plan", "quickstart_digits", "--memory", URL],
        ["plan", "quickstart_digits", "--chip", URL],
        ["tune", "quickstart_digits", "--budget", URL, "--bugdet", "3"],
        ["curves", URL],
        ["checkpoint", "list", URL],
        ["data", "index", URL],
        ["data", "sample", URL, URL],
        [URL],
        ["data", URL],
        ["help", URL],
    ],
)
def test_a_misplaced_url_is_shown_without_its_secrets(words, capsys):
    assert main(words) in (0, 2)
    printed = capsys.readouterr()
    assert "SECRET" not in printed.out + printed.err


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_hides_the_secrets_of_a_stray_word(name, capsys):
    recipe = ["quickstart_digits"] if COMMANDS[name].reads_words and name != "data views" else []
    if name == "recipes":  # ignores words
        return
    assert main([*name.split(), *recipe, "a", "b", "c", "--no-such-option", URL, URL]) == 2
    assert "SECRET" not in "".join(capsys.readouterr())


def test_a_process_that_fails_shows_a_traceback_without_secrets():
    """Also one of the interpreter itself, after the command has ended."""
    script = f"""
import sys
import fastmoco.cli.commands as commands
def fails(args):
    raise LookupError({URL!r} + chr(27))
commands.Command.call = property(lambda self: fails)
from fastmoco.cli.main import main
sys.argv = ["fastmoco", "recipes"]
main()
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 1
    assert done.stderr.endswith("LookupError: https://host/x\n")
    assert "SECRET" not in done.stderr
