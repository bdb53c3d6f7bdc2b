import os
import sys
import threading
import time
from pathlib import Path

import pytest

from fastmoco.telemetry.trackers.tensorboard import TensorBoardSink
from fastmoco.telemetry.trackers.trackers import Trackers
from tests.tracked_runs import tracked


@pytest.mark.parametrize("name", ["plain", "[v1] \u732b", os.fsdecode(b"na\xefve")])
def test_tensorboard_gets_the_same_scalars(tmp_path: Path, name: str) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    sink = TensorBoardSink()
    sink.start(tracked(tmp_path / name, 0))
    sink.write(1, {"loss": 3.5})
    sink.write(2, {"loss": 2.5, "knn": 0.5})
    sink.close()
    sink.close()
    (tmp_path / name).rename(tmp_path / "readable")
    events = accumulator.EventAccumulator(str(tmp_path / "readable" / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 3.5), (2, 2.5)]
    assert [(e.step, e.value) for e in events.Scalars("knn")] == [(2, 0.5)]


def test_without_tensorboard_it_is_an_import_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ImportError):
        TensorBoardSink().start(tracked(tmp_path, 0))
    assert os.listdir(tmp_path) == []


def test_the_name_of_an_event_file_is_new_each_time(tmp_path: Path) -> None:
    """A link of that name would be followed."""
    pytest.importorskip("tensorboard")
    for _ in range(2):
        sink = TensorBoardSink()
        sink.start(tracked(tmp_path, 0))
        sink.close()
    files = (tmp_path / "tensorboard").glob("events.out.tfevents.*")
    ends = {path.name.rpartition(".")[2] for path in files}
    assert len(ends) == 2
    assert all(len(end) == 8 for end in ends)


def test_a_full_disk_is_one_warning_of_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """TensorBoard's thread would print a traceback. A thread of another library still does."""
    pytest.importorskip("tensorboard")
    monkeypatch.setattr(threading, "excepthook", threading.__excepthook__)  # not pytest's
    told: list[str] = []
    trackers = Trackers(["tensorboard"], tracked(tmp_path, 0), tell=told.append)
    deadline = time.monotonic() + 60
    while not (files := list(tmp_path.glob("tensorboard/events.*"))):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    files[0].unlink()
    files[0].symlink_to("/dev/full")
    step = 0
    while not told:
        step += 1
        trackers.write(step, {"loss": 1.0})
        trackers.news()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    trackers.close()
    assert told == [
        "warning: tracker tensorboard failed (No space left on device; free some space, or choose a "
        "folder on another disk). The run goes on"
    ]
    assert "Traceback" not in capfd.readouterr().err

    def fails() -> None:
        raise ValueError("of another thread")

    sink = TensorBoardSink()
    sink.start(tracked(tmp_path / "other", 0))
    thread = threading.Thread(target=fails)
    thread.start()
    thread.join()
    sink.close()
    assert "ValueError: of another thread" in capfd.readouterr().err
    assert threading.excepthook is threading.__excepthook__
