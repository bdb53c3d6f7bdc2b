"""Tile choices: measured once, kept on disk, never measured where results must not depend on a
clock."""

from __future__ import annotations

import json
import os

import pytest
import torch

from fastmoco_kernels import tuning

TILES = [(64, 4), (128, 8)]
CUDA = torch.device("cuda")


@pytest.fixture
def on_a_gpu(monkeypatch, tmp_path):
    """As on a GPU on which the second tile is the fastest; records what was measured."""
    measured: list[str] = []

    def fastest(key, candidates, default, run):
        measured.append(key)
        return candidates[1]

    path = tmp_path / "cache" / "gpu.json"
    monkeypatch.setattr(tuning, "_fastest", fastest)
    monkeypatch.setattr(tuning, "_cache_file", lambda device: path)
    monkeypatch.setattr(tuning, "_chosen", {})
    monkeypatch.setattr(tuning, "_read", set())
    monkeypatch.setattr(tuning, "_settled", {})
    monkeypatch.setattr(tuning, "interpreting", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    torch.use_deterministic_algorithms(False)
    return path, measured


def _tuned(shape=(4096, 256), device=CUDA):
    return tuning.tuned("main", shape, TILES, TILES[0], lambda tile: None, device)


def test_a_shape_is_measured_once_and_remembered_by_the_next_process(on_a_gpu, monkeypatch):
    path, measured = on_a_gpu
    assert _tuned() == _tuned() == TILES[1]
    assert measured == ["main(4096, 256)"]
    assert json.loads(path.read_text()) == {"main(4096, 256)": [128, 8]}
    assert tuning.choices() == {"gpu": {"main(4096, 256)": [128, 8]}}
    monkeypatch.setattr(tuning, "_chosen", {})
    monkeypatch.setattr(tuning, "_read", set())
    monkeypatch.setattr(tuning, "_settled", {})
    assert _tuned() == TILES[1]
    assert len(measured) == 1


def test_what_another_process_wrote_meanwhile_is_kept(on_a_gpu):
    path, _ = on_a_gpu
    _tuned()
    path.write_text(json.dumps({"main(8, 8)": [64, 4]}))
    _tuned(shape=(16, 16))
    assert json.loads(path.read_text()) == {
        "main(16, 16)": [128, 8],
        "main(4096, 256)": [128, 8],
        "main(8, 8)": [64, 4],
    }


def test_a_remembered_tile_that_is_no_candidate_any_more_is_measured_again(on_a_gpu):
    path, measured = on_a_gpu
    path.parent.mkdir()
    path.write_text(json.dumps({"main(4096, 256)": [32, 1]}))
    assert _tuned() == TILES[1]
    assert len(measured) == 1


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[1]",
        '{"main(4096, 256)": "x"}',
        '{"main(4096, 256)": null}',
        '{"main(4096, 256)": [1e400, 2]}',
        '{"main(4096, 256)": [true, -1]}',
        '{"main(4096, 256)": ' + "[" * 200_000,
        " " * (17 << 20),
    ],
    ids=len,
)
def test_a_broken_file_costs_a_measurement_and_no_more(on_a_gpu, text):
    path, measured = on_a_gpu
    path.parent.mkdir()
    path.write_text(text)
    assert _tuned() == TILES[1]
    assert len(measured) == 1


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("/dev/zero")])
def test_what_is_no_file_costs_a_measurement_and_no_more(on_a_gpu, make):
    path, measured = on_a_gpu
    path.parent.mkdir()
    make(path)
    before = len(os.listdir("/proc/self/fd"))
    assert _tuned() == TILES[1]
    assert len(measured) == 1
    assert len(os.listdir("/proc/self/fd")) <= before


def test_nothing_is_measured_where_the_clock_must_not_decide(on_a_gpu, monkeypatch):
    _, measured = on_a_gpu
    assert _tuned(device=torch.device("cpu")) == TILES[0]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert _tuned() == TILES[0]
    torch.use_deterministic_algorithms(True)
    assert _tuned() == TILES[0]
    assert measured == []


def test_a_disk_that_cannot_be_written_is_reported_and_survived(on_a_gpu, caplog):
    path, _ = on_a_gpu
    path.parent.write_text("a file where the folder should be")
    assert _tuned() == TILES[1]
    assert "is not written" in caplog.text
