"""`fastmoco report`: its page in a browser, its watching, and what it refuses."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from fastmoco.distributed.mesh import World
from fastmoco.run.folder import RunFolder
from tests.browser import CHROMIUM, browser
from tests.command_line import main
from tests.fastmoco.run.test_report import hostile_run
from tests.reported_runs import write_run

pytest.importorskip("plotly", reason="plotly is not installed: pip install '.[report]'")


def test_a_page_beside_the_metrics(tmp_path: Path, capsys) -> None:
    run = write_run(tmp_path / "run")
    assert main(["report", str(run), "--no-pictures"]) == 0
    assert capsys.readouterr().out == f"wrote {run / 'report.html'}\n"
    page = (run / "report.html").read_text()
    assert "Left out by --no-pictures." in page
    assert "The configuration is that of the recipe quickstart_digits." in page
    assert 'data-refresh="0"' in page


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["{tmp}/empty"], "contains no metrics.jsonl"),
        (["{tmp}/none"], "none: no such file or folder; give the folder given to fastmoco train"),
        (["{tmp}/a", "{tmp}/b"], "give --out FILE"),
        (["{tmp}/a", "--interval", "1"], "at least 5 seconds"),
        (["{tmp}/a", "--no-pictures", "--chip", "Z80"], "must be one of A100"),
        (["{tmp}/a", "--out", "{tmp}"], "Is a directory"),
        (["{tmp}/a", "--out", "{tmp}/a/metrics.jsonl"], "choose another one"),
        (["{tmp}/a", "--out", "/proc/self/page.html"], "cannot be written; give --out FILE"),
    ],
)
def test_refusals_name_the_cure(tmp_path: Path, capsys, words, said) -> None:
    for name in "ab":
        write_run(tmp_path / name)
    (tmp_path / "empty").mkdir()
    assert main(["report", *(word.format(tmp=tmp_path) for word in words)]) == 2
    assert said in capsys.readouterr().err


def test_watching_ends_with_the_run(tmp_path: Path, capsys, monkeypatch) -> None:
    run = write_run(tmp_path / "run", done=False)
    folder = RunFolder(run)
    folder.acquire()
    pages = []

    def slept(seconds: float) -> None:
        assert seconds >= 30
        pages.append((run / "report.html").read_text())
        if len(pages) == 2:
            folder.mark("DONE")
            folder.release()

    monkeypatch.setattr("time.sleep", slept)
    assert main(["report", str(run), "--no-pictures", "--watch", "--interval", "30"]) == 0
    assert ['data-refresh="30"' in page for page in pages] == [True, True]
    assert 'data-refresh="0"' in (run / "report.html").read_text()
    assert "no run trains any more" in capsys.readouterr().out


def test_a_run_of_another_machine_goes_on_while_its_metrics_grow(
    tmp_path: Path, monkeypatch
) -> None:
    run = write_run(tmp_path / "run", done=False)
    waits = []

    def grown_once(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 1:
            with (run / "metrics.jsonl").open("a") as file:
                file.write('{"step": 121, "loss": 2.0}\n')

    monkeypatch.setattr("time.sleep", grown_once)
    assert main(["report", str(run), "--no-pictures", "--watch"]) == 0
    assert len(waits) == 2


def test_ctrl_c_ends_watching_with_a_page_that_stays(tmp_path: Path, monkeypatch) -> None:
    run = write_run(tmp_path / "run", done=False)

    def interrupted(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("time.sleep", interrupted)
    assert main(["report", str(run), "--no-pictures", "--watch"]) == 0
    assert 'data-refresh="0"' in (run / "report.html").read_text()


@pytest.mark.long
@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_a_real_report_in_a_browser(brief_run, tmp_path: Path) -> None:
    """No error, no request, every chart with all its values, nothing wider than the screen."""
    from fastmoco.training.trainer import Trainer

    config = replace(brief_run, knn=replace(brief_run.knn, test_shards=brief_run.data.shards))
    trainer = Trainer.build(config, tmp_path / "run", World())
    try:
        trainer.run()
    finally:
        trainer.close()
    out = tmp_path / "page.html"
    hostile = hostile_run(tmp_path / "hostile")
    assert main(["report", str(tmp_path / "run"), str(hostile), "--out", str(out)]) == 0

    async def look() -> None:
        async with browser() as tab:
            for width, dark in ((1280, False), (390, True)):
                tab.requests.clear()
                await tab.open(out, width=width, dark=dark)
                plots = await tab.value(
                    "[...document.querySelectorAll('.plot')].map(p => [p.id, p.dataset.wanted,"
                    " p.dataset.points, p.querySelectorAll('.main-svg').length > 0,"
                    " p.scrollWidth <= p.clientWidth])"
                )
                assert len(plots) > 15
                for key, wanted, points, drawn, fits in plots:
                    assert wanted == points, key
                    assert drawn, key
                    assert fits, key
                assert await tab.value("document.documentElement.scrollWidth") == width
                pictures = await tab.value(
                    "[...document.images].filter(i => i.complete && i.naturalWidth > 0).length"
                )
                assert pictures == await tab.value("document.images.length") > 50
                theme = await tab.value("document.documentElement.dataset.theme")
                assert theme == ("dark" if dark else "light")
                assert await tab.value("document.documentElement.dataset.faults || ''") == ""
                assert tab.errors == []
                assert [one for one in tab.requests if not one.startswith("data:")] == [
                    out.as_uri()
                ]

    asyncio.run(look())
