import os
import sys
from pathlib import Path

import pytest

from fastmoco.telemetry.trackers.tensorboard import TensorBoardSink
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
