"""The list of runs: states, numbers, and folders of any origin."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from fastmoco.run import listing
from fastmoco.run.folder import RunFolder
from fastmoco.run.listing import RunLine, find_runs, read_run

SAVED = {
    "config": {"recipe": "quickstart_digits"},
    "resolved": {"total_steps": 650},
    "run_id": "0" * 14,
}


def made(path: Path, rows: list[dict[str, Any]] | str = "", **saved: Any) -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(SAVED | saved))
    text = rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows)
    if text:
        (path / "metrics.jsonl").write_text(text)
    return path


def only(folder: Path) -> RunLine:
    [run] = find_runs(folder)[0]
    return run


ROWS = [
    {"step": 0, "time": 1.0, "knn": 0.25},
    {"step": 10, "time": 2.0, "loss": 4.5, "images_per_s": 100.0},
    {"step": 20, "time": 3.0, "knn": 0.75},
    {"step": 30, "time": 4.0, "knn": 0.5},
    {"step": 40, "time": 5.0, "loss": None, "images_per_s": 120.0},
    {"step": 41, "time": 5.0, "event": {"name": "gradient_spike", "text": 'has "knn": 1'}},
]


def test_numbers_are_the_newest_and_the_best(tmp_path: Path) -> None:
    run = only(made(tmp_path / "a", ROWS, host="node7"))
    assert (run.state, run.fault) == ("elsewhere", None)
    assert (run.recipe, run.host, run.total_steps) == ("quickstart_digits", "node7", 650)
    assert (run.step, run.knn, run.knn_best, run.images_per_s) == (41, 0.5, 0.75, 120.0)
    assert run.written is not None
    assert abs(run.written - time.time()) < 600


@pytest.mark.parametrize("mark", [None, "DONE", "PREEMPTED"])
def test_the_state_of_a_run_without_an_owner_is_its_mark(tmp_path: Path, mark: str | None) -> None:
    path = made(tmp_path / "a", ROWS)
    if mark:
        (path / mark).write_text("\n")
    assert (
        only(tmp_path).state == {None: "failed", "DONE": "finished", "PREEMPTED": "stopped"}[mark]
    )
    (path / "metrics.jsonl").unlink()
    if mark is None:
        assert only(tmp_path).state == "not begun"


def test_a_run_whose_lock_is_held_is_running_until_its_process_ends(tmp_path: Path) -> None:
    path = made(tmp_path / "a", ROWS)
    folder = RunFolder(path)
    folder.acquire()
    assert (only(tmp_path).state, only(tmp_path).pid) == ("running", os.getpid())
    folder.release()
    assert (only(tmp_path).state, only(tmp_path).pid) == ("failed", None)


def test_the_list_disturbs_no_run_that_starts(tmp_path: Path, monkeypatch) -> None:
    path = made(tmp_path / "a", ROWS)
    (path / "lock").write_text("1")

    def locks(*_: object) -> None:
        raise AssertionError("a lock was taken")

    monkeypatch.setattr("fcntl.flock", locks)
    before = {one.name: one.stat().st_mtime_ns for one in path.iterdir()}
    assert only(tmp_path).state == "failed"
    assert {one.name: one.stat().st_mtime_ns for one in path.iterdir()} == before


def test_runs_are_found_at_any_depth_once_and_sorted_by_time(tmp_path: Path) -> None:
    for number, name in enumerate(("old", "b/middle", "b/c/d/new")):
        path = made(tmp_path / name, ROWS)
        made(path / "tuned", ROWS)
        os.utime(path / "metrics.jsonl", (1000.0 * number, 1000.0 * number))
        os.utime(path / "tuned" / "metrics.jsonl", (10.0, 10.0 + number))
    (tmp_path / "b" / "loop").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "linked").symlink_to(tmp_path / "old", target_is_directory=True)
    made(tmp_path / "old" / "checkpoints" / "inside", ROWS)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"config": {}, "hidden": 1}')
    found, notes = find_runs(tmp_path)
    names = [run.path.removeprefix(f"{tmp_path}/") for run in found]
    assert [name for name in names if "tuned" not in name] in (
        ["b/c/d/new", "b/middle", "old"],
        ["b/c/d/new", "b/middle", "linked"],
    )
    assert len(names) == 6
    assert notes == []


def test_a_search_is_bounded(tmp_path: Path, monkeypatch) -> None:
    deep = tmp_path.joinpath(*"abcdefghij")
    made(deep, ROWS)
    found, notes = find_runs(tmp_path)
    assert found == []
    assert notes == [f"folders deeper than 8 below {tmp_path} are left out"]
    monkeypatch.setattr(listing, "MOST_FOLDERS", 3)
    assert find_runs(tmp_path)[1] == ["more than 3 folders: give one further down"]
    monkeypatch.setattr(listing, "MOST_FOLDERS", 100)
    monkeypatch.setattr(listing, "MOST_ENTRIES", 3)
    wide = tmp_path / "wide"
    wide.mkdir()
    for number in range(9):
        (wide / f"{number}").touch()
    assert f"{wide}: only the first 3 entries were looked at" in find_runs(tmp_path)[1]


DAMAGED = {
    "half a line": ('{"step": 10, "knn": 0.5}\n{"step": 20, "kn', 10, None),
    "zeros": ('{"step": 10}\n' + "\0" * 100, 10, None),
    "no metrics": ("[1, 2]\nnull\n", None, "metrics.jsonl has no line of metrics at its end"),
    "odd values": ('{"step": 10, "knn": "x", "images_per_s": true}\n', 10, None),
    "huge numbers": ('{"step": 10, "knn": 1e999}\n{"step": 1e999}\n', 10, None),
    "deep": ('{"step": 10}\n' + "[" * 50_000 + "\n", 10, None),
    "long": (
        '{"step": 10}\n{"step": 11, "text": "' + "x" * 70_000 + '"}\n',
        None,
        "metrics.jsonl ",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_metrics_end_no_list(tmp_path: Path, case: str) -> None:
    text, step, fault = DAMAGED[case]
    run = only(made(tmp_path / "a", text))
    assert run.step == step
    assert (run.fault or "").startswith(fault or "")
    assert bool(run.fault) == bool(fault)
    json.dumps(run.to_json(), allow_nan=False)


def test_files_that_are_none_are_told_in_a_line(tmp_path: Path) -> None:
    pipe = made(tmp_path / "pipe")
    os.mkfifo(pipe / "metrics.jsonl")
    link = made(tmp_path / "link")
    (link / "metrics.jsonl").symlink_to("/dev/zero")
    text = made(tmp_path / "text", ROWS)
    (text / "config.json").write_text("{")
    none = made(tmp_path / "none", ROWS)
    (none / "config.json").unlink()
    huge = made(tmp_path / "huge")
    with open(huge / "metrics.jsonl", "wb") as file:
        file.truncate(1 << 33)
    faults = {Path(run.path).name: run.fault or "" for run in find_runs(tmp_path)[0]}
    for name, words in {
        "pipe": "a named pipe",
        "link": "link",
        "text": "config.json is damaged",
        "none": "config.json is missing",
        "huge": "bytes",
    }.items():
        assert words in faults[name], name
    assert all("\n" not in fault for fault in faults.values())


def test_a_folder_without_permission_hides_no_other_run(tmp_path: Path, monkeypatch) -> None:
    made(tmp_path / "open", [{"step": 1}])
    made(tmp_path / "closed", [{"step": 1}])
    for path in (tmp_path, *tmp_path.rglob("*")):  # whatever umask an earlier test has left
        path.chmod(0o755)
    (tmp_path / "closed").chmod(0o644)  # its names can be read, its files cannot
    monkeypatch.chdir(tmp_path)  # the folders above may be closed to that user
    find_runs(Path())  # and so may the modules
    root = os.geteuid() == 0
    try:
        if root:
            os.seteuid(65534)
        runs, _ = find_runs(Path())
    finally:
        if root:
            os.seteuid(0)
        (tmp_path / "closed").chmod(0o755)
    assert {run.path: run.state for run in runs} == {"open": "failed", "closed": "unreadable"}


def test_a_long_run_is_read_at_its_end(tmp_path: Path) -> None:
    """30,000 lines of a kilobyte; the best accuracy is among the first."""
    pad = "x" * 900
    with open(made(tmp_path / "a") / "metrics.jsonl", "w") as file:
        for step in range(30_000):
            knn = f', "knn": {0.9 if step == 100 else 0.5}' if step % 100 == 0 else ""
            file.write(f'{{"step": {step}, "pad": "{pad}"{knn}, "images_per_s": {step}}}\n')
    run = only(tmp_path)
    assert (run.step, run.knn, run.knn_best, run.images_per_s) == (29_999, 0.5, 0.9, 29_999)


def test_an_absent_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="none"):
        find_runs(tmp_path / "none")
    assert read_run(tmp_path / "none").state == "unreadable"


def test_no_torch_is_imported() -> None:
    code = "import sys, fastmoco.cli.runs; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
