"""`fastmoco data check`, `data stats` and `data index`: what they print, write and return."""

from __future__ import annotations

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from fastmoco.cli import main


def image(i: int, size: tuple[int, int] = (48, 40)) -> bytes:
    coarse = np.random.default_rng(i).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(coarse).resize(size).save(out, "JPEG")
    return out.getvalue()


@pytest.fixture
def shards(tmp_path):
    """Six labelled images, class names in .txt."""
    with tarfile.open(tmp_path / "set-00.tar", "w") as tar:
        for i in range(6):
            for name, data in ((f"{i}.jpg", image(i)), (f"{i}.txt", [b"cat", b"[red]owl"][i % 2])):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return tmp_path / "set-00.tar"


def test_index_check_and_stats_of_a_foreign_set(shards, capsys):
    assert main(["data", "check", str(shards), "--workers", "1"]) == 0
    text = capsys.readouterr().out
    assert "6 samples = 6 delivered + 0 quarantined" in text
    assert "note: set-00.tar: has no index beside it" in text
    assert main(["data", "index", str(shards)]) == 0
    text = capsys.readouterr().out
    assert "6 images in 1 shards indexed, 0 members skipped" in text
    assert "labels of 6 from .txt, 2 class names" in text
    assert main(["data", "check", str(shards), "--workers", "1"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "clean"
    assert main(["data", "stats", str(shards)]) == 0
    text = capsys.readouterr().out
    for words in (
        "6 images in 1 shards",
        "width (pixels)",
        "bits per pixel",
        "formats: JPEG 6",
        "2 classes: [red]owl 3, cat 3",
    ):
        assert words in text


def test_faults_are_printed_escaped_and_written(shards, tmp_path, capsys):
    with tarfile.open(shards, "a") as tar:
        for name, data in (("x\x1b]0;evil\x07.jpg", image(1)), ("[bold]y.jpg", b"<html>"), ("z.jpg", image(9)[:-200])):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    report = tmp_path / "reports" / "report.json"
    assert main(["data", "check", str(shards), "--json", str(report), "--workers", "1"]) == 1
    text = capsys.readouterr().out
    assert "\x1b" not in text
    assert "\x07" not in text
    assert "set-00.tar: [bold]y.jpg: its content is no JPEG, PNG or WebP [left out]" in text
    assert "7 samples = 6 delivered + 1 quarantined" in text
    assert "2 further samples left out" in text
    content = json.loads(report.read_text())
    assert content["counts"] == {"no image": 1, "damaged image": 1, "unsafe name": 1}
    assert (tmp_path / "quarantine.jsonl").exists()
    assert main(["data", "check", str(shards), "--show", "1", "--workers", "1", "--no-quarantine"]) == 1
    assert "... and 2 more (--show N prints more" in capsys.readouterr().out


@pytest.mark.parametrize("verb", ["check", "stats", "index"])
def test_a_pattern_without_files_is_refused_in_one_line(verb, tmp_path, capsys):
    assert main(["data", verb, str(tmp_path / "none-*.tar")]) == 2
    error = capsys.readouterr().err
    assert "none-" in error
    assert len(error.strip().splitlines()) == 1


def test_a_label_field_chooses_json(shards, capsys):
    assert main(["data", "index", str(shards), "--labels", "txt", "--label-field", "x"]) == 2
    assert "label_field='x'" in capsys.readouterr().err
    assert main(["data", "index", str(shards), "--label-field", "x"]) == 0
    assert "no labels" in capsys.readouterr().out


def test_stats_draw_a_picture(shards, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert main(["data", "index", str(shards)]) == 0
    assert main(["data", "stats", str(shards), "--out", str(tmp_path / "stats.png")]) == 0
    assert (tmp_path / "stats.png").read_bytes()[:4] == b"\x89PNG"


def test_help_names_the_verbs(capsys):
    assert main(["data"]) == 0
    text = capsys.readouterr().out
    assert "fastmoco data check" in text
    assert "fastmoco data stats" in text
