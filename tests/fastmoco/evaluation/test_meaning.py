"""An accuracy that says nothing is not reported as one, and a weak one comes with a word."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastmoco.config import Config
from fastmoco.distributed.mesh import World
from fastmoco.evaluation.interface import Monitor, Unmeasurable
from fastmoco.evaluation.meaning import meaning
from fastmoco.evaluation.monitor import evenly
from fastmoco.run.folder import RunFolder
from fastmoco.training.trainer import Trainer
from fastmoco_pipelines import pack_folder
from tests.command_line import main

MANY = np.arange(400) % 4


@pytest.mark.parametrize(
    ("bank", "queries", "more", "words"),
    [
        (np.zeros(50), MANY, {}, "all 50 images of the bank have one class (cat)"),
        (MANY, np.full(200, 1), {}, "all 200 test images have one class (dog)"),
        (MANY[:12], MANY, {"k": 20}, "k=20, but the bank has 12 images: all of them vote"),
        (np.arange(400) % 2, MANY, {}, "200 of 400 test images (50%) have a class that the bank"),
        (MANY, MANY, {"shared": 400}, "400 of 400 test images (100%) are in the bank too"),
        (MANY, MANY[:1], {}, "1 test image: one is 100% of the accuracy"),
        (MANY, MANY[:12], {}, "12 test images: one is 8% of the accuracy"),
        (np.arange(40), np.arange(400) % 40, {}, "40 images of 40 classes, fewer than two"),
    ],
)
def test_what_a_reader_must_know(
    bank: np.ndarray, queries: np.ndarray, more: dict[str, int], words: str
) -> None:
    found = meaning(
        bank.astype(np.int64),
        queries.astype(np.int64),
        **{"k": 5, **more},
        classes=("cat", "dog", "bird", "fox"),
    )
    assert any(words in note for note in found.notes), found.notes
    assert found.says_nothing == ("every encoder" in " ".join(found.notes))


def test_a_sound_pair_of_sets_needs_no_word_and_chance_is_its_most_frequent_class() -> None:
    queries = np.array([0] * 150 + [1] * 50)
    found = meaning(MANY, queries, k=20)
    assert (found.notes, found.says_nothing, found.chance) == ((), False, 0.75)


def test_the_samples_of_a_limit_are_those_of_the_loader() -> None:
    assert evenly(10, 4).tolist() == [0, 2, 5, 7]
    assert evenly(3, 0).tolist() == evenly(3, 9).tolist() == [0, 1, 2]
    assert len(evenly(0, 5)) == 0


class Broken(Monitor):
    name = "knn"
    figures = {"knn": "kNN"}  # noqa: RUF012

    def evaluate(self, encoder: torch.nn.Module) -> dict[str, float]:
        raise Unmeasurable("queries: has no rows")


def test_a_figure_without_a_value_is_said_and_not_remembered() -> None:
    monitor, said = Broken(World(), every_epochs=1, max_share=0.1), []
    monitor.report = said.append
    monitor.best = {"knn": 0.5}
    assert np.isnan(monitor.measure(torch.nn.Identity(), 1.0, 7)["knn"])
    assert said == ["warning: kNN has no value at step 7: queries: has no rows"]
    json.dumps(monitor.state_dict(), allow_nan=False)
    assert monitor.best == {"knn": 0.5}

    # Postponed for its share of the time: said once.
    monitor._spent, monitor._started = 50.0, monitor._started - 100
    assert not any(monitor.is_due(epoch) for epoch in (2.0, 3.0, 4.0))
    assert len(said) == 2
    assert "it may take 10% of the time (knn.max_share)" in said[1]


def photos(folder: Path, classes: tuple[str, ...], *, count: int = 16, seed: int = 0) -> Path:
    draw = np.random.default_rng(seed)
    for number in range(count):
        path = folder / classes[number % len(classes)] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path)
    return folder


def test_one_class_trains_without_an_accuracy_and_the_command_reports_none(
    small_run: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pack_folder(photos(tmp_path / "one", ("x",)), tmp_path / "data")
    pack_folder(photos(tmp_path / "two", ("a", "b")), tmp_path / "data2")
    one, two = str(tmp_path / "data" / "*.tar"), str(tmp_path / "data2" / "*.tar")
    config = replace(
        small_run,
        epochs=1,
        global_batch_size=8,
        data=replace(small_run.data, shards=one),
        knn=replace(small_run.knn, every_epochs=1, test_shards=one),
    )
    trainer = Trainer.build(config, tmp_path / "run", World())
    try:
        assert trainer.run() == 0
    finally:
        trainer.close()
    text = capsys.readouterr().out
    assert "! warning: kNN: all 16 images of the bank have one class (x)" in text
    assert "step 0: kNN" not in text
    assert RunFolder(tmp_path / "run").read_metric("knn") == []

    # The command: no number for one class, and a word on images that find themselves.
    for shards, words, number in ((one, "every encoder", False), (two, "find themselves", True)):
        words_of = ["eval", "knn", str(tmp_path / "run"), "--train", shards, "--test", shards]
        words_of.append("--json")
        assert main(words_of) == 0
        out, error = capsys.readouterr()
        assert words in error
        assert (json.loads(out)["knn"] is not None) == number
