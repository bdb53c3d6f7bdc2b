"""`fastmoco runs`: a table, blocks in a narrow window, JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("tyro", reason="tyro is not installed")

from tests.command_line import main


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name, step in (("first", 20), ("second", 1300)):
        path = Path("runs") / name
        path.mkdir(parents=True)
        saved = {
            "config": {"recipe": "quickstart_digits"},
            "resolved": {"total_steps": 6500},
            "run_id": "0" * 14,
        }
        (path / "config.json").write_text(json.dumps(saved))
        rows = [{"step": 0, "knn": 0.5}, {"step": step, "knn": 0.4, "images_per_s": 1234.5}]
        (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (Path("runs") / "first" / "DONE").touch()
    return Path("runs")


def test_a_table_and_json_of_the_default_folder(runs: Path, capsys) -> None:
    assert main(["runs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == [
        "run",
        "state",
        "step",
        "kNN",
        "best",
        "images/s",
        "written",
        "recipe",
    ]
    by_name = {line.split()[0]: line.split() for line in lines[2:]}
    assert by_name["first"][1:6] == ["finished", "20/6,500", "40.0%", "50.0%", "1,234"]
    assert by_name["second"][1:3] == ["failed", "1,300/6,500"]
    assert by_name["second"][-1] == "quickstart_digits"
    assert main(["runs", str(runs), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {one["path"]: one["state"] for one in found} == {
        "runs/first": "finished",
        "runs/second": "failed",
    }


def test_names_with_brackets_are_shown_as_they_are(runs: Path, capsys) -> None:
    (runs / "a[").mkdir()
    (runs / "first").rename(runs / "a[" / "lr]")  # a[/lr] would end a style
    (runs / "second").rename(runs / "sweep[lr]")
    assert main(["runs"]) == 0
    assert {"a[/lr]", "sweep[lr]"} <= set(capsys.readouterr().out.split())


def test_a_narrow_window_cuts_nothing(runs: Path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal
    monkeypatch.setenv("NO_COLOR", "1")
    assert main(["runs"]) == 0
    text = capsys.readouterr().out
    for words in ("second  failed", "1,300/6,500", "quickstart_digits", "best 50.0%"):
        assert words in text
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 40


def test_faults_and_empty_folders(runs: Path, capsys) -> None:
    (runs / "second" / "config.json").write_text("{")
    (runs / "second" / "metrics.jsonl").write_text("\x1b[31m\n")
    assert main(["runs"]) == 0
    text = capsys.readouterr().out
    assert "second: config.json is damaged; metrics.jsonl has no line of metrics at its end" in text
    empty = runs / "empty"
    empty.mkdir()
    assert main(["runs", str(empty)]) == 0
    assert capsys.readouterr().out == "no runs in runs/empty or below\n"
    assert main(["runs", "none"]) == 2
    assert "none: No such file or directory" in capsys.readouterr().err
