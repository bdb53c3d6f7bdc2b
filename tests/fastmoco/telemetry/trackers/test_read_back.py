"""What was logged is read back from real trackers, of a run whose process is killed with -9 after
step 6 and continues from a checkpoint of step 4: each step is there once, in one run."""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.tracked_runs import (
    CONFIG,
    HISTOGRAM,
    LAST,
    PICTURE,
    RUN_ID,
    in_process,
    log,
    metrics_of,
    tracked,
)

STEPS = list(range(1, LAST + 1))


def same(found: Any, value: float) -> bool:
    """Equal in float32, or both NaN, which some trackers keep as a text or as null."""
    if math.isnan(value):
        return found in (None, "NaN") or math.isnan(found)
    return bool(found == pytest.approx(value, rel=1e-6))


def killed_and_continued(tracker: str, folder: Path) -> None:
    """Both processes of the run."""
    folder.mkdir()
    assert in_process(tracker, folder, 1, 6, "kill") == -9
    time.sleep(1.5)  # the tracker's process sends what it has after the end of the run's
    assert in_process(tracker, folder, 5, LAST, "close") == 0


def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed: pip install '.[wandb]'")
    from wandb.proto.wandb_internal_pb2 import Record

    from fastmoco.telemetry.trackers.wandb import records

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB__DISABLE_STATS", "true")
    folder = tmp_path / "run"
    killed_and_continued("wandb", folder)

    files = sorted(folder.glob("wandb/offline-run-*/run-*.wandb"))
    assert len(files) == 2
    rows: list[tuple[int, dict[str, Any]]] = []
    for file in files:
        found = [Record.FromString(content) for content in records(file)]
        (run,) = [record.run for record in found if record.WhichOneof("record_type") == "run"][:1]
        assert (run.run_id, run.display_name) == (RUN_ID, "run")
        config = {item.key: json.loads(item.value_json) for item in run.config.update}
        assert {name: config[name] for name in CONFIG} == CONFIG
        for record in found:
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                row = {"/".join(i.nested_key): json.loads(i.value_json) for i in items}
                rows.append((record.history.step.num, row))
    assert [step for step, _ in rows] == STEPS
    for step, row in rows:
        assert all(same(row[name], value) for name, value in metrics_of(step).items())
    by_step = dict(rows)
    assert [by_step[step].get("knn") for step in STEPS] == [None, 0.2, *[None] * 3, 0.6, None, None]
    assert by_step[2]["event/gradient_spike"] == 7.5
    assert by_step[2]["gradients/heads/values"] == HISTOGRAM.counts
    assert by_step[2]["gradients/heads/bins"] == HISTOGRAM.edges
    assert by_step[2]["views/width"] == PICTURE.shape[1]
    assert len(list(folder.glob("wandb/offline-run-*/files/media/images/views_*.png"))) == 2


def test_mlflow_in_a_file_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip(
        "mlflow", reason="mlflow is not installed: pip install '.[mlflow]'"
    )
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    folder = tmp_path / "run"
    killed_and_continued("mlflow", folder)

    client = mlflow.MlflowClient(tracking_uri=(folder / "mlruns").as_uri())
    experiment = client.get_experiment_by_name("fastmoco")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("run", "FINISHED")
    assert run.data.params == {name: str(value) for name, value in CONFIG.items()}
    for name in metrics_of(1):
        history = client.get_metric_history(run.info.run_id, name)
        assert [metric.step for metric in history] == STEPS
        assert all(same(metric.value, metrics_of(metric.step)[name]) for metric in history)
    for name, values in {
        "knn": [(2, 0.2), (6, 0.6)],
        "knn_best": [(2, 0.2), (6, 0.6)],
        "event/gradient_spike": [(2, 7.5), (6, 7.5)],
    }.items():
        history = client.get_metric_history(run.info.run_id, name)
        assert [(metric.step, metric.value) for metric in history] == values
    assert run.data.tags["event.gradient_spike"] == "step 6: a spike of step 6"
    files = Path(run.info.artifact_uri.removeprefix("file://"))
    stored = json.loads((files / "histograms" / "6.json").read_text())
    assert stored["gradients/heads"]["counts"] == HISTOGRAM.counts
    assert {path.name for path in files.glob("*.png")} == {"views-2.png", "views-6.png"}


def test_trackio_on_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trackio", reason="trackio is not installed: pip install '.[trackio]'")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    for name in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL", "TRACKIO_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    killed_and_continued("trackio", tmp_path / "run")

    import sqlite3

    (database,) = (tmp_path / "trackio").glob("fastmoco*.db")
    with sqlite3.connect(database) as connection:
        found = connection.execute("SELECT run_name, step, metrics FROM metrics ORDER BY id")
        rows = [(name, step, json.loads(content)) for name, step, content in found]
    assert {name for name, _, _ in rows} == {f"run-{RUN_ID[:7]}"}
    losses = [(step, row["loss"]) for _, step, row in rows if "loss" in row]
    assert losses == [(step, metrics_of(step)["loss"]) for step in STEPS]
    seen = Counter(name for _, _, row in rows for name in row)
    once = ("knn", "knn_best", "event/gradient_spike", "views", "gradients/heads")
    assert {name: seen[name] for name in once} == dict.fromkeys(once, 2)


def test_tensorboard(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    hparams = pytest.importorskip("tensorboard.plugins.hparams.metadata")
    from fastmoco.telemetry.trackers.trackers import Trackers

    folder = tmp_path / "run"
    for first, last in ((1, 6), (5, LAST)):
        trackers = Trackers(["tensorboard"], tracked(folder, first), tell=pytest.fail)
        log(trackers, first, last)
        trackers.close(60)

    everything = {"images": 0, "histograms": 0, "tensors": 0, "scalars": 0}
    found = accumulator.EventAccumulator(str(folder / "tensorboard"), size_guidance=everything)
    found.Reload()
    for name in metrics_of(1):
        assert [event.step for event in found.Scalars(name)] == STEPS
        for event in found.Scalars(name):
            assert same(event.value, metrics_of(event.step)[name])
    assert [event.step for event in found.Scalars("knn_best")] == [2, 6]
    assert [(image.step, image.width) for image in found.Images("views")] == [(2, 6), (6, 6)]
    histograms = found.Histograms("gradients/heads")
    assert [event.step for event in histograms] == [2, 6]
    value = histograms[0].histogram_value
    assert (value.bucket_limit, value.bucket) == (HISTOGRAM.edges[1:], HISTOGRAM.counts)
    assert (value.min, value.max, value.num, value.sum) == (-1.0, 2.0, 8.0, 1.5)
    plain = pytest.importorskip("tensorboard.backend.event_processing.plugin_event_accumulator")
    tensors = plain.EventAccumulator(str(folder / "tensorboard"), size_guidance={"tensors": 0})
    tensors.Reload()
    texts = tensors.Tensors("event/gradient_spike/text_summary")
    assert [event.tensor_proto.string_val[0] for event in texts] == [
        b"a spike of step 2",
        b"a spike of step 6",
    ]

    # The page of hyper-parameters: the values, and kNN as the metric.
    plugin = found.summary_metadata
    content = {
        name: hparams.parse_session_start_info_plugin_data(plugin[name].plugin_data.content)
        for name in plugin
        if name.endswith("session_start_info")
    }
    (start,) = content.values()
    assert start.hparams["optim.lr"].number_value == 0.5
    assert start.hparams["model.architecture"].string_value == "vit"
    (experiment,) = [
        hparams.parse_experiment_plugin_data(plugin[name].plugin_data.content)
        for name in plugin
        if name.endswith("experiment")
    ]
    assert [info.name.tag for info in experiment.metric_infos] == ["knn", "knn_best"]
