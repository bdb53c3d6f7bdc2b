"""Runs on a folder of images: packed once beside the run, kept while it lasts."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastmoco.cli.train import train
from fastmoco.config import Config, DataConfig, KnnConfig
from fastmoco.config.serial import from_json, to_json
from fastmoco.run.folder import RunFolder

pytest.importorskip("webdataset", reason="webdataset is not installed")


def write_images(folder: Path, classes: str = "ab", count: int = 12, first: int = 0) -> Path:
    for label, name in enumerate(classes):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(first, first + count):
            levels = np.random.default_rng([label, i]).integers(0, 256, (9, 9, 3), dtype=np.uint8)
            Image.fromarray(levels).save(folder / name / f"{i:02d}.png")
    return folder


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return write_images(tmp_path / "photos")


@pytest.fixture
def config(small_run: Config, images: Path) -> Config:
    """One step of twenty images, ten of each class, per epoch."""
    return replace(
        small_run,
        epochs=1,
        global_batch_size=20,
        optim=replace(small_run.optim, warmup_epochs=0),
        data=replace(small_run.data, shards="", images=str(images)),
        knn=replace(small_run.knn, holdout="17%", every_epochs=1, k=1),
    )


def steps(out: Path, name: str = "loss") -> list[int]:
    return [step for step, _ in RunFolder(out).read_metric(name)]


def packed_sets(out: Path) -> list[Path]:
    return sorted((out.parent / "packed").iterdir())


def test_a_run_keeps_its_images_and_its_split(
    config: Config,
    images: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "runs" / "first"
    assert train(config, out) == 0
    (made,) = packed_sets(out)
    said = capsys.readouterr()
    assert f"packing 24 images of {images} " in said.err
    assert f" into {made}, once; longer sides are shrunk to 64 pixels" in said.err
    assert "packed 20 images and 4 held out for kNN" in said.err
    assert steps(out, "knn") == [0, 1]
    stored = from_json(json.loads((out / "config.json").read_text())["config"])
    assert stored.data.shards == str(made / "train-*.tar")
    assert stored.knn.test_shards == str(made / "test-*.tar")

    # The same command, on a changed folder, for one epoch more, without the share.
    write_images(images, count=2, first=12)
    longer = replace(config, epochs=2, knn=replace(config.knn, holdout=""))
    assert train(longer, out, allow=["epochs"]) == 0
    said = capsys.readouterr()
    assert "has changed since it was packed (24 images then, 28 now)" in said.err
    assert f"continues with the 20 images in {made}" in said.err
    assert "packing" not in said.err
    assert (steps(out), steps(out, "knn")) == ([1, 2], [0, 1, 2])

    # Finished: the curves have kNN, although the command names no held-out shards.
    (out / "curves.png").unlink()
    drawn: list[object] = []
    with monkeypatch.context() as patch:
        draw = "fastmoco.cli.train.draw_curves"
        patch.setattr(draw, lambda *given: drawn.append(given[-1].figures))
        assert train(longer, out) == 0
    assert drawn == [{"knn": "kNN"}]
    assert capsys.readouterr().err == ""

    # By its shards.
    data = replace(config.data, images="", shards=str(made / "train-*.tar"))
    by_shards = replace(config, epochs=3, data=data, knn=replace(config.knn, holdout=""))
    assert train(by_shards, out, allow=["epochs"]) == 0
    assert steps(out) == [1, 2, 3]

    # Another share is refused, with the field.
    other = replace(config, epochs=4, knn=replace(config.knn, holdout="0.3"))
    with pytest.raises(SystemExit, match="2"):
        train(other, out, allow=["epochs"])
    assert re.search(r"knn\.holdout='0\.3': this run began with .* 0\.17", capsys.readouterr().err)
    RunFolder(out).acquire()  # its lock was given back

    # A finished run opens nothing, and another run on the changed folder packs again.
    shutil.rmtree(made)
    assert train(replace(config, epochs=3), out) == 0
    assert packed_sets(out) == []
    assert "packing" not in capsys.readouterr().err
    assert train(replace(config, knn=replace(config.knn, holdout="")), out.with_name("second")) == 0
    assert len(packed_sets(out)) == 1


def test_a_folder_of_held_out_images(
    config: Config, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held_out = write_images(tmp_path / "held out", "b", count=3, first=20)
    shutil.copy(images / "b" / "00.png", held_out / "b" / "leaked.png")
    knn = replace(config.knn, holdout="", images=str(held_out))
    assert train(replace(config, knn=knn), tmp_path / "runs" / "first") == 0
    said = capsys.readouterr().err
    assert f"left out b/leaked.png: the same bytes as an image of {images.resolve()}" in said
    assert steps(tmp_path / "runs" / "first", "knn") == [0, 1]

    (held_out / "b").rename(held_out / "zebra")
    with pytest.raises(SystemExit, match="2"):
        train(replace(config, knn=knn), tmp_path / "runs" / "second")
    assert "has classes that the training images have not: zebra" in capsys.readouterr().err


def test_without_classes_a_run_trains_without_knn(
    config: Config, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in images.glob("*/*.png"):
        shutil.copy(path, flat / f"{path.parent.name}{path.name}")
    out = tmp_path / "runs" / "first"
    data = replace(config.data, images=str(flat))
    assert train(replace(config, data=data), out) == 0
    said = capsys.readouterr().err
    assert f"{flat} has no class folders, so kNN is not possible, and no image is held out" in said
    assert "packed 24 images," in said
    assert (steps(out), steps(out, "knn")) == ([1], [])


def test_a_refused_folder_is_named_by_its_field(
    config: Config, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "runs" / "first"
    (tmp_path / "empty").mkdir()
    empty = str(tmp_path / "empty")
    no_images = replace(config, data=replace(config.data, images=empty))
    no_held_out = replace(config, knn=replace(config.knn, holdout="", images=empty))
    zebras = str(write_images(tmp_path / "others", "z", count=2, first=20))
    no_class = replace(config, knn=replace(config.knn, holdout="", images=zebras))
    few = replace(config, global_batch_size=25)
    for wrong, words in (
        (no_images, f"fastmoco: data.images={empty!r}: "),
        (no_held_out, f"fastmoco: knn.images={empty!r}: "),
        (no_class, "has classes that the training images have not: z;"),
        (few, "global_batch_size=25: must be at most the 24 training images; --global"),
    ):
        with pytest.raises(SystemExit, match="2"):
            train(wrong, out)
        assert words in capsys.readouterr().err
    assert not out.parent.exists()  # nothing was packed
    assert train(config, out) == 0  # its lock was given back


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: DataConfig(images="a", shards="b"), r"^images='a': .*data\.shards='b'"),
        (lambda: KnnConfig(images="a", test_shards="b"), r"^images='a': .*knn\.test_shards"),
        (lambda: KnnConfig(holdout="10%", images="b"), r"^holdout='10%': .*knn\.images"),
        (lambda: KnnConfig(holdout="ten"), r"^holdout='ten': .*10% or 0\.1"),
        (lambda: KnnConfig(holdout="100%"), r"^holdout='100%'"),
        (lambda: KnnConfig(holdout="nan"), r"^holdout='nan'"),
        (lambda: Config(knn=KnnConfig(holdout="0.1")), r"knn\.holdout='0\.1': needs data\.images"),
        (lambda: DataConfig(max_side=-1), r"max_side=-1"),
    ],
)
def test_what_excludes_each_other_is_refused(make, words) -> None:
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize(
    ("text", "share"), [("10%", 0.1), ("0.1", 0.1), (" 7.5 %", 0.075), ("", 0)]
)
def test_a_share_is_a_number_or_a_percentage(text, share) -> None:
    assert KnnConfig(holdout=text).holdout_share == pytest.approx(share)


def test_a_config_with_a_folder_is_stored_and_read_back(config: Config) -> None:
    assert from_json(json.loads(json.dumps(to_json(config)))) == config
