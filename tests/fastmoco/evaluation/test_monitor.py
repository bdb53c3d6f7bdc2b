"""kNN while training: refused early, put off when it takes too long, without a trace in the model.

Its figure is compared with an independent one: images read by `tarfile` and Pillow, one forward an
image, votes in numpy.
"""

from __future__ import annotations

import copy
import glob
import io
import json
import tarfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from fastmoco.config import Config
from fastmoco.distributed.mesh import World
from fastmoco.evaluation import interface
from fastmoco.evaluation import monitor as knn_monitor
from fastmoco.evaluation.confidence import wilson
from fastmoco.evaluation.embed import LabelledRows
from fastmoco.evaluation.interface import Monitor, saved_states
from fastmoco.evaluation.monitor import KnnMonitor
from fastmoco.evaluation.rows import MemoryRows
from fastmoco.models import VisionTransformer
from fastmoco.models.precision import choose_precision
from fastmoco.objectives.build import build_objective
from fastmoco.run.curves import Panels, draw_curves
from fastmoco.run.folder import RunFolder
from fastmoco.training import setup
from fastmoco.training.load_run import load_run
from fastmoco.training.trainer import Trainer
from fastmoco_pipelines import ShardError
from fastmoco_pipelines.text import redact
from tests.command_line import main
from tests.pipelines.damage import damaged_copy

MEAN, STD = (0.6, 0.3, 0.5), (0.1, 0.6, 0.3)
"""A normalisation that no default has."""

LabelledImages = list[tuple[NDArray[np.uint8], int]]


@pytest.fixture
def config(small_run, digits):
    return replace(small_run, knn=replace(small_run.knn, every_epochs=1, test_shards=digits[1]))


def _monitor(config) -> KnnMonitor:
    world = World()
    precision = choose_precision(config.precision, world.device)
    monitor = setup.build_knn(config, world, threads=1, precision=precision)
    assert monitor is not None
    return monitor


def test_no_held_out_shards_no_monitor(small_run):
    assert setup.build_monitors(small_run, World(), threads=1, precision="fp32") == []


def test_measuring_leaves_no_trace_in_the_model(config):
    objective = build_objective(config, torch.device("cpu"))
    before, rng = copy.deepcopy(objective.state_dict()), torch.get_rng_state()
    monitor = _monitor(config)
    figures = dict(monitor.measure(objective.encoder, 2.0))
    assert 0.2 < figures["knn"] < 0.9
    assert (monitor.last, monitor.best, monitor.last_epoch) == (figures, figures, 2.0)
    assert objective.encoder.training
    assert all(torch.equal(value, before[name]) for name, value in objective.state_dict().items())
    assert torch.equal(torch.get_rng_state(), rng)
    assert monitor.measure(objective.encoder, 3.0) == figures


def test_due_by_epochs_and_within_its_share_of_the_time(config):
    monitor = _monitor(config)
    monitor._started -= 100.0
    assert not monitor.is_due(0.9)
    assert monitor.is_due(1.0)
    monitor._spent = 50.0
    assert not monitor.is_due(1.0)


def test_the_best_is_kept_and_the_time_of_a_measurement_counts(config, monkeypatch):
    monitor, accuracies = _monitor(config), iter([0.5, 0.75, 0.625])
    part = LabelledRows(MemoryRows(torch.ones(8, 2)), torch.arange(8))
    monkeypatch.setattr(KnnMonitor, "_embed", lambda *_: part)
    monkeypatch.setattr(knn_monitor, "shared_knn_accuracy", lambda *_, **__: next(accuracies))
    for epoch, best in ((1, 0.5), (2, 0.75), (3, 0.75)):
        monitor.measure(torch.nn.Identity(), epoch)
        assert monitor.best == {"knn": best}
    assert monitor.last == {"knn": 0.625}

    # Nearly all of this run was one measurement of 90 s: the next waits until that is a tenth of
    # it.
    clock = iter([1000.0, 1000.0, 1090.0, 1100.0, 2000.0])
    monkeypatch.setattr(interface, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(knn_monitor, "shared_knn_accuracy", lambda *_, **__: 0.5)
    monitor = _monitor(config)
    monitor.measure(torch.nn.Identity(), 1.0)
    assert not monitor.is_due(2.0)
    assert monitor.is_due(2.0)


def test_its_state_continues(config):
    one, two = _monitor(config), _monitor(config)
    one.last_epoch, one.last, one.best = 3.0, {"knn": 0.5}, {"knn": 0.6}
    two.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert (two.last_epoch, two.last, two.best) == (3.0, {"knn": 0.5}, {"knn": 0.6})


@pytest.mark.parametrize(
    ("last", "best", "found"),
    [(0.5, 0.6, ({"knn": 0.5}, {"knn": 0.6})), (None, None, ({}, {}))],
)
def test_the_state_of_when_knn_was_the_only_evaluation_is_read(config, last, best, found):
    old = {"knn": {"last_epoch": 3.0, "last": last, "best": best}}
    monitor = _monitor(config)
    monitor.load_state_dict(saved_states(old)["knn"])
    assert (monitor.last_epoch, monitor.last, monitor.best) == (3.0, *found)
    monitor.load_state_dict(saved_states({"knn": {}}).get("knn", {}))
    assert (monitor.last_epoch, monitor.last, monitor.best) == (0.0, {}, {})


def test_sets_that_cannot_vote_on_each_other_are_refused_at_once(config, tmp_path):
    from fastmoco_pipelines import pack_folder

    for i in range(3):
        for folder in ("flat", "classes/cat", "classes/dog"):
            (tmp_path / folder).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (i * 40, 9, 9)).save(tmp_path / folder / f"{i}.png")
    unlabelled = pack_folder(tmp_path / "flat", tmp_path / "a").pattern
    with pytest.raises(ValueError, match="without a label"):
        _monitor(replace(config, knn=replace(config.knn, test_shards=unlabelled)))
    others = pack_folder(tmp_path / "classes", tmp_path / "b").pattern
    with pytest.raises(ValueError, match="2 classes that are not the 10 classes"):
        _monitor(replace(config, knn=replace(config.knn, test_shards=others)))


@pytest.mark.parametrize("named", ["bank", "queries"])
def test_numbers_whose_names_are_known_on_one_side_alone_are_refused(config, tmp_path, named):
    from fastmoco_pipelines import pack_folder

    for i in range(3):
        for name in ("cat", "dog"):
            path = tmp_path / "src" / name / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (i * 40, 9, 9)).save(path)
    sets = [pack_folder(tmp_path / "src", tmp_path / place).pattern for place in ("a", "b")]
    knn = replace(config.knn, train_shards=sets[0], test_shards=sets[1])
    _monitor(replace(config, knn=knn)).close()
    bare = "b" if named == "bank" else "a"
    (tmp_path / bare / "manifest.json").unlink()
    with pytest.raises(ValueError, match=f"{bare}/train.*' has numbers as labels, without"):
        _monitor(replace(config, knn=knn))
    for place in ("a", "b"):
        (tmp_path / place / "manifest.json").unlink(missing_ok=True)
    _monitor(replace(config, knn=knn)).close()


@pytest.mark.parametrize(
    ("labels", "words"),
    [(-1, "https://h/b.tar' has images without"), (0, "https://h/t.tar' has 1 classes")],
)
def test_sets_are_refused_without_the_secrets_of_their_urls(labels, words, monkeypatch):
    def opened(pattern, *, cache):
        del cache
        return SimpleNamespace(
            unlabelled=int(labels < 0), classes=(redact(pattern),), close=lambda: None
        )

    monkeypatch.setattr(knn_monitor.ShardSet, "open", opened)
    with pytest.raises(ValueError, match=words) as raised:
        knn_monitor.open_comparable(
            "https://u:SECRET@h/b.tar", "https://u:SECRET@h/t.tar?SECRET", Config().data
        )
    assert "SECRET" not in str(raised.value)


def _read(pattern: str, limit: int = 0) -> LabelledImages:
    """Images and labels of a set, in its order, without any of the package's readers.

    With a limit only so many, spread evenly.
    """
    found: LabelledImages = []
    for path in sorted(glob.glob(pattern)):
        with tarfile.open(path) as tar:
            parts = {member.name: tar.extractfile(member).read() for member in tar}
        images = sorted(name for name in parts if name.endswith(".png"))
        labels = [int(parts[Path(name).with_suffix(".cls").name]) for name in images]
        pixels = [np.asarray(Image.open(io.BytesIO(parts[name])).convert("RGB")) for name in images]
        found += list(zip(pixels, labels, strict=True))
    return [found[i * len(found) // limit] for i in range(limit)] if limit else found


Features = tuple[NDArray[np.float64], NDArray[np.int64]]


def _features(
    encoder: VisionTransformer,
    images: LabelledImages,
    *,
    mean: tuple[float, ...] = MEAN,
    std: tuple[float, ...] = STD,
    training: bool = False,
) -> Features:
    """[n, E] unit class-token features and labels, by a copy of the encoder.

    One image at a time, every block on every token.
    """
    encoder, rows = copy.deepcopy(encoder).train(training), []
    for pixels, _ in images:
        scaled = ((pixels / 255 - np.array(mean)) / np.array(std)).transpose(2, 0, 1)[None]
        with torch.no_grad():
            tokens = encoder.patch_tokens(torch.from_numpy(scaled).to(encoder.cls_token.dtype))
            rows.append(encoder.encode_plain(tokens)[0].double().numpy())
    table = np.stack(rows)
    labels = np.array([label for _, label in images])
    return table / np.linalg.norm(table, axis=1, keepdims=True), labels


def _vote(bank: Features, queries: Features, *, k: int, temperature: float) -> float:
    """Share of the queries that a weighted vote of their k nearest classifies right."""
    (table, labels), (asked, wanted) = bank, queries
    right = 0
    for row, label in zip(asked @ table.T, wanted, strict=True):
        nearest = np.argsort(-row, kind="stable")[:k]
        votes = np.bincount(labels[nearest], weights=np.exp(row[nearest] / temperature))
        right += int(votes.argmax() == label)
    return right / len(wanted)


@pytest.fixture(scope="module")
def patterns(tmp_path_factory) -> tuple[str, str]:
    """Training and held-out shards of 32 x 32 pixels: five coarse patterns under strong noise."""
    pytest.importorskip("webdataset", reason="webdataset is not installed")
    from fastmoco_pipelines import pack_folder

    folder, draw = tmp_path_factory.mktemp("patterns"), np.random.default_rng(5)
    prototypes = draw.integers(0, 256, (5, 4, 4, 3))
    sets = []
    for name, count in (("train", 150), ("test", 90)):
        for i in range(count):
            path = folder / name / f"class{i % 5}" / f"{i:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            coarse = prototypes[i % 5] + draw.normal(0, 50, (4, 4, 3))
            levels = np.kron(coarse, np.ones((8, 8, 1))) + draw.normal(0, 20, (32, 32, 3))
            Image.fromarray(levels.clip(0, 255).astype(np.uint8)).save(path)
        sets.append(pack_folder(folder / name, folder / f"{name}-shards", shard_samples=40).pattern)
    return sets[0], sets[1]


def _conv_encoder() -> VisionTransformer:
    """Small, in float64, with features well apart, and running averages unlike these images'."""
    torch.manual_seed(4)
    encoder = VisionTransformer(
        image_size=32, patch_size=16, embed_dim=32, depth=2, num_heads=4, stem="conv"
    ).double()
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if name != "pos_embed":
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
        for name, buffer in encoder.named_buffers():
            if "running" in name:
                buffer.add_(torch.rand_like(buffer))
    return encoder


def _conv_config(config: Config, patterns: tuple[str, str], **knn: float | str) -> Config:
    """A float64 run on images of 32 x 32 pixels, normalised as no default says, with both
    limits."""
    pair = config.data.view1, config.data.view2
    views = [replace(view, size=32, mean=MEAN, std=STD) for view in pair]
    limits = {"max_train_images": 120, "max_test_images": 80} | knn
    return replace(
        config,
        precision="fp64",
        model=replace(config.model, image_size=32),
        data=replace(config.data, shards=patterns[0], view1=views[0], view2=views[1]),
        knn=replace(config.knn, every_epochs=1, test_shards=patterns[1], **limits),
    )


def test_the_figure_equals_an_independent_one(small_run, patterns):
    encoder = _conv_encoder()
    sets = [_read(patterns[0], limit=120), _read(patterns[1], limit=80)]
    bank, queries = (_features(encoder, images) for images in sets)
    whole = [_features(encoder, _read(pattern)) for pattern in patterns[:2]]
    shown_otherwise = {
        name: [_features(encoder, images, **how) for images in sets]
        for name, how in {
            "training mode": {"training": True},
            "default mean": {"mean": (0.485, 0.456, 0.406)},
            "default deviation": {"std": (0.229, 0.224, 0.225)},
        }.items()
    }

    # Each case differs from the defaults, 20 and 0.07, in one number.
    for right in ({"k": 3, "temperature": 0.07}, {"k": 20, "temperature": 0.02}):
        expected = _vote(bank, queries, **right)
        monitor = _monitor(_conv_config(small_run, patterns, **right))
        assert monitor.measure(encoder, 1.0)["knn"] == pytest.approx(expected, abs=1e-12)

        # What this can tell apart: each mistake would move the figure by two images or more.
        mistakes = {
            "bank from the test set": _vote(queries, queries, **right),
            "sets exchanged": _vote(queries, bank, **right),
            "default k and temperature": _vote(bank, queries, k=20, temperature=0.07),
            "first images only": _vote((whole[0][0][:120], whole[0][1][:120]), queries, **right),
            "no limits": _vote(*whole, **right),
            **{name: _vote(*shown, **right) for name, shown in shown_otherwise.items()},
        }
        near = [name for name, value in mistakes.items() if abs(value - expected) < 1.5 / 80]
        assert near == []


def test_a_measurement_writes_no_batch_norm_buffer(small_run, patterns):
    encoder = _conv_encoder()
    encoder.blocks[0].eval()  # a part that differs from the whole
    modes, before = (
        [part.training for part in encoder.modules()],
        copy.deepcopy(encoder.state_dict()),
    )
    _monitor(_conv_config(small_run, patterns)).measure(encoder, 1.0)
    assert any("running" in name for name in before)
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    assert [part.training for part in encoder.modules()] == modes


def test_other_shards_may_vote(small_run, patterns):
    config = _conv_config(small_run, patterns, train_shards=patterns[1], k=1)
    others = replace(config, knn=replace(config.knn, max_train_images=0))
    assert _monitor(others).measure(_conv_encoder(), 1.0) == {"knn": 1.0}  # each image finds itself


def test_bad_images_are_told_listed_and_counted(small_run, patterns, tmp_path):
    """The monitor's sets obey the run's rules for bad images."""
    folder = damaged_copy(Path(patterns[1]).parent, tmp_path / "bad", {3: "garbage", 40: "empty"})
    config = _conv_config(small_run, (patterns[0], str(folder)), max_test_images=0)
    told, quarantined = [], tmp_path / "quarantine.jsonl"
    monitor = KnnMonitor(
        config, World(), threads=1, device="cpu", precision="fp64", quarantine_list=quarantined
    )
    monitor.report = told.append

    # The vote of the others, as if the two had never been there.
    encoder = _conv_encoder()
    good = [image for i, image in enumerate(_read(patterns[1])) if i not in (3, 40)]
    sets = _features(encoder, _read(patterns[0], limit=120)), _features(encoder, good)
    numbers = {"k": config.knn.k, "temperature": config.knn.temperature}
    expected = _vote(*sets, **numbers)
    assert monitor.measure(encoder, 1.0)["knn"] == pytest.approx(expected, abs=1e-12)
    assert len(told) == 2
    assert len(quarantined.read_text().splitlines()) == 2

    strict = replace(config, data=replace(config.data, max_bad_share=0.0))
    with pytest.raises(ShardError, match="0 are allowed"):
        _monitor(strict).measure(encoder, 1.0)


def _train(config: Config, out: Path) -> None:
    trainer = Trainer.build(config, out, World())
    try:
        assert trainer.run() == 0
    finally:
        trainer.close()


def _eval_knn(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, object]:
    """The line that `fastmoco eval knn` prints."""
    capsys.readouterr()
    assert main(["eval", "knn", *words, "--json"]) == 0
    line: dict[str, object] = json.loads(capsys.readouterr().out)
    return line


def test_eval_knn_and_the_metrics_of_the_run_equal_a_plain_evaluation(
    small_run, digits, tmp_path, capsys
):
    limits = {"k": 5, "temperature": 0.3, "max_train_images": 400, "max_test_images": 200}
    knn = replace(small_run.knn, every_epochs=100, test_shards=digits[1], **limits)
    _train(replace(small_run, epochs=2, precision="fp32", knn=knn), tmp_path)
    objective, saved, checkpoint = load_run(tmp_path)
    assert checkpoint.step == 10
    normalisation = {"mean": saved.data.view1.mean, "std": saved.data.view1.std}

    bank = _features(objective.encoder, _read(digits[0]), **normalisation)
    queries = _features(objective.encoder, _read(digits[1]), **normalisation)

    # While training: the run's own numbers and limits. In float32 sums of another order may turn
    # a vote that is nearly even: one image is allowed for.
    measured = dict(RunFolder(tmp_path).read_metric("knn"))
    assert list(measured) == [0, 10]
    limited = []
    for (rows, labels), count in ((bank, 400), (queries, 200)):
        evenly = np.arange(count) * len(labels) // count
        limited.append((rows[evenly], labels[evenly]))
    assert measured[10] == pytest.approx(_vote(*limited, k=5, temperature=0.3), abs=1.5 / 200)
    assert checkpoint.state["monitors"]["knn"]["last"]["knn"] == measured[10]

    # The command: its own numbers, its own defaults, and every image.
    for k, temperature, words in (
        (20, 0.07, []),
        (1, 0.07, ["--k", "1"]),
        (300, 0.01, ["--k", "300", "--temperature", "0.01"]),
    ):
        line = _eval_knn(capsys, str(tmp_path), "--train", digits[0], "--test", digits[1], *words)
        chance = round(np.bincount(queries[1]).max() / 360, 6)
        assert line["source"] == {
            "source": str(tmp_path),
            "checkpoint": "step_00000010",
            "run_id": checkpoint.run_id,
            "recipe": "quickstart_digits",
            "method": "moco_v3",
            "encoder": "base",
            "step": 10,
        }
        assert line == {
            "run": str(tmp_path),
            "step": 10,
            "knn": line["knn"],
            "k": k,
            "temperature": temperature,
            "interval": [round(x, 6) for x in wilson(round(360 * line["knn"]), 360)],
            "chance": chance,
            "images": {"train": 1437, "test": 360},
            "classes": 10,
            "source": line["source"],
        }
        expected = _vote(bank, queries, k=k, temperature=temperature)
        assert line["knn"] == pytest.approx(expected, abs=1.5 / 360)

    # What this can tell apart: the defaults, the momentum encoder, and the sets exchanged.
    other = objective.momentum_encoder
    of_momentum_encoder = [_features(other, _read(name), **normalisation) for name in digits]
    defaults, narrow = {"k": 20, "temperature": 0.07}, {"k": 300, "temperature": 0.01}
    for right, mistake in (
        (narrow, _vote(bank, queries, k=20, temperature=0.01)),
        (narrow, _vote(bank, queries, k=300, temperature=0.07)),
        (defaults, _vote(*of_momentum_encoder, **defaults)),
        (defaults, _vote(queries, bank, **defaults)),
    ):
        assert abs(mistake - _vote(bank, queries, **right)) > 4 / 360


def test_eval_knn_of_a_run_that_measured_none(small_run, digits, tmp_path, capsys):
    optim = replace(small_run.optim, warmup_epochs=0)
    _train(replace(small_run, epochs=0.2, optim=optim), tmp_path)
    line = _eval_knn(capsys, str(tmp_path), "--train", digits[1], "--test", digits[1], "--k", "1")
    assert 0.1 <= line.pop("chance") < 0.13
    assert (line["run"], line["step"], line["knn"], line["k"]) == (str(tmp_path), 1, 1.0, 1)
    assert not (tmp_path / "features").exists()


class Brightness(Monitor):
    """A toy evaluation with two figures, which depend on the weights and on how often it was
    asked."""

    name = "brightness"
    figures: ClassVar[Mapping[str, str]] = {
        "bright_top1": "bright top-1",
        "bright_top5": "bright top-5",
    }

    def __init__(self, asked: int) -> None:
        super().__init__(World(), every_epochs=0.2, max_share=1.0)
        self.asked = asked

    def evaluate(self, encoder: torch.nn.Module) -> Mapping[str, float]:
        self.asked += 1
        bound = float(torch.sigmoid(encoder.cls_token.detach().double().mean()))
        return {"bright_top1": bound / (1 + self.asked), "bright_top5": bound}


def test_a_second_evaluation_is_one_class_in_the_list(small_run, tmp_path, capsys, monkeypatch):
    """In metrics, in the console, in the curves' names, in the checkpoint, and after a resume."""
    made: list[Brightness] = []
    monkeypatch.setattr(
        setup,
        "build_monitors",
        lambda *_, **__: made.append(Brightness(10 * len(made))) or made[-1:],
    )
    config = replace(small_run, epochs=0.6, optim=replace(small_run.optim, warmup_epochs=0))
    trainer = Trainer.build(config, tmp_path, World())
    try:
        trainer.run(2)
        trainer._save(force=True)
    finally:
        trainer.close()
    assert made[0].asked == 3  # before the first step, and after each of two
    text = capsys.readouterr().out
    assert "\nstep 0: bright top-1 " in text
    assert f"step 2/3 epoch 0.4 loss {RunFolder(tmp_path).read_metric('loss')[-1][1]:.3f}" in text
    last, best = made[0].last, made[0].best
    assert best["bright_top1"] > last["bright_top1"]

    # The second process takes the state up: it knows the best, and when it was last measured.
    _train(config, tmp_path)
    assert made[1].asked == 11
    assert [step for step, _ in RunFolder(tmp_path).read_metric("bright_top5")] == [0, 1, 2, 3]
    assert made[1].best["bright_top1"] == best["bright_top1"]
    text = capsys.readouterr().out
    line = next(line for line in text.splitlines() if line.startswith("step 3/3"))
    assert f"bright_top1 {last['bright_top1']:.1%} bright_top5 {last['bright_top5']:.1%}" in line
    assert (
        f"bright top-1 {made[1].last['bright_top1']:.1%} (best {best['bright_top1']:.1%} at step 0)"
        in text
    )
    assert "warning: step 3: bright top-1 fell to" in text
    saved = load_run(tmp_path)[2].state["monitors"]
    assert saved == {"brightness": made[1].state_dict()}
    pytest.importorskip("matplotlib")
    assert draw_curves(
        tmp_path / "metrics.jsonl", tmp_path / "c.png", "toy", Panels(figures=Brightness.figures)
    ).exists()
