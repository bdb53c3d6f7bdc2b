"""`metrics.jsonl` as a stream, against the rules for a whole file in memory."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest

from fastmoco.run import metrics_file
from fastmoco.run.folder import RunFolder
from fastmoco.run.metrics_file import cut_back, read_series
from fastmoco_pipelines.files.small import UnfitFileError

INVALID = ['{"step": 3, "lo', "[1]", '{"loss": 1}', "7", "", '{"step": null}', '{"step": NaN}']


def merged(path: Path) -> list[dict[str, Any]]:
    """The reference: all rows, merged by step, the last value first in importance."""
    rows: dict[int, dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
            step = int(row["step"])
        except (ValueError, KeyError, TypeError):
            continue
        rows.setdefault(step, {}).update(row)
    return [rows[step] for step in sorted(rows)]


def series_of(rows: list[dict[str, Any]], name: str) -> list[tuple[int, float]]:
    """The reference: steps and finite values of one metric."""
    found = [(row["step"], row[name]) for row in rows if isinstance(row.get(name), int | float)]
    return [(step, value) for step, value in found if math.isfinite(value)]


def trimmed(text: str, step: int) -> tuple[str, int]:
    """The reference: the text that remains, and the number of lines removed."""

    def step_of(line: str) -> float:
        try:
            return float(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError):
            return math.inf

    lines = text.splitlines()
    kept = [line for line in lines if step_of(line) <= step]
    if len(kept) == len(lines):
        return text, 0
    return "".join(f"{line}\n" for line in kept), len(lines) - len(kept)


def random_text(draw: random.Random, *, in_order: bool, damage: float) -> str:
    """Lines as killed and resumed runs leave them, some of them invalid."""
    steps = [draw.randrange(40) for _ in range(draw.randrange(60))]
    lines = []
    for step in sorted(steps) if in_order else steps:
        row: dict[str, Any] = {"step": step}
        for name in ("loss", "knn", "gradient_norm/total", "lr"):
            if draw.random() < 0.6:
                row[name] = draw.choice([1, 0.5, None, math.nan, "text", True, draw.random()])
        lines.append(json.dumps(row))
        if draw.random() < damage:
            lines.append(draw.choice(INVALID))
    return "\n".join(lines) + draw.choice(["\n", ""])


@pytest.mark.parametrize("seed", range(30))
def test_series_equal_those_of_rows_in_memory(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    path = tmp_path / "m"
    path.write_text(random_text(draw, in_order=seed % 2 == 0, damage=0.1))
    expected = {
        name: pairs
        for name in ("loss", "knn", "gradient_norm/total")
        if (pairs := series_of(merged(path), name))
    }
    found = read_series(path, lambda name: name != "lr" and name != "step")
    assert {
        name: list(zip(one.steps.tolist(), one.values.tolist(), strict=True))
        for name, one in found.items()
    } == expected


def test_bytes_that_are_no_text_and_numbers_without_a_place_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "m"
    huge = "9" * 400
    path.write_bytes(
        b'{"step": 1, "loss": 2.0}\n\0\0\0\0\n{"step": 2, "lo\xff\n'
        + f'{{"step": {huge}, "loss": 1}}\n{{"step": Infinity, "loss": 1}}\n'.encode()
        + f'{{"step": 3, "loss": {huge}}}\n{{"step": 4, "loss": 1.0}}'.encode()
    )
    found = read_series(path, lambda name: name == "loss")["loss"]
    assert found.steps.tolist() == [1, 4]
    assert RunFolder(tmp_path).read_metric("loss") == []
    path.rename(tmp_path / "metrics.jsonl")
    assert RunFolder(tmp_path).trim_metrics(1) == 6
    assert (tmp_path / "metrics.jsonl").read_bytes() == b'{"step": 1, "loss": 2.0}\n'


@pytest.mark.parametrize("block", [1, 7, 64, 2**20])
@pytest.mark.parametrize("seed", range(24))
def test_a_file_is_cut_back_as_if_every_line_were_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int, seed: int
) -> None:
    """In order and not, torn and not, blocks shorter than a line and longer than the file."""
    monkeypatch.setattr(metrics_file, "BLOCK", block)
    draw = random.Random(seed)
    text = random_text(draw, in_order=seed % 3 > 0, damage=0.1 * (seed % 2))
    folder = RunFolder(tmp_path)
    for step in (-1, 0, 17, 39, 40):
        folder.metrics.write_text(text)
        expected, removed = trimmed(text, step)
        assert folder.trim_metrics(step) == removed
        assert folder.metrics.read_text() == expected
        assert folder.trim_metrics(step) == 0


def test_only_the_end_of_a_file_in_order_is_read_and_it_stays_the_same_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(tmp_path)
    lines = [json.dumps({"step": step, "loss": 0.5}) + "\n" for step in range(200_000)]
    folder.metrics.write_text("".join(lines) + '{"step": 200')
    inode = folder.metrics.stat().st_ino
    parsed = []
    real = metrics_file.step_of
    monkeypatch.setattr(metrics_file, "step_of", lambda line: parsed.append(line) or real(line))
    assert folder.trim_metrics(199_900) == 100
    assert len(parsed) < 60_000  # of 6.7 MB, one megabyte and a block
    assert folder.metrics.read_text() == "".join(lines[:199_901])
    assert folder.metrics.stat().st_ino == inode


@pytest.mark.parametrize("bad", ['{"step": 9, "lo', '{"step": 90, "loss": 1}'])
def test_a_bad_line_before_a_good_one_leads_to_a_check_of_every_line(
    tmp_path: Path, bad: str
) -> None:
    """The file is replaced as a whole: a kill leaves the old one."""
    folder = RunFolder(tmp_path)
    good = [json.dumps({"step": step}) for step in range(10)]
    folder.metrics.write_text("\n".join([*good[:9], bad, good[9]]))
    with folder.metrics.open() as old:
        assert folder.trim_metrics(50) == 1
        assert bad in old.read()
    assert folder.metrics.read_text() == "\n".join(good) + "\n"
    assert folder.metrics.stat().st_mode & 0o777 == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_metric_is_read_from_the_lines_that_have_it(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert folder.read_metric("knn") == []
    folder.metrics.write_text(
        '{"step": 1, "knn": 0.5}\n{"step": 1, "knn": 0.25, "loss": 1}\n{"step": 2, "knn": null}\n'
        '{"step": 3, "loss": 4}\n{"knn": 0.1}\n{"step": 4, "kn\n{"step": 0, "knn": 1}\n'
    )
    assert folder.read_metric("knn") == [(1, 0.5), (1, 0.25), (0, 1.0)]


def test_a_step_is_a_whole_number(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        "".join(f'{{"step": {step}, "loss": 1}}\n' for step in ("1", "2.0", "2.5", "true"))
    )
    told: list[str] = []
    assert read_series(path, lambda name: True, tell=told.append)["loss"].steps.tolist() == [1, 2]
    assert "2 lines left out" in told[0]


def test_different_metrics_and_lines_are_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each takes memory or time, and a file of 4 GB has room for hundreds of millions."""
    for name, most in (("MOST_METRICS", 5), ("MOST_LINES", 40), ("MOST_ODD_LINES", 20)):
        monkeypatch.setattr(metrics_file, name, most)
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": 1} | {f"name{number}": 1 for number in range(7)}, {"step": 2, "name0": 5}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    told: list[str] = []
    found = read_series(path, lambda name: True, tell=told.append)
    assert len(found) == 5
    assert found["name0"].values.tolist() == [1, 5]
    assert "3 values left out, of more than 5 different metrics" in told[0]

    # Whatever reads them, in either direction.
    for lines, words in (("\n" * 25, "20 lines without"), ('{"step": 9}\n' * 45, "40 lines")):
        path.write_text('{"step": 1}\n' + lines)
        before = path.read_bytes()
        for read in (lambda: read_series(path, lambda name: True), lambda: cut_back(path, 1)):
            with pytest.raises(UnfitFileError, match=f"more than {words}.*move it away"):
                read()
        assert path.read_bytes() == before
