"""The quickstart on a shorter schedule: everything it promises to leave behind, and the same call
again."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fastmoco.cli import quickstart as module
from fastmoco.recipes import quickstart_digits
from fastmoco.run.folder import RunFolder


@pytest.mark.slow
def test_quickstart_leaves_pictures_and_an_honest_summary(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        module, "quickstart_digits", lambda: replace(quickstart_digits(), epochs=6, threads=1)
    )
    out = tmp_path / "quickstart"
    assert module.quickstart(out) == 0
    text = capsys.readouterr().out
    for promised in ("random encoder", "after training", "raw pixels", "--data.images YOUR_IMAGES"):
        assert promised in text
    for picture in (out / "views.png", out / "run" / "curves.png"):
        assert picture.read_bytes().startswith(b"\x89PNG")
    accuracies = [value for _, value in RunFolder(out / "run").read_metric("knn")]
    assert accuracies[-1] > accuracies[0]
    before = (out / "run" / "metrics.jsonl").read_text()
    assert module.quickstart(out) == 0
    assert (out / "run" / "metrics.jsonl").read_text() == before
