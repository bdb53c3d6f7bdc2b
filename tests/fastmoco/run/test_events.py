"""Named events in `metrics.jsonl`, written as the trainer does and read as a report does."""

from __future__ import annotations

import json
import math

import pytest

from fastmoco.run.events import Event, read_events
from fastmoco.run.metrics_file import cut_back, read_curves
from fastmoco.telemetry.sinks import JsonlSink

EVENTS = [
    Event(3, "gradient_spike", "first_block", 12.5, "gradient spike in first_block"),
    Event(3, "gradient_not_finite", "heads", None, "gradient of heads is nan"),
    Event(8, "knn_dip", None, 0.04, 'kNN fell, "by much"\n\u202e'),
]


def _written(path):
    sink = JsonlSink(path)
    sink.write(1, {"loss": 2.0, "knn": 0.5})
    for event in EVENTS:
        sink.event(event)
    sink.write(9, {"loss": 1.0})
    sink.close()


def test_events_come_back_as_they_were_written_and_change_no_curve(tmp_path):
    path = tmp_path / "metrics.jsonl"
    _written(path)
    assert read_events(path) == EVENTS
    row = json.loads(path.read_text().splitlines()[1])
    assert row.keys() == {"step", "time", "event"}
    series, lost = read_curves(path, lambda name: True)
    assert series["loss"].values.tolist() == [2.0, 1.0]
    assert "event" not in series.keys() | lost.keys()


def test_events_after_the_step_of_a_checkpoint_are_removed(tmp_path):
    path = tmp_path / "metrics.jsonl"
    _written(path)
    cut_back(path, 3)
    assert read_events(path) == EVENTS[:2]


def test_a_size_that_is_not_finite_has_no_number(tmp_path):
    sink = JsonlSink(tmp_path / "m.jsonl")
    sink.event(Event(1, "collapse", None, math.inf, "t"))
    sink.close()
    assert read_events(tmp_path / "m.jsonl") == [Event(1, "collapse", None, None, "t")]


@pytest.mark.parametrize(
    "content",
    [
        "spike",
        {"name": "a"},
        {"name": 1, "text": "t"},
        {"name": "a", "text": "t", "layer": 3},
        {"name": "a", "text": "t", "size": "x"},
        {"name": "a", "text": "t", "size": True},
        {"name": "a", "text": "t", "size": 10**400},
    ],
)
def test_damaged_events_are_left_out_and_told(tmp_path, content):
    path = tmp_path / "m.jsonl"
    good = {"name": "collapse", "layer": None, "size": 0.5, "text": "t"}
    rows = [{"step": 4, "event": content}, {"step": 5, "event": good}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 6, "event"\n')
    told: list[str] = []
    assert read_events(path, tell=told.append) == [Event(5, "collapse", None, 0.5, "t")]
    assert told[0].endswith("damaged, no metrics of a step")
    assert told[1] == f"{path}: 1 of 2 events left out: damaged"
