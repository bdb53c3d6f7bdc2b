"""What a run tells: means over the interval, peaks of the gradients, events of the detectors."""

from __future__ import annotations

import json
import math
import os
import resource
from dataclasses import replace

import pytest
import torch
from torch import nn

from fastmoco.config import Config, TrackersConfig, resolve
from fastmoco.distributed.mesh import World
from fastmoco.recipes import get_recipe
from fastmoco.run.events import read_events
from fastmoco.run.folder import RunFolder
from fastmoco.run.metrics_file import EVENT, read_spikes
from fastmoco.telemetry.detectors import ForgettingDetector
from fastmoco.telemetry.recorder import Recorder, _left_out, _peak_line
from fastmoco.telemetry.stability import gradient_norms
from fastmoco.telemetry.trackers.trackers import Trackers


def _recorder(folder, *trackers):
    config = get_recipe("quickstart_digits")
    config = replace(config, trackers=TrackersConfig(use=trackers, histogram_every=2))
    resolved = resolve(config, world_size=1, sample_count=1437)
    return Recorder(
        config, resolved, RunFolder(folder), World(), start_step=0, figures={"knn": "kNN"}
    )


def _rows(recorder, tmp_path):
    """The lines of metrics; those of events have a reader of their own."""
    recorder.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if EVENT not in row]


MOMENTUM = {"ema_momentum": 0.9}


def seen(rows: torch.Tensor, **others: torch.Tensor) -> dict[str, torch.Tensor]:
    """What an objective shows whose queries and keys are equal."""
    return {"queries": rows[None], "keys": rows[None], **others}


def _norms(module: nn.Module, size: float) -> dict[str, torch.Tensor]:
    """Gradient norms of a module whose gradients all have one size."""
    for parameter in module.parameters():
        parameter.grad = torch.full_like(parameter, size)
    return gradient_norms(module.named_parameters(), {})


@pytest.mark.parametrize(
    ("scaling", "line"),
    [
        ("linear", "lr = 0.5 x 64 / 256 = 0.125"),
        ("sqrt", "lr = 0.5 x sqrt(64) = 4"),
        ("none", "lr = 0.5"),
    ],
)
def test_the_first_line_explains_the_peak_learning_rate(scaling, line):
    config = get_recipe("quickstart_digits")
    optim = replace(config.optim, lr=0.5, lr_scaling=scaling)
    assert _peak_line(replace(config, global_batch_size=64, optim=optim)) == line


def test_a_spike_between_two_log_lines_shows_in_the_curve(tmp_path):
    recorder = _recorder(tmp_path)
    model = nn.Linear(4, 1, bias=False)
    for step, size in enumerate((1.0, 50.0, 2.0), start=1):
        recorder.gradients(step, _norms(model, size))
        recorder.stepped(0.0)
    q = torch.randn(8, 64)
    recorder.log(
        3,
        torch.tensor(2.5),
        seen(q, accuracy=torch.tensor([0.25, 0.5])),
        lr=0.1,
        schedules=MOMENTUM,
    )
    row = _rows(recorder, tmp_path)[0]
    assert (row["contrast/top1"], row["contrast/top5"]) == (0.25, 0.5)
    assert row["gradient_norm/total"] == pytest.approx(100.0)
    assert (row["loss"], row["lr"], row["ema_momentum"]) == (2.5, 0.1, 0.9)
    assert row["cosine/positive"] == pytest.approx(1.0)


@pytest.mark.parametrize(
    "order", [(1.0, math.nan, 2.0), (math.nan, 1.0, 2.0), (1.0, 2.0, math.nan)]
)
def test_a_gradient_that_is_not_finite_is_never_hidden(tmp_path, capsys, order):
    recorder = _recorder(tmp_path)
    for step, size in enumerate(order, start=1):
        recorder.gradients(step, _norms(nn.Linear(4, 1), size))
        recorder.stepped(0.0)
    q = torch.randn(8, 64)
    recorder.log(3, torch.tensor(2.5), seen(q), lr=0.1, schedules=MOMENTUM)
    spikes, row = _rows(recorder, tmp_path)
    assert row["gradient_norm/total"] is None
    at = order.index(next(size for size in order if math.isnan(size))) + 1
    assert read_spikes(tmp_path / "metrics.jsonl") == {at: {"total": None}}
    assert (spikes["step"], spikes["spike/total"]) == (at, None)
    (event,) = read_events(tmp_path / "metrics.jsonl")
    assert (event.step, event.name, event.layer, event.size) == (
        at,
        "gradient_not_finite",
        "total",
        None,
    )
    said = " ".join(capsys.readouterr().out.split())
    assert "gradient of total is nan" in said
    assert f"the images of that step: fastmoco run images {tmp_path} --step {at}" in said


def test_a_constant_encoder_raises_the_alarm_within_ten_steps(tmp_path, capsys):
    recorder = _recorder(tmp_path)
    healthy, constant = torch.randn(8, 64), torch.ones(8, 64)
    for step in range(1, 11):
        q = healthy if step < 3 else constant
        recorder.gradients(step, _norms(nn.Linear(4, 1), 1.0))
        recorder.stepped(0.0)
        recorder.log(step, torch.tensor(1.0), seen(q), lr=0.1, schedules=MOMENTUM)
    recorder.close()
    events = read_events(tmp_path / "metrics.jsonl")
    assert [(event.step, event.name) for event in events] == [(5, "collapse"), (5, "forgetting")]
    text = capsys.readouterr().out
    assert "collapsing" in text
    assert "the encoder has collapsed" in text


def test_features_that_no_loss_reads_are_logged_and_not_judged(tmp_path, capsys):
    recorder = _recorder(tmp_path)
    for step in range(1, 300, 10):
        recorder.stepped(0.0)
        watch = {"features": torch.ones(1, 8, 64) if step > 20 else torch.randn(1, 8, 64)}
        recorder.log(step, torch.tensor(1.0), watch, lr=0.1, schedules={})
    assert "warning" not in capsys.readouterr().out
    row = _rows(recorder, tmp_path)[-1]
    assert row["feature_std"] < 1e-6
    assert row["effective_rank"] == pytest.approx(1.0)
    assert read_events(tmp_path / "metrics.jsonl") == []


def test_figures_about_the_weights_are_written_and_judged_after_the_warm_up(tmp_path):
    recorder = _recorder(tmp_path)
    ratio = {"update_ratio/heads": torch.tensor(0.2), "ema_distance": torch.tensor(0.5)}
    for step in (10, 20, 30, 90, 100, 110, 120, 130):
        recorder.stepped(0.0)
        recorder.log(step, torch.tensor(1.0), {}, lr=0.1, schedules={}, figures=ratio)
    assert _rows(recorder, tmp_path)[-1]["update_ratio/heads"] == pytest.approx(0.2)
    (event,) = read_events(tmp_path / "metrics.jsonl")
    assert (event.step, event.name, event.layer) == (120, "update_ratio", "heads")
    assert event.size == pytest.approx(0.2)
    assert event.text == (
        "a step changes the weights of heads by 0.2 of their norm (bound 0.05): lower --optim.lr"
    )


def test_forgetting_is_noticed_once_and_only_after_learning():
    detector = ForgettingDetector()
    assert [detector.observe(step, 0.001, 0.0) for step in range(10)] == [None] * 10
    assert detector.observe(10, 0.5, 0.0) is None
    events = [detector.observe(step, 0.3, 0.3) for step in range(11, 20)]
    assert [event is not None for event in events] == [False, False, True] + [False] * 6


def test_knn_dips_are_said(tmp_path, capsys):
    recorder = _recorder(tmp_path)
    for step, accuracy in ((0, 0.5), (10, 0.8), (20, 0.7)):
        recorder.measured(step, {"knn": accuracy})
    text = capsys.readouterr().out
    assert "kNN fell to 70.0%" in text
    assert "step 10: kNN 80.0% (best so far)" in text
    assert "kNN 70.0% (best 80.0% at step 10)" in text
    assert [row["knn"] for row in _rows(recorder, tmp_path)] == [0.5, 0.8, 0.7]
    (dip,) = read_events(tmp_path / "metrics.jsonl")
    assert (dip.step, dip.name, dip.layer) == (20, "knn_dip", None)
    assert dip.size == pytest.approx(0.1)
    assert dip.text == "kNN fell to 70.0%, 10.0 points below its best"


@pytest.mark.faults
def test_a_full_disk_costs_lines_of_metrics_and_not_the_run(tmp_path, capsys):
    """T10, of the metrics: said once, and written again as soon as there is room."""

    recorder = _recorder(tmp_path)
    q = torch.randn(8, 64)

    def log(step):
        recorder.stepped(0.0)
        recorder.log(step, torch.tensor(2.5), seen(q), lr=0.1, schedules=MOMENTUM)

    log(1)
    size = (tmp_path / "metrics.jsonl").stat().st_size
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, before[1]))
    try:
        log(2)
        log(3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    log(4)
    assert capsys.readouterr().out.count("metrics cannot be written and are lost meanwhile") == 1
    recorder.close()
    steps = [step for step, _ in RunFolder(tmp_path).read_metric("loss")]
    assert (steps[0], steps[-1]) == (1, 4)
    assert 2 not in steps


@pytest.mark.parametrize(
    ("count", "batch", "line"),
    [
        (3012, 100, "12 of 3,012 images are left out of each epoch, chosen at random each time"),
        (1001, 10, "1 of 1,001 images is left out of each epoch"),
        (3000, 100, ""),
    ],
)
def test_images_that_no_batch_has_are_named(count, batch, line):
    config = replace(Config(), global_batch_size=batch)
    assert _left_out(config, resolve(config, world_size=1, sample_count=count)).startswith(line)
    assert bool(line) == bool(_left_out(config, resolve(config, world_size=1, sample_count=count)))


def test_trackers_get_text_that_they_can_encode(tmp_path, monkeypatch):
    """Names of files may have bytes that are no UTF-8, which TensorBoard refuses."""
    seen_runs = []

    class Kept(Trackers):
        def __init__(self, names, run, *, tell):
            seen_runs.append(run)
            super().__init__((), run, tell=tell)

    monkeypatch.setattr("fastmoco.telemetry.recorder.Trackers", Kept)
    odd = os.fsdecode(b"na\xefve")
    config = get_recipe("quickstart_digits")
    config = replace(config, data=replace(config.data, shards=f"/{odd}/*.tar"))
    resolved = resolve(config, world_size=1, sample_count=1437)
    Recorder(config, resolved, RunFolder(tmp_path / odd), World(), start_step=0).close()
    (run,) = seen_runs
    assert run.config["data.shards"].encode() == b"/na\\udcefve/*.tar"
    assert run.name.encode() == b"na\\udcefve"
    assert run.folder == str(tmp_path / odd)


@pytest.mark.usefixtures("sinks_of_tests")
def test_trackers_get_what_the_file_gets(tmp_path, capsys):
    """Lines, kNN with the best so far, histograms of every second log step, and events."""
    recorder = _recorder(tmp_path, "tests.faulty_sinks:Notes")
    model = nn.Linear(4, 1, bias=False)
    for step in range(1, 4):
        recorder.gradients(step, _norms(model, 1.0 if step < 3 else math.nan))
        recorder.stepped(0.0)
        if recorder.wants_histograms():
            recorder.gradient_values([("weight", model.weight.grad)], {"weight": ("heads",)})
        q = torch.randn(8, 64)
        recorder.log(step, torch.tensor(2.5), seen(q), lr=0.1, schedules=MOMENTUM)
        recorder.measured(step, {"knn": 0.5 - step / 10})
    rows = _rows(recorder, tmp_path)
    told = (tmp_path / "notes.txt").read_text().splitlines()
    assert told[-1] == "closed"
    notes = [json.loads(line) for line in told[:-1]]
    written = [{"step": note[1], **note[2]} for note in notes if note[0] == "write"]
    assert written == [{k: v for k, v in row.items() if k != "time"} for row in rows]
    assert [note[1] for note in notes if note[0] == "histograms"] == [1]
    counts = next(note[2] for note in notes if note[0] == "histograms")["gradients/heads"]
    assert counts == [4.0]
    assert all(row["memory/host_gb"] > 0 for row in rows if "loss" in row)
    best = [note[2] for note in notes if note[0] == "summary"]
    assert best == [{"knn": 0.5 - step / 10, "knn_best": 0.4} for step in (1, 2, 3)]
    events = [note[1:] for note in notes if note[0] == "event"]
    saved = read_events(tmp_path / "metrics.jsonl")
    assert events == [[event.step, event.name] for event in saved]
    assert {event.name for event in saved} == {"gradient_not_finite", "knn_dip"}
    assert "tests.faulty_sinks:Notes: notes.txt" in capsys.readouterr().out


@pytest.mark.usefixtures("sinks_of_tests")
def test_a_picture_or_a_histogram_that_fails_is_one_warning(tmp_path, capsys):
    recorder = _recorder(tmp_path, "tests.faulty_sinks:Notes")
    spec = Config().data.view1
    for step in (1, 2):
        recorder.views(step, [torch.zeros(2, 3, 8)], [spec])
        recorder.gradient_values([("weight", torch.zeros(3, dtype=torch.int64))], {"weight": 7})
    recorder.close()
    said = capsys.readouterr().out
    assert said.count("warning: the picture of the views failed") == 1
    assert said.count("warning: the histograms of the gradients failed") == 1
