"""The report of runs: what is read, judged and drawn, and that no text of a file becomes a tag."""

from __future__ import annotations

import base64
import gzip
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastmoco.errors import RunError
from fastmoco.run.folder import RunFolder
from fastmoco.run.metrics_file import Series
from fastmoco.run.report import charts
from fastmoco.run.report.charts import FeatureMap
from fastmoco.run.report.figure import Chart
from fastmoco.run.report.health import health_of
from fastmoco.run.report.heat_map import HEAT_PARTS, HIGHEST, LOWEST
from fastmoco.run.report.pictures import Extras, Table, Tile, Tiles
from fastmoco.run.report.reading import dips_of, names_of, read_run
from tests.command_line import main
from tests.reported_runs import PLACES, write_run

pytest.importorskip("plotly", reason="plotly is not installed: pip install '.[report]'")
from fastmoco.run.report.page import render, write_report

HOSTILE = (
    "</script><script>alert(1)</script><img src=http://e.example/x onerror=alert(2)>'\"&{{7*7}}"
)
"""A name that would be a script, a request or a template where it is not escaped."""
PIXEL = "data:image/png;base64,iVBORw0KGgo="


class Tags(HTMLParser):
    """The tags of a page with their attributes, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def figures_of(page: str) -> dict[str, Any]:
    """The figures in a page."""
    packed = page.partition('id="figures">')[2].partition("<")[0]
    return json.loads(gzip.decompress(base64.b64decode(packed)))


def texts_in(value: Any) -> list[str]:
    """Every text in some JSON."""
    if isinstance(value, dict):
        return [text for inner in value.values() for text in texts_in(inner)]
    if isinstance(value, list):
        return [text for inner in value for text in texts_in(inner)]
    return [value] if isinstance(value, str) else []


def without_names(value: Any) -> Any:
    """A figure whose colors are colors instead of names of the page's palette."""
    if isinstance(value, dict):
        return {key: without_names(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [without_names(inner) for inner in value]
    return "#000000" if isinstance(value, str) and value.startswith("@") else value


def every_chart(runs: list[Any]) -> list[Chart]:
    loss = charts.loss_chart(runs)
    assert loss is not None
    return [
        loss,
        *charts.accuracy_charts(runs),
        *charts.schedule_charts(runs),
        *charts.gradient_charts(runs),
        *charts.similarity_charts(runs),
        *charts.speed_charts(runs),
        *charts.memory_charts(runs),
        *charts.other_charts(runs),
    ]


def test_every_figure_is_one_of_plotly(tmp_path: Path) -> None:
    from plotly.graph_objects import Figure

    change = {
        60: {"loss": None, "gradient_norm/heads": None},
        61: {"memory/host_gb": 3.0, "odd": 1.0},
    }
    back = {"step": 80, "time": 1.7e9, "rolled_back_to": 70}
    run = read_run(write_run(tmp_path / "a", spikes={50: 40.0}, change=change, more=(back,)))
    other = read_run(write_run(tmp_path / "b", seed=1))
    features = FeatureMap(
        x=np.arange(6.0, dtype=np.float32),
        y=np.ones(6, np.float32),
        labels=np.array([0, 1, 1, 2, -1, 40]),
        classes=("cat", "dog", "cow"),
        method="PCA",
        step=3,
    )
    for runs in ([run], [run, other]):
        found = [*every_chart(runs), charts.feature_chart(features, "features-0", "")]
        assert len({one.key for one in found}) == len(found)
        for one in found:
            Figure(without_names(dict(one.figure)))  # refuses what plotly does not know
            assert one.points > 0
            assert one.title in one.summary
    shown = {one.key for one in every_chart([run])}
    wanted = {"loss", "accuracy-0", "lr", "ema_momentum", "gradients-0", "norms", "update-ratio"}
    assert wanted | {"cosine", "feature_std", "speed", "wait", "step-time", "loader"} <= shown
    assert {"memory-peaks", "other-0"} <= shown


def test_a_spike_stays_visible_in_a_long_run(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path, steps=12_000, spikes={7001: 50.0}))
    by_key = {one.key: one for one in every_chart([run])}
    highest = run.series["gradient_norm/first_block"].values.max()
    assert highest > 40

    lines = by_key["norms"].figure["data"]
    assert max(max(trace["y"]) for trace in lines) == pytest.approx(highest, rel=1e-4)
    heat, marks = by_key["gradients-0"].figure["data"]
    row = heat["z"][heat["y"].index("first block")]
    step = heat["x"][int(np.argmax(row))]
    assert abs(step - 7001) <= 12_000 / HEAT_PARTS
    assert (marks["name"], marks["x"], marks["y"]) == ("gradient spike", [7001], ["first block"])
    # A series is thinned to some thousand points, whatever its length.
    assert max(len(trace["x"]) for one in by_key.values() for trace in one.figure["data"]) < 2_000


def test_the_heat_map_of_norms_that_explode(tmp_path: Path) -> None:
    """More decades than a float has, and a layer without gradient at one step."""
    norms = [1e-300, 0.0, 1e-300, 1e300]
    change = {step: {"gradient_norm/heads": norm} for step, norm in enumerate(norms, start=1)}
    run = read_run(write_run(tmp_path, steps=4, change=change))
    chart = charts.gradient_charts([run])[0]
    heat = chart.figure["data"][0]
    assert heat["z"][heat["y"].index("heads")] == [0, LOWEST, 0, HIGHEST]
    factors = ["0.1 x", "1 x", "10 x", "100 x", "1,000 x", "10,000 x"]
    assert heat["colorbar"]["ticktext"] == factors


def test_runs_share_the_metrics_of_a_chart_and_look_different(tmp_path: Path) -> None:
    change = {1: {f"gradient_norm/{block}": 1.0 for block in range(20)}}
    paths = [write_run(tmp_path / str(n), steps=3, change=change) for n in range(8)]
    runs = [read_run(path, f"run {n}") for n, path in enumerate(paths)]
    norms = next(chart for chart in charts.gradient_charts(runs[:2]) if chart.key == "norms")
    shown = [row[0].partition(": ") for row in norms.rows]
    first, second = ({what for run, _, what in shown if run == f"run {n}"} for n in (0, 1))
    assert first == second
    assert norms.note.endswith("The first 12 of 24.")
    loss = charts.loss_chart(runs)
    assert loss is not None
    assert len({tuple(trace["line"].items()) for trace in loss.figure["data"]}) == 8


def test_values_to_compare_with_are_those_of_each_run(tmp_path: Path) -> None:
    runs = []
    for name, batch_loss in (("a", 3.9), ("b", 4.2)):
        curves = {"lines": {"loss": {"knows nothing": batch_loss, "same": 3.0}}}
        path = write_run(tmp_path / name, config={"curves": curves})
        runs.append(read_run(path, name))
    chart = charts.loss_chart(runs)
    assert chart is not None
    shown = [note["text"] for note in chart.figure["layout"]["annotations"]]
    assert shown == ["a: knows nothing 3.9", "b: knows nothing 4.2", "same 3"]


def test_runs_of_long_names_have_bars_and_names_of_their_own(tmp_path: Path) -> None:
    paths = [tmp_path / ("x" * 200 + end) for end in ("_lr1", "_lr2")]
    runs = [read_run(write_run(path)) for path in paths]
    charts = {chart.key: chart.figure for chart in every_chart(runs)}
    assert charts["step-time"]["layout"]["yaxis"]["ticktext"] == [
        f"{'x' * 19}…{'x' * 16}_lr{run}: {part}" for run in "12" for part in ("step", "loader")
    ]
    training = charts["step-time"]["data"][0]
    assert training["y"] == [0, 2]
    names = {trace["name"] for trace in charts["loss"]["data"]}
    assert names == {f"{'x' * 19}…{'x' * 16}_lr{run}" for run in "12"}


def test_names_of_values_to_compare_with_do_not_cover_each_other(tmp_path: Path) -> None:
    runs = []
    for name, chance in (("a", 0.1), ("b", 0.1), ("c", 0.103)):
        lines = {"knn": {"chance": chance}}
        curves = {"curves": {"figures": {"knn": "kNN"}, "lines": lines}}
        runs.append(read_run(write_run(tmp_path / name, config=curves)))
    chart = next(chart for chart in every_chart(runs) if chart.key == "accuracy-0")
    layout = chart.figure["layout"]
    assert [shape["y0"] for shape in layout["shapes"]] == [0.1, 0.103]
    assert [note["text"] for note in layout["annotations"]] == ["a and 1 more: chance 10.0%"]
    assert chart.note.endswith(" c: chance: 10.3%.")


def test_a_constant_and_a_single_line_of_a_group_can_be_read(tmp_path: Path) -> None:
    change = {step: {"memory/host_gb": 0.5, "temperature": 0.04} for step in range(1, 121)}
    charts = every_chart([read_run(write_run(tmp_path, change=change))])
    layouts = {chart.title: chart.figure["layout"] for chart in charts}
    assert layouts["Temperature"]["yaxis"]["range"] == pytest.approx([0.038, 0.042])
    assert not layouts["Temperature"]["showlegend"]
    assert layouts["Peak memory so far (GB)"]["showlegend"]


def test_a_norm_that_was_never_finite_is_shown(tmp_path: Path) -> None:
    change = {step: {"gradient_norm/heads": None} for step in range(1, 6)}
    run = read_run(write_run(tmp_path, steps=5, change=change))
    norms = next(chart for chart in charts.gradient_charts([run]) if chart.key == "norms")
    assert ("heads, not finite", "step 1", "step 5", "", "") in norms.rows


def test_dips_are_stretches_below_the_best_value_before() -> None:
    values = np.array([0.5, 0.6, 0.57, 0.55, 0.61, 0.6, 0.7, 0.6])
    found = dips_of(Series(np.arange(8) * 10, values))
    assert [(dip.step, dip.best, dip.recovered) for dip in found] == [
        (30, 0.6, True),
        (70, 0.7, False),
    ]


@pytest.mark.parametrize(
    ("options", "verdict", "reason"),
    [
        ({}, "healthy", "its best 80.0% at step 120"),
        ({"knn": {}}, "healthy", "no accuracy was measured"),
        ({"change": {120: {"loss": None}}}, "not healthy", "the last loss"),
        (
            {"change": {60: {"loss": None}}},
            "look at it",
            "the loss was not finite in 1 logged step",
        ),
        ({"knn": {0: 0.2, 60: 0.7, 120: 0.6}}, "not healthy", "10.0 points below its best"),
        (
            {"knn": {0: 0.2, 60: 0.7, 90: 0.6, 120: 0.8}},
            "look at it",
            "1 dip of more than 2 points",
        ),
        ({"spikes": {50: 40.0}}, "look at it", "gradient spikes in 1 step, from step 50"),
        (
            {"change": {step: {"feature_std": 1e-4} for step in range(100, 121)}},
            "not healthy",
            "the features have collapsed",
        ),
        (
            {"change": {step: {"feature_std": 2e-3} for step in range(1, 121)}},
            "healthy",
            "of an even one, and tells images apart",
        ),
        (
            {"change": {step: {"wait_share": 0.5} for step in range(1, 121)}},
            "look at it",
            "waited 50% of the time",
        ),
        ({"steps": 12, "done": False}, "too early", "12 logged steps: too early to judge"),
        (
            {"change": {step: {"loss": 4.5} for step in range(60, 121)}},
            "look at it",
            "to 4.5, above 3.9 for knowing nothing",
        ),
    ],
)
def test_the_verdict_and_its_reasons(tmp_path, options, verdict, reason) -> None:
    found = health_of(read_run(write_run(tmp_path, **options)))
    assert found.verdict == verdict
    assert any(reason in said for said in found.reasons), found.reasons


def test_features_that_no_loss_spreads_are_not_judged(tmp_path: Path) -> None:
    """Masked methods log the spread of the encoder's features, and no cosines of pairs."""
    path = write_run(tmp_path, change={step: {"feature_std": 1e-4} for step in range(1, 121)})
    lines = (path / "metrics.jsonl").read_text().replace('"cosine/', '"other/')
    (path / "metrics.jsonl").write_text(lines)
    run = read_run(path)
    assert health_of(run).verdict == "healthy"
    spread = next(chart for chart in every_chart([run]) if chart.key == "feature_std")
    assert not spread.figure["layout"]["shapes"]


def test_an_event_of_collapse_is_grave(tmp_path: Path) -> None:
    event = {"name": "collapse", "layer": None, "size": 0.01, "text": "features are collapsing"}
    run = read_run(write_run(tmp_path, more=({"step": 100, "time": 1.7e9, "event": event},)))
    assert health_of(run).verdict == "not healthy"
    assert health_of(run).reasons[0] == "step 100: features are collapsing"


@pytest.mark.parametrize(
    ("knn", "verdict"),
    [
        ({0: 0.1, 60: 0.11, 120: 0.115}, "not healthy"),
        ({0: 0.1, 60: 0.7, 120: 0.7}, "not healthy"),
        ({0: 0.1, 60: 0.11, 120: 0.7}, "look at it"),
    ],
)
def test_a_run_that_learns_after_all_has_recovered(tmp_path, knn, verdict) -> None:
    event = {"name": "no_learning", "layer": None, "size": 2.3, "text": "it learns nothing"}
    run = read_run(write_run(tmp_path, knn=knn, more=({"step": 70, "event": event},)))
    found = health_of(run)
    assert (found.verdict, found.reasons[0]) == (verdict, "step 70: it learns nothing")


def test_spikes_of_earlier_versions_are_events_once(tmp_path: Path) -> None:
    spike = {"step": 50, "time": 1.7e9, "spike/first_block": 44.0, "spike/total": None}
    run = read_run(write_run(tmp_path, spikes={50: 40.0}, more=(spike,)))
    assert [(one.name, one.layer, one.size) for one in run.events] == [
        ("gradient_spike", "first_block", 40.0),
        ("gradient_not_finite", "total", None),
    ]
    assert not any(name.startswith("spike/") for name in (*run.series, *run.lost))


def hostile_run(folder: Path) -> Path:
    event = {"name": HOSTILE, "layer": HOSTILE, "size": 1.0, "text": HOSTILE}
    config = {
        "config": {"recipe": HOSTILE, "model": {HOSTILE: HOSTILE}, "global_batch_size": 64},
        "resolved": {"total_steps": 120, "versions": {HOSTILE: HOSTILE}},
        "curves": {"figures": {"knn": HOSTILE}, "lines": {"loss": {HOSTILE: 3.0}}},
    }
    change = {60: {HOSTILE: 1.0, f"gradient_norm/{HOSTILE}": 2.0, f"cosine/{HOSTILE}": 0.1}}
    return write_run(
        folder,
        change=change,
        config=config,
        more=({"step": 100, "time": 1.7e9, "event": event},),
    )


def test_no_text_of_a_file_becomes_a_tag_or_a_script(tmp_path: Path) -> None:
    run = read_run(hostile_run(tmp_path / "run"), HOSTILE)
    other = read_run(write_run(tmp_path / "other"), "plain")
    tiles = Tiles(rows=[[Tile(source=PIXEL, alt=HOSTILE, caption=HOSTILE)]], note=HOSTILE)
    extras = Extras(
        views=tiles,
        neighbours=Tiles(why=HOSTILE),
        attention=tiles,
        features=FeatureMap(
            x=np.zeros(2, np.float32),
            y=np.zeros(2, np.float32),
            labels=np.array([0, 0]),
            classes=(HOSTILE,),
            method=HOSTILE,
            step=1,
        ),
        checkpoints=Table(head=[HOSTILE], rows=[[HOSTILE]], note=HOSTILE),
        differences=Table(why=HOSTILE),
        environment=Table(head=[HOSTILE], rows=[[HOSTILE]]),
        speed=[HOSTILE],
        memory=[HOSTILE],
    )
    harmless = render([other, other], [Extras(), Extras()])
    page = render([run, other], [extras, Extras()], refresh_s=30)
    found, known = Tags(page), Tags(harmless)

    # The scripts are those of the page; no tag is one that the page itself does not write.
    assert [tag for tag, _ in found.tags].count("script") == 3
    assert {tag for tag, _ in found.tags} <= {tag for tag, _ in known.tags} | {"img", "meta"}
    for tag, attributes in found.tags:
        assert not any(name.startswith("on") for name in attributes)
        if tag == "img":
            assert attributes["src"] == PIXEL
        if tag in ("a", "link"):
            assert (attributes["href"] or "").startswith(("#", "data:,"))
    assert "49" not in found.text.partition("{{7*")[0][-2:]
    assert found.text.count("alert(1)") > 10  # the name is shown as what it is

    # plotly reads tags in texts, too.
    said = texts_in(figures_of(page))
    assert any("&lt;/script&gt;" in text for text in said)
    assert not any("<" in text for text in said if not text.endswith("<extra></extra>"))


def test_no_page_has_a_password_in_its_charts_or_tables(tmp_path: Path) -> None:
    event = {
        "name": "lost",
        "layer": None,
        "size": 1.0,
        "text": "https://ann:hush-hush@h/x is gone",
    }
    run = read_run(write_run(tmp_path, more=({"step": 9, "event": event},)))
    page = render([run], [Extras()])
    said = [*texts_in(figures_of(page)), Tags(page).text]
    assert any("is gone" in text for text in said)
    assert not any("hush-hush" in text for text in said)


def test_a_page_stays_small_whatever_the_files_hold(tmp_path: Path) -> None:
    """Long texts, and many figures, fields and names of events."""
    events = tuple(
        {"step": n, "event": {"name": f"e{n}", "layer": None, "size": 1.0, "text": "x" * 50_000}}
        for n in range(100)
    )
    change = {1: {f"figure{n}": 0.5 for n in range(2000)} | {"loss" + "x" * 50_000: 1.0}}
    config = {
        "config": {f"field{n}": n for n in range(50_000)},
        "curves": {"figures": {f"figure{n}": "a" for n in range(2000)}},
    }
    run = read_run(write_run(tmp_path, steps=3, change=change, config=config, more=events))
    found = render([run], [Extras()])
    assert len(found) < 2.6e6
    for said in ("The first 1000 of 50000 rows.", "1,962 more are in metrics.jsonl alone."):
        assert said in found


def test_the_page_refuses_the_network(tmp_path: Path) -> None:
    page = render([read_run(write_run(tmp_path))], [Extras()])
    assert "http://" not in page
    assert "https://" not in page
    policy = next(
        a for tag, a in Tags(page).tags if a.get("http-equiv") == "Content-Security-Policy"
    )
    assert "default-src 'none'" in policy["content"]
    assert "connect-src" not in policy["content"]


def test_pages_are_small_and_whole(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", steps=3_000))
    out = write_report([run], [Extras()], tmp_path / "deep" / "page.html")
    assert out.stat().st_size < 3e6
    assert [path.name for path in out.parent.iterdir()] == ["page.html"]
    found = Tags(out.read_text())
    plots = [a for _, a in found.tags if a.get("class") == "plot"]
    figures = figures_of(out.read_text())
    assert {a["id"] for a in plots} == set(figures)
    assert all(
        a["aria-label"] and int(a["data-wanted"]) == figures[a["id"]]["points"] for a in plots
    )


def test_several_runs_are_side_by_side_with_what_differs(tmp_path: Path) -> None:
    first = write_run(tmp_path / "x" / "run")
    second = write_run(tmp_path / "y" / "run", config={"config": {"seed": 7}})
    assert names_of([first, second]) == ["x/run", "y/run"]
    assert names_of([first, first]) == ["run", "run (2)"]
    runs = [read_run(path, name) for path, name in zip((first, second), "ab", strict=True)]
    page = render(runs, [Extras(), Extras()])
    assert "What differs in their configuration" in page
    names = {trace["name"] for trace in figures_of(page)["loss"]["figure"]["data"]}
    assert names == {"a", "b"}


def test_a_run_without_config_momentum_or_norms_still_has_a_page(tmp_path: Path) -> None:
    lines = ['{"step": 1, "loss": 2.0, "lr": 0.1}', '{"st', '{"step": 2, "loss": 1.9, "lr": 0.1}']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    run = read_run(tmp_path)
    assert any("config.json is missing" in note for note in run.notes)
    assert any("1 line left out" in note for note in run.notes)
    text = Tags(render([run], [Extras()])).text
    assert "No gradient norm is recorded." in text
    assert "this method has no momentum encoder" in text


def test_a_run_before_its_first_step_has_a_page(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", done=False)
    (path / "metrics.jsonl").unlink()
    run = read_run(path)
    assert health_of(run).verdict == "too early"
    assert "metrics.jsonl is missing: no step is logged." in Tags(render([run], [Extras()])).text
    (path / "metrics.jsonl").touch()
    assert health_of(read_run(path)).verdict == "too early"


def test_a_run_that_ends_while_it_is_read_is_read_again(tmp_path: Path, monkeypatch) -> None:
    """Its state is that of before: the last lines may be missing."""
    path = write_run(tmp_path, done=False)
    monkeypatch.setattr(
        "fastmoco.run.report.reading.read_events",
        lambda *_, **__: (path / "DONE").write_text("\n") and [],
    )
    assert read_run(path).state == "failed"
    assert read_run(path).state == "finished"


def test_a_folder_without_metrics_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"contains no metrics\.jsonl"):
        read_run(tmp_path)


def test_the_state_of_a_run_is_that_of_the_list(tmp_path: Path, capsys) -> None:
    run = write_run(tmp_path, done=False)

    def state() -> str:
        """The state, which must be the same in the page and in the list."""
        found = read_run(run)
        assert main(["runs", str(run), "--json"]) == 0
        [line] = json.loads(capsys.readouterr().out)
        assert line["state"] == found.state
        assert f"quickstart_digits · {found.state}" in Tags(render([found], [Extras()])).text
        return found.state

    (run / "lock").write_text("1")
    assert state() == "failed"
    folder = RunFolder(run)
    folder.acquire()
    assert state() == "running"
    folder.release()
    saved = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(saved | {"host": "node7"}))
    assert state() == "elsewhere"
    (run / "PREEMPTED").write_text("\n")
    assert state() == "stopped"
    (run / "DONE").write_text("\n")
    assert state() == "finished"
    for mark in ("DONE", "PREEMPTED", "metrics.jsonl"):
        (run / mark).unlink()
    (run / "config.json").write_text(json.dumps(saved))
    assert state() == "not begun"


def test_a_line_that_is_being_written_is_no_damage_before_the_run_has_ended(tmp_path: Path) -> None:
    run = write_run(tmp_path, done=False)
    whole = (run / "metrics.jsonl").read_bytes()
    torn = b'{"step": 121, "event": {"na'
    (run / "metrics.jsonl").write_bytes(whole + torn)
    assert read_run(run).notes == []
    (run / "DONE").write_text("\n")
    assert read_run(run).notes == [
        f"{run}/metrics.jsonl ends within a line, although the run has ended."
    ]
    (run / "DONE").unlink()
    for damaged in (torn + b"\n", torn + b"\0" * 10, b"\0" * 10, b"at"):
        (run / "metrics.jsonl").write_bytes(whole + damaged)
        assert "1 line left out" in read_run(run).notes[0], damaged


def test_places_keep_their_order(tmp_path: Path) -> None:
    inside = write_run(tmp_path / "run") / "checkpoints"
    inside.mkdir()
    run = read_run(inside / "..")
    assert run.name == "run"
    assert tuple(run.prefixed("gradient_norm/")) == PLACES


@pytest.mark.filterwarnings("error")
def test_a_page_of_whatever_is_in_the_config_and_the_metrics(tmp_path: Path) -> None:
    odd = "\ud800\x1b$\\bad$\n" * 100
    row: dict[str, Any] = {"step": 2**62, "time": 1e308, "loss": 1e308, "knn": "x", odd: 1}
    row |= {f"gradient_norm/{number}": number for number in range(200)}
    row |= {"gradient_norm/wide": 1e308, "images_per_s": 0, "wait_share": -1e308, "feature_std": 1}
    first = {
        "step": -(2**62),
        "time": -1e308,
        "loss": -1e308,
        "knn": 0.5,
        "gradient_norm/wide": 1e-300,
    }
    event = {"step": 5, "event": {"name": odd, "layer": odd, "size": 10**400, "text": odd}}
    lines = [json.dumps(one) for one in (first, row, event, {"step": 6, "rolled_back_to": 1e308})]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    configs: list[object] = [
        {"config": {"recipe": [odd], "model": {"projection_dim": [1]}, "global_batch_size": True}},
        {"config": {"model": [1]}, "resolved": {"total_steps": 10**400, "versions": [odd]}},
        {
            "config": [],
            "curves": {"figures": {"knn": odd, "loss": odd}, "lines": {"loss": {odd: 1}}},
        },
        {"curves": 7, "config": {"model": {"projection_dim": 10**400}}, "resolved": 3},
    ]
    for config in configs:
        (tmp_path / "config.json").write_text(json.dumps(config))
        run = read_run(tmp_path, odd)
        page = render([run, run], [Extras(), Extras()])
        assert len(page.encode()) < 5e6
