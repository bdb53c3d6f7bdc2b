"""The first output of a run comes before the slow imports, and a folder without a recipe gets the
command that fits it."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("tyro", reason="tyro is not installed")

from fastmoco.cli import data
from fastmoco.cli.opening import announce, suggestion
from fastmoco.errors import LAUNCHER
from fastmoco.recipes import get_recipe
from tests.command_line import main
from tests.fault_runs import environment

LOOK = """
import builtins, os, sys
said, real = [], builtins.__import__
def watched(name, *rest, **more):
    if name.partition(".")[0] in ("torch", "nvidia"):
        print(f"{name} is imported after {''.join(said)}", flush=True)
        os._exit(0)
    return real(name, *rest, **more)
class Stream:
    def write(self, text): said.append(text)
    def flush(self): pass
builtins.__import__, sys.stderr = watched, Stream()
from fastmoco.cli.main import main
main(sys.argv[1:])
"""


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            ["train", "quickstart_digits", "--data.shards", "a-*.tar", "--out", "x"],
            "quickstart_digits: importing torch, then opening a-*.tar",
        ),
        (
            ["train", "quickstart_digits", "--data.images", "photos", "--out", "x"],
            "quickstart_digits: importing torch, then opening photos",
        ),
        (
            ["eval", "knn", "run", "--train", "a.tar", "--test", "b.tar"],
            "kNN of run: importing torch, then opening a.tar and b.tar",
        ),
    ],
)
def test_a_line_is_printed_before_torch_is_imported(words, line) -> None:
    command = [sys.executable, "-c", LOOK, *words]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert "torch is imported after" in done.stdout, done
    assert line in done.stdout


@pytest.mark.parametrize(
    ("variables", "count"),
    [
        ({}, 1),
        ({"RANK": "0"}, 1),
        ({"RANK": "1"}, 0),
        ({"RANK": "first"}, 0),
        ({"SLURM_STEP_ID": "0", "SLURM_PROCID": "1"}, 0),
        ({"SLURM_PROCID": "1"}, 1),
        ({LAUNCHER: "reports", "RANK": "0"}, 0),
    ],
)
def test_one_of_all_processes_prints_it(variables, count, monkeypatch, capsys) -> None:
    for name in (LAUNCHER, "RANK", "SLURM_STEP_ID", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    config = get_recipe("quickstart_digits")
    secret = "https://user:secret@host/train-{000..001}.tar"
    config = replace(config, data=replace(config.data, shards=secret))
    announce(config)
    said = capsys.readouterr().err
    assert said.count("then opening") == count
    assert "secret" not in said


@pytest.fixture
def folder(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "my photos" / name).mkdir(parents=True)
        for i in range(15):
            Image.fromarray(np.full((40, 60, 3), i, np.uint8)).save(
                tmp_path / "my photos" / name / f"{i}.png"
            )
    return tmp_path / "my photos"


def test_a_folder_without_a_recipe_gets_its_command(folder, monkeypatch, capsys) -> None:
    monkeypatch.setattr(data, "visible_gpus", lambda: 0)
    assert main(["train", "--data.images", str(folder)]) == 2
    hint = capsys.readouterr().err.splitlines()[-1].removeprefix("fastmoco: name a recipe; ")
    assert hint == (
        f"for these images: fastmoco train vit_nano8_e60_b256 --data.images '{folder}' "
        "--knn.holdout 10% --global-batch-size 8 --out runs/first"
    )
    assert suggestion([f"--data.shards={folder}"]) == hint.partition(": ")[2]
    for words in ([], ["--data.images"], ["--data.images", "absent"], ["--data.shards", "absent"]):
        assert suggestion(words) is None


def test_packing_names_the_next_command(folder, tmp_path, monkeypatch, capsys) -> None:
    pytest.importorskip("webdataset", reason="webdataset is not installed")
    monkeypatch.setattr(data, "visible_gpus", lambda: 2)
    assert main(["data", "pack", str(folder), str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out.splitlines()
    (hint,) = [line for line in shown if line.startswith("next: ")]
    assert "train vit_nano8_e60_b256" in hint
    assert hint.endswith("--global-batch-size 8 --gpus 2 --out runs/first")
    words = ["--data.shards", f"{tmp_path / 'out'}/train-*.tar"]
    assert suggestion(words) == hint.removeprefix("next: ")
    assert main(["data", "pack", str(folder), str(tmp_path / "out"), "--prefix", "test"]) == 0
    assert "next: " not in capsys.readouterr().out


def test_a_folder_of_images_where_shards_are_asked_for(
    folder, tmp_path, monkeypatch, capsys
) -> None:
    pytest.importorskip("webdataset", reason="webdataset is not installed")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    kept = tmp_path / "cache" / "fastmoco" / "packed"

    def said(*words: str) -> str:
        assert main(["data", *words]) == 0
        return capsys.readouterr().err

    # Check and statistics are of the files as they are, and share a set.
    assert f"packing 30 images of {folder} " in (first := said("check", str(folder)))
    assert f"into {next(kept.iterdir())}, once\n" in first
    again = said("stats", str(folder))
    assert "packed before" in again
    assert "packing" not in again

    # Views are of shrunk images, as in training.
    picture = ["--recipe", "vit_nano8_e60_b256", "--out", str(tmp_path / "views.png")]
    assert "longer sides are shrunk to 96 pixels" in said("views", str(folder), *picture)
    assert len(list(kept.iterdir())) == 2

    (folder / "cat" / "0.png").unlink()
    assert "packing 29 images" in said("stats", str(folder))
