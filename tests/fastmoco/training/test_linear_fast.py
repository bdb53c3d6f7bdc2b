"""`eval linear --fast`: the result of plain steps on whole sets, also after a kill, and on two
processes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from torch import nn

from fastmoco.config.labelled import labelled_batch
from fastmoco.distributed import World
from fastmoco.evaluation import linear
from fastmoco.evaluation.confidence import wilson
from fastmoco.evaluation.embed import embed
from fastmoco.evaluation.linear import LinearSettings, Pair
from fastmoco.evaluation.reference import plain_linear
from fastmoco.models.encoder_file import describe_run
from fastmoco.recipes import quickstart_digits
from fastmoco.training import embed_run, linear_fast
from fastmoco.training.encoder_source import EncoderSource
from fastmoco.training.linear_fast import FastOptions, _named, _SavedState, fast_linear
from fastmoco.training.probe import probe_view
from fastmoco_pipelines import EvalLoaderSpec, build_eval_loader
from fastmoco_pipelines.loading.eval_loader import Augmented
from fastmoco_pipelines.spec import EvalSpec
from tests.distributed.launching import launch

IMAGE = EvalSpec(size=8, resize=8, mean=(0.3, 0.3, 0.3), std=(0.35, 0.35, 0.35))
LRS, DECAYS = (0.1, 1.0, 3.0), (0.0, 1e-3)


class Pixels(nn.Sequential):
    """Random functions of the pixels, always the same."""

    embed_dim = 32

    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(3 * 8 * 8, 32), nn.GELU())
        with torch.no_grad():
            draws = torch.Generator().manual_seed(0)
            self[1].weight.copy_(torch.randn(32, 3 * 8 * 8, generator=draws) / 14)
            self[1].bias.zero_()


def source() -> EncoderSource:
    encoder = Pixels()
    facts = {"source": "random", "step": 0}
    return EncoderSource(
        encoder=encoder,
        image=IMAGE,
        config=None,
        step=0,
        facts=facts,
        description=describe_run(quickstart_digits()),
    )


def options(cache: Path, **others: Any) -> FastOptions:
    small: dict[str, Any] = {
        "copies": 0,
        "batch_size": 128,
        "lrs": LRS,
        "weight_decays": DECAYS,
        "epochs": 4,
    }
    return FastOptions(cache=cache, **{**small, **others})


@contextmanager
def silent(what: str) -> Iterator[Callable[[int, int], None]]:
    yield lambda done, total: None


def measure(sets: Sequence[str], asked: FastOptions, world: World | None = None) -> dict[str, Any]:
    return fast_linear(source(), *sets, world or World(), asked, progress=silent)


@pytest.fixture(scope="module")
def found(digits, tmp_path_factory) -> tuple[dict[str, Any], Path]:
    """The result without interruption, and its cache."""
    cache = tmp_path_factory.mktemp("cache")
    return measure(digits, options(cache, copies=2)), cache


@pytest.mark.parametrize("protocol", ["moco_v3", "mae"])
def test_it_is_the_result_of_plain_steps(protocol, digits, tmp_path) -> None:
    result = measure(digits, options(tmp_path, protocol=protocol))
    whole = []
    for shards in digits:
        spec = EvalLoaderSpec(shards=shards, image=IMAGE, batch_size=256, threads=1)
        with build_eval_loader(spec) as loader:
            whole.append(embed(source().encoder, loader))
    (train, labels), (test, test_labels) = whole
    if protocol == "mae":
        variance, mean = torch.var_mean(train, dim=0)
        train, test = ((rows - mean) / (variance + 1e-6).sqrt() for rows in (train, test))
    settings = LinearSettings(epochs=4, batch_size=128)

    # The choice, on held-out training images.
    chosen = linear.held_out(labels, 0.1, 0)
    shares = {}
    for pair in (Pair(lr, decay) for lr in LRS for decay in DECAYS):
        layer = plain_linear(train[~chosen], labels[~chosen], 10, pair, settings)
        right = layer(train[chosen].double()).argmax(dim=1) == labels[chosen]
        shares[pair] = right.double().mean().item()
    for line in result["sweep"]:
        expected = shares[Pair(line["lr"], line["weight_decay"])]
        assert line["holdout_top1"] == pytest.approx(expected, abs=1.5 / 144)
    assert len(result["sweep"]) == len(shares) == 6
    best = Pair(result["best"]["lr"], result["best"]["weight_decay"])
    assert shares[best] >= max(shares.values()) - 1.5 / 144
    assert (result["lr"], result["weight_decay"]) == (3.0, 0.0)

    # The official pair and the best one on all training images.
    for reported, pair in ((result, Pair(3.0, 0.0)), (result["best"], best)):
        logits = plain_linear(train, labels, 10, pair, settings)(test.double())
        right = (logits.argmax(dim=1) == test_labels).sum().item()
        among = (logits.topk(5).indices == test_labels[:, None]).any(dim=1).sum().item()
        assert abs(reported["top1"] * 360 - right) < 1.5
        assert abs(reported["top5"] * 360 - among) < 1.5
        interval = wilson(round(reported["top1"] * 360), 360)
        assert reported["top1_interval"] == pytest.approx(interval, abs=1e-6)
    assert (result["images"], result["train_images"], result["classes"]) == (360, 1437, 10)
    assert 0.5 < result["top1"] < result["top5"] <= 1
    json.dumps(result)


def test_the_test_set_changes_no_choice(digits, found, tmp_path) -> None:
    result, cache = found
    told: list[str] = []
    other = fast_linear(
        source(),
        digits[0],
        digits[0],
        World(),
        options(cache, copies=2),
        progress=silent,
        tell=told.append,
    )
    (warning,) = told
    assert warning.startswith("warning: 1437 of 1437 test images (100%) are among the training")
    assert other["sweep"] == result["sweep"]
    assert [other["best"][name] for name in ("lr", "weight_decay", "holdout_top1")] == [
        result["best"][name] for name in ("lr", "weight_decay", "holdout_top1")
    ]
    assert other["images"] == 1437


def test_a_second_call_embeds_nothing_and_finds_the_same(digits, found, monkeypatch) -> None:
    result, cache = found
    monkeypatch.setattr(embed_run, "build_eval_loader", None)
    assert measure(digits, options(cache, copies=2)) == result
    assert not list(cache.glob("classifiers-*"))
    assert len(list(cache.iterdir())) == 4  # both sets and two copies


class Killed(BaseException):
    """As a signal, at a point that the test chooses."""


def test_it_continues_after_a_kill_in_both_stages(digits, found, tmp_path, monkeypatch) -> None:
    asked = options(tmp_path, copies=2)
    monkeypatch.setattr(linear_fast, "SAVE_SECONDS", 0.0)
    read: list[int] = []
    build = build_eval_loader

    def counted(*args: Any, **others: Any) -> Any:
        loader = build(*args, **others)
        plain = loader._show

        def show(encoded: Any, ids: np.ndarray[Any, Any]) -> torch.Tensor:
            if len(read) == 4 and not killed:
                killed.append(True)
                raise Killed
            read.append(int(ids[0]))
            return plain(encoded, ids)

        loader._show = show
        return loader

    # In the middle of the training set, whose parts have 256 images here.
    killed: list[bool] = []
    monkeypatch.setattr(embed_run, "build_eval_loader", counted)
    with pytest.raises(Killed):
        measure(digits, asked)
    parts = len(list(tmp_path.glob("*/part-*")))
    assert parts in (3, 4)

    # In the middle of the sweep.
    train = linear.train_linear

    def interrupted(*args: Any, after_epoch: Any, **others: Any) -> Any:
        def after(state: linear.LinearState) -> None:
            after_epoch(state)
            if state.epoch == 2:
                raise Killed

        return train(*args, after_epoch=after, **others)

    monkeypatch.setattr(linear, "train_linear", interrupted)
    read.clear()
    with pytest.raises(Killed):
        measure(digits, asked)
    assert len(read) == 3 * 6 + 2 - parts  # batches of three views of 1437 images, and of 360
    assert len(list(tmp_path.glob("classifiers-*"))) == 1

    # The third call reads no image, and begins at the third epoch.
    began: list[int] = []

    def seen(table: Any, pairs: Any, settings: Any, state: Any, **others: Any) -> Any:
        began.append(state.epoch)
        return train(table, pairs, settings, state, **others)

    monkeypatch.setattr(linear, "train_linear", seen)
    monkeypatch.setattr(embed_run, "build_eval_loader", None)
    assert measure(digits, asked) == found[0]
    assert began == [2, 0]


def test_two_processes_find_what_one_finds(digits, found, tmp_path) -> None:
    ranks = launch(2, tmp_path, *digits, module="tests.distributed.run_linear")
    assert ranks[0]["result"] == ranks[1]["result"]
    result = ranks[0]["result"]
    assert isinstance(result, dict)

    # Features are equal, whichever process made them; numbers of threads may differ.
    for path in found[1].glob("*/part-*"):
        other = tmp_path / "cache" / path.parent.name / path.name
        one, two = (load(file.read_bytes()[32:]) for file in (path, other))
        torch.testing.assert_close(one["features"], two["features"], atol=1e-6, rtol=0)
        assert torch.equal(one["samples"], two["samples"])
    assert all(0 < rank["batches"] < 20 for rank in ranks)

    # A pair that is trained beside others agrees to rounding.
    for one, other in zip(result["sweep"], found[0]["sweep"], strict=True):
        assert one["holdout_top1"] == pytest.approx(other["holdout_top1"], abs=1.5 / 144)
    assert abs(result["top1"] - found[0]["top1"]) < 4 / 360


def test_the_crops_of_photographs_are_the_protocols_and_of_small_images_the_runs(small_run) -> None:
    photograph = probe_view(EvalSpec(size=224, resize=256), small_run)
    assert (photograph.crop_scale, photograph.flip_probability) == ((0.08, 1.0), 0.5)
    assert photograph.jitter_probability == photograph.blur_probability == 0
    small = probe_view(IMAGE, small_run)
    assert (small.crop_scale, small.flip_probability) == ((0.5, 1.0), 0.0)
    assert (small.size, small.mean) == (8, IMAGE.mean)
    assert probe_view(IMAGE, small_run, 0.3).crop_scale == (0.3, 1.0)
    assert (small.interpolation, small.crop_misfit) == ("bilinear", "retry")
    of_mae = probe_view(EvalSpec(size=224, resize=256), small_run, protocol="mae")
    assert of_mae == replace(photograph, interpolation="bicubic", crop_misfit="clip")
    # Caches of features from before there was that choice keep their names.
    before, now = (_named(Augmented(view=v, seed=0, epoch=0))["view"] for v in (photograph, of_mae))
    assert "crop_misfit" not in before
    assert now["crop_misfit"] == "clip"


def test_one_class_is_refused(digits, tmp_path) -> None:
    from PIL import Image

    from fastmoco_pipelines import pack_folder

    (tmp_path / "images" / "only").mkdir(parents=True)
    for number in range(4):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / f"images/only/{number}.png")
    pattern = pack_folder(tmp_path / "images", tmp_path / "shards").pattern
    with pytest.raises(ValueError, match="all images have one class, so there is nothing to learn"):
        measure([pattern, pattern], options(tmp_path / "cache"))
    with pytest.raises(ValueError, match="classes that are not the"):
        measure([digits[0], pattern], options(tmp_path / "cache"))


@pytest.mark.parametrize(
    ("images", "batch"),
    [(10, 32), (1437, 64), (6000, 256), (16_383, 512), (16_384, 1024), (1_281_167, 1024)],
)
def test_the_batch_falls_with_the_set(images: int, batch: int) -> None:
    assert labelled_batch(images) == batch


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"epochs": 0}, "epochs=0: must be at least 1"),
        ({"copies": -1}, "copies=-1: must be at least 0"),
        ({"lrs": (-1.0,)}, "lr=.*at least 0"),
        ({"weight_decays": (float("nan"),)}, "weight_decay=.*at least 0"),
        ({"holdout": 1.0}, "holdout=1: a share"),
    ],
)
def test_options_are_checked_first(change: dict[str, Any], text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=text):
        replace(options(tmp_path), **change)


@pytest.mark.parametrize("what", ["pipe", "device", "huge", "other shapes", "no epoch", "text"])
def test_a_saved_state_of_other_classifiers_is_not_used(tmp_path: Path, what: str) -> None:
    path = tmp_path / "classifiers-0"
    names = ("weight", "bias", "weight_buffer", "bias_buffer")
    shapes = ((2, 3, 4), (2, 3)) * 2
    tensors = {name: torch.ones(shape) for name, shape in zip(names, shapes, strict=True)}
    start = linear.LinearState(**{name: 2 * tensor for name, tensor in tensors.items()})
    epoch = {"epoch": torch.tensor(5)}
    path.write_bytes(save({**tensors, **epoch}))
    assert _SavedState(path).read(start).epoch == 5
    path.unlink()
    if what == "pipe":
        os.mkfifo(path)
    elif what == "device":
        path.symlink_to("/dev/zero")
    elif what == "huge":
        path.touch()
        os.truncate(path, 1 << 40)
    elif what == "text":
        path.write_text("x" * 100)
    elif what == "no epoch":
        path.write_bytes(save(tensors))
    else:
        path.write_bytes(save({**tensors, **epoch, "bias": torch.zeros(2, 4)}))
    assert _SavedState(path).read(start) is start
