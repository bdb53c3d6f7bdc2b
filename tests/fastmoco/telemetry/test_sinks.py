import json
import os
import resource
import stat
from pathlib import Path

import pytest

from fastmoco.telemetry.sinks import JsonlSink
from fastmoco_pipelines.files.small import UnfitFileError


def rows(path: Path) -> list[dict[str, float]]:
    return [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]


def test_each_line_is_on_the_disk_before_close(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    sink = JsonlSink(path)
    sink.write(0, {"loss": 3.5, "lr": 1.5e-4})
    sink.write(0, {"knn": 0.5})
    found = rows(path)
    assert [{k: v for k, v in row.items() if k != "time"} for row in found] == [
        {"step": 0, "loss": 3.5, "lr": 1.5e-4},
        {"step": 0, "knn": 0.5},
    ]
    assert found[0]["time"] > 1.7e9
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    sink.close()
    sink.close()


def test_a_resumed_run_appends(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for step in (1, 2):
        sink = JsonlSink(path)
        sink.write(step, {})
        sink.close()
    assert [row["step"] for row in rows(path)] == [1, 2]


def test_a_torn_line_costs_only_itself(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    sink = JsonlSink(path)
    sink.write(3, {"loss": 1.0})
    sink.close()
    lines = path.read_text().splitlines()
    assert lines[1] == '{"step": 2, "lo'
    assert json.loads(lines[2])["step"] == 3


def test_a_full_disk_raises_and_the_next_line_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path)
    sink.write(1, {"loss": 1.0})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 5, hard))
    try:
        with pytest.raises(OSError, match="large"):
            sink.write(2, {"loss": 2.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    sink.write(3, {"loss": 3.0})
    lines = path.read_text().splitlines()
    assert len(lines) == 3
    assert [json.loads(line)["step"] for line in (lines[0], lines[2])] == [1, 3]


def test_what_json_cannot_say_is_null(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "m")
    sink.write(1, {"a": float("nan"), "b": float("-inf"), "c": 1e-45})
    row = rows(tmp_path / "m")[0]
    assert {name: row[name] for name in "abc"} == {"a": None, "b": None, "c": 1e-45}


@pytest.mark.parametrize("what", ["link", "hard link", "pipe"])
def test_nothing_but_a_file_of_its_own_is_appended_to(tmp_path: Path, what: str) -> None:
    path, precious = tmp_path / "metrics.jsonl", tmp_path / "precious"
    precious.write_text("all of it")
    if what == "pipe":
        os.mkfifo(path)
    else:
        (path.symlink_to if what == "link" else path.hardlink_to)(precious)
    with pytest.raises(UnfitFileError, match=r"metrics.jsonl: (is a|has a second name)"):
        JsonlSink(path)
    assert precious.read_text() == "all of it"
