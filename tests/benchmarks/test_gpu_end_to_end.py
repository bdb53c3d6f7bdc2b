"""The stage that trains from JPEG shards: its photographs, its lines, and what it does where the
loader on the GPU fails."""

from __future__ import annotations

import json
import sys
import time

import numpy as np
import pytest
from PIL import Image

from benchmarks.gpu import carry, end_to_end, pictures
from benchmarks.outcome import FAILED, OK


def lines(capsys) -> dict[str, dict]:
    printed = capsys.readouterr().out.splitlines()
    found = [json.loads(text) for text in printed if text.startswith("{")]
    return {line["name"]: line for line in found}


@pytest.fixture
def archive(tmp_path):
    """Three photographs, black in the left two thirds and white in the rest, and a flat one."""
    src, out = tmp_path / "src", tmp_path / "carried"
    rng = np.random.default_rng(0)
    for name in "abc":
        (src / name / "images").mkdir(parents=True)
        photo = np.zeros((80, 120, 3), np.uint8)
        photo[:, 80:] = 255
        photo ^= rng.integers(0, 30, photo.shape, dtype=np.uint8)
        Image.fromarray(photo).save(src / name / "images" / "120x80.png")
        Image.new("RGB", (60, 40), "red").save(src / name / "images" / "60x40.jpg")
    (src / "flat").mkdir()
    Image.new("RGB", (200, 100), "blue").save(src / "flat" / "flat.jpg")
    (src / "empty").mkdir()
    assert carry.main(["--pictures", str(src), "--out", str(out)]) == 0
    return src, out / pictures.NAME


def test_images_for_testing_are_from_another_part_of_each_photograph(archive, tmp_path):
    src, file = archive
    assert pictures.make(src, file, most=3) == ["a", "b", "c"]  # the flat one is the smallest
    pictures.cut(file, tmp_path / "cut", (5, 3), processes=1)
    for split, count, dark in (("train", 2, True), ("test", 1, False)):
        for name in "abc":
            files = sorted((tmp_path / "cut" / split / name).iterdir())
            assert len(files) == count
            for path in files:
                with Image.open(path) as image:
                    assert image.size == pictures.IMAGE
                    assert (np.asarray(image).mean() < 40) == dark
    with pytest.raises(ValueError, match="no folder in it holds a photograph"):
        pictures.make(src / "empty", file)


@pytest.mark.parametrize(("loader", "calls"), [("gpu", 1), ("cpu", 0)])
def test_a_loader_that_fails_on_the_gpu_is_reported_and_the_cpu_tried(
    tmp_path, monkeypatch, capsys, loader, calls
):
    def broken(*_) -> None:
        raise RuntimeError("no decoder")

    again = []
    monkeypatch.setattr(end_to_end, "learn", broken)
    setting = end_to_end.Setting(
        dry=False, loader=loader, train="", test="", seconds=1, window_s=1, ends=time.monotonic()
    )
    assert end_to_end.run(setting, tmp_path, {}, again=lambda: again.append(loader)) == 1
    (line,) = lines(capsys).values()
    assert line["name"] == f"JPEG shards to kNN, loader on the {loader.upper()}"
    assert (line["status"], line["reason"]) == (FAILED, "RuntimeError: no decoder")
    assert len(again) == calls


@pytest.mark.slow
def test_a_dry_run_prints_every_figure(archive, monkeypatch, capsys):
    pytest.importorskip("webdataset", reason="webdataset is not installed")
    monkeypatch.setattr(end_to_end, "ARCHIVE", archive[1])
    monkeypatch.setattr(sys, "argv", ["end_to_end", "--dry-run"])
    assert end_to_end.main() == 0
    found = lines(capsys)
    assert {line["status"] for line in found.values()} == {OK}
    learnt = found.pop(end_to_end.NAME)
    assert learnt["images"] == [64, 16]
    assert learnt["photographs"]
    assert learnt["steps"] > end_to_end.STRIDE
    assert 0 <= learnt["wait_share"] <= 1
    assert set(found) == {end_to_end.RATIO.format(model) for model in end_to_end.GOALS}
    for line in found.values():
        rates = line["images_per_s"]
        assert line["ratio"] == pytest.approx(rates["jpeg"] / rates["synthetic"], abs=0.01)
