"""The benchmark runner: options, turns, ratios, and one case end to end on a small scale."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import command, roofline, soak
from benchmarks.case import Case, parse_options
from benchmarks.cases import checkpoint_stall, knn, train_step, train_vs_synthetic, view_color
from benchmarks.command import main
from benchmarks.gpu import carry
from benchmarks.measure import interleave, ratios
from benchmarks.registry import CASES
from fastmoco.objectives import MoCoV3
from fastmoco_pipelines.text import first_sentence


def test_list_names_every_case_and_its_options(capsys):
    assert main(["list"]) == 0
    text = capsys.readouterr().out
    for name, case in CASES.items():
        assert name in text
        assert all(f"{option}=" in text for option in case.defaults)
    cases = [line for line in text.splitlines() if not line.startswith(" ")]
    assert len(cases) == len(CASES)
    assert not [line for line in cases if not line.endswith(".")]


@pytest.mark.parametrize("program", [soak, roofline, carry])
def test_help_describes_the_program_in_a_whole_sentence(program, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit):
        program.main(["--help"])
    described = " ".join(capsys.readouterr().out.split())
    assert first_sentence(program.__doc__).endswith(".")
    assert first_sentence(program.__doc__) in described


def test_options_take_the_type_of_their_default():
    assert parse_options(["rounds=3", "recipe=x"], {"rounds": 7, "recipe": "", "steps": 1}) == {
        "rounds": 3,
        "recipe": "x",
        "steps": 1,
    }


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("round=3", r"no option 'round' \(near: rounds\)"),
        ("speed=3", r"'speed' \(known: rounds\)"),
        ("rounds", "'rounds': give rounds=<int>"),
        ("rounds=x", "'rounds=x': give rounds=<int>"),
    ],
)
def test_an_option_that_is_not_understood_is_refused_by_name(word, said):
    with pytest.raises(SystemExit, match=said):
        parse_options([word], {"rounds": 7})


def test_a_case_that_does_not_exist_is_refused_with_near_names():
    with pytest.raises(SystemExit, match=r"no case 'inf_nce' \(near: info_nce"):
        main(["run", "inf_nce"])


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_quick_form_sets_options_that_exist(case):
    assert case.quick
    for name, value in case.quick.items():
        assert type(value) is type(case.defaults[name])


def _fake(name, result, **options):
    def run(given):
        return result | {"given": given}

    return Case(name=name, doc="A.", defaults={"rounds": 7}, quick={"rounds": 1}, run=run)


@pytest.mark.parametrize(
    ("result", "code"),
    [
        ({"failed": {}, "speedup": {}}, 0),
        ({"failed": {"other": "slow"}, "subject": "ours"}, 0),
        ({"failed": {"ours": "value 1 > 0.1"}, "subject": "ours"}, 1),
        ({"view1": {"failed": {"ours": "value 1 > 0.1"}, "subject": "ours"}}, 1),
        ({"failed": ["trim"]}, 1),
        ({"marked": "gradients"}, 1),
        ({"skipped_because": "no GPU"}, 0),
    ],
)
def test_the_exit_code_is_that_of_the_gate(result, code, monkeypatch, tmp_path):
    monkeypatch.setitem(CASES, "fake", _fake("fake", result))
    out = tmp_path / "lines.jsonl"
    assert main(["run", "fake", "--quick", "--out", str(out)]) == code
    assert json.loads(out.read_text())["options"] == {"rounds": 1}
    assert main(["run", "fake", "--quick", "--set", "rounds=2", "--out", str(out)]) == code
    assert json.loads(out.read_text().splitlines()[-1])["options"] == {"rounds": 2}


@pytest.mark.slow
def test_several_cases_run_apart_and_report_as_they_end(tmp_path, capfd):
    out = tmp_path / "lines.jsonl"
    assert main(["run", "ema", "adamw_ema", "--quick", "--out", str(out)]) == 0
    first, second, last = capfd.readouterr().out.splitlines()
    assert first.startswith("ema: ok, ")
    assert "CPU s" in second
    assert last.endswith("every gate passed")
    assert [json.loads(line)["case"] for line in out.read_text().splitlines()] == [
        "ema",
        "adamw_ema",
    ]


def test_options_may_follow_a_flag(monkeypatch):
    seen = []
    monkeypatch.setattr(command, "run_one", lambda case, options, **_: seen.append(options) or 0)
    assert command.main(["run", "ema", "--quick", "rounds=2"]) == 0
    assert seen[0]["rounds"] == 2
    for words in (["run", "ema", "--quick", "--rouns", "2"], ["list", "ema"]):
        with pytest.raises(SystemExit):
            command.main(words)


@pytest.mark.parametrize(
    ("value", "recorded"),
    [
        ("/home/me/photos/max256/train-*.tar", "photos/max256/train-*.tar"),
        ("/a", "a"),
        ("photos/*.tar", "photos/*.tar"),
        ("", ""),
        (3, 3),
    ],
)
def test_a_recorded_option_has_no_folders_of_the_machine(value, recorded):
    assert command.portable(value) == recorded


def test_measurements_take_turns():
    order: list[str] = []
    figures = interleave(
        {"a": lambda: float(order.append("a") or 1), "b": lambda: float(order.append("b") or 2)},
        rounds=3,
    )
    assert order == ["a", "b"] * 3
    assert figures == {"a": [1.0] * 3, "b": [2.0] * 3}
    with pytest.raises(ValueError, match="rounds=0"):
        interleave({}, rounds=0)


def test_ratios_are_of_neighbours():
    found = ratios([1.0, 4.0, 3.0], [2.0, 2.0, 3.0])
    assert found == pytest.approx({"median": 1.0, "q20": 0.7, "q80": 1.6})


@pytest.mark.slow
def test_a_case_runs_and_appends_its_line(tmp_path, digits, capfd):
    out = tmp_path / "results.jsonl"
    options = [f"shards={digits[0]}", "rounds=1", "steps=2", "warm_steps=1"]
    assert main(["run", "train_vs_synthetic", *options, "--out", str(out)]) == 0
    line = json.loads(out.read_text())
    assert line["options"]["steps"] == 2
    assert line["machine"]["cores"] >= 1
    assert 0 < line["result"]["dali_over_synthetic"]["median"] < 5


def test_views_are_compared_after_they_are_checked(tmp_path):
    out = tmp_path / "results.jsonl"
    assert (
        main(
            [
                "run",
                "cut_views",
                "images=3",
                "height=30",
                "width=40",
                "size=16",
                "rounds=1",
                "--out",
                str(out),
            ]
        )
        == 0
    )
    result = json.loads(out.read_text())["result"]
    assert set(result) == {"view1", "view2"}
    for view in result.values():
        assert not view["failed"]
        assert set(view["speedup"]) == {"pillow, image by image", "torch"}


STEP = [
    "recipe=quickstart_digits",
    "batch=16",
    "steps=1",
    "rounds=1",
    "checked=8",
    "chunk=4",
    "compile=0",
]


@pytest.mark.slow
def test_a_step_is_held_against_float64_and_compared_with_the_eager_one(tmp_path, monkeypatch):
    out = tmp_path / "results.jsonl"
    assert main(["run", "train_step", *STEP, "--out", str(out)]) == 0
    result = json.loads(out.read_text())["result"]
    assert (result["failed"], result["batch"]) == ({}, {"eager": 16})
    assert "marked" not in result
    assert result["errors"]["gradients"] < 1e-3
    assert result["speedup"]["eager"]["median"] > 0
    assert "4" in result["plan"]

    ours = MoCoV3.forward

    def wrong(self, view1, view2, **how):
        output = ours(self, view1, view2, **how)
        return output._replace(loss=output.loss * 1.001)

    monkeypatch.setattr(MoCoV3, "forward", wrong)
    assert main(["run", "train_step", *STEP, "--out", str(out)]) == 1
    marked = json.loads(out.read_text().splitlines()[-1])["result"]
    assert "gradients 0.001 from float64" in marked["marked"]
    assert marked["images_per_s"]["eager"][0] > 0  # timed all the same
    assert marked["speedup"] == {}


def test_a_side_that_fails_costs_only_itself(monkeypatch):
    def measure(name, options):
        if name == "eager":
            raise RuntimeError("eager: exit 1")
        return {"images_per_s": [4.0, 2.0], "first_step_s": 1.0, "peak_bytes": 0}

    monkeypatch.setattr(train_step, "measure_apart", measure)
    options = {**train_step.DEFAULTS, "device": "cpu", "processes": 1}
    result = train_step.run(options)
    assert result["failed"] == {"eager": "eager: exit 1"}
    assert result["images_per_s"] == {"fastmoco": [4.0, 2.0]}
    assert result["speedup"] == {}
    with pytest.raises(ValueError, match="'fast' is none of"):
        train_step.run(options | {"sides": "fast"})


def test_both_directions_of_the_loss_are_checked_and_compared():
    case = CASES["info_nce"]
    small = ["rows=40", "keys=50", "dim=16", "rounds=1", "compile=0", "device=cpu"]
    options = case.options(small)
    both = case.run(options | {"directions": 2})
    assert both["failed"] == {}
    assert set(both["speedup"]) == {"naive", "sdpa_v_is_k"}
    assert both["flops"] == 2 * case.run(options)["flops"]
    with pytest.raises(ValueError, match="directions=3"):
        case.run(options | {"directions": 3})


def test_colours_are_measured_where_dali_is_absent(monkeypatch):
    monkeypatch.setattr(view_color, "_has_dali", lambda: False)
    case = CASES["view_color"]
    result = case.run(case.options(["images=2", "size=16", "rounds=1", "device=cpu"]))
    assert result["view1"]["failed"] == {}
    assert result["pipeline"]["skipped"] == dict.fromkeys(("exact", "dali"), "DALI is absent")


@pytest.mark.slow
def test_knn_of_one_and_two_processes_is_checked_and_measured():
    options = {**knn.DEFAULTS, "queries": 90, "bank": 3000, "dim": 32, "rounds": 1, "file": 1}
    result = knn.run(options)
    assert result["checked"]["1"] == result["checked"]["2"]
    assert result["checked"]["1"]["equal_neighbours"] > 0.99
    assert result["ranks"]["1"]["accuracy"] == result["ranks"]["2"]["accuracy"]
    assert len(result["ranks"]["2"]["peak_mb"]) == 2


def test_a_knn_search_that_differs_from_the_plain_formula_is_not_measured(monkeypatch):
    rows = [[0] * 20] * 64
    monkeypatch.setattr(knn, "run_ranks", lambda *_: [{"index": rows, "accuracy": 0.5}])
    result = knn.run({**knn.DEFAULTS, "bank": 3000, "dim": 32})
    assert result["failed"]["1 ranks"].startswith("differ from the plain formula")
    assert result.keys() == {"checked", "failed"}


@pytest.mark.slow
@pytest.mark.parametrize("case", [checkpoint_stall, train_vs_synthetic])
def test_a_case_that_measures_a_run_has_no_figures_after_a_failed_check(case, monkeypatch):
    monkeypatch.setattr(case, "_fault", lambda *_: "differs")
    result = case.run({**case.DEFAULTS, **case.QUICK, "rounds": 1, "steps": 1})
    assert set(result) == {"failed"}
    assert set(result["failed"].values()) == {"differs"}


def test_a_checkpoint_that_differs_is_found(monkeypatch):
    state = {"w": torch.ones(2)}
    trainer = SimpleNamespace(_state=lambda: (state, {}))
    monkeypatch.setattr(checkpoint_stall, "list_checkpoints", lambda folder: [folder])
    saved = SimpleNamespace(tensors={"w": torch.ones(2)})
    monkeypatch.setattr(checkpoint_stall, "load_checkpoint", lambda path: saved)
    assert checkpoint_stall._fault(Path(), trainer) == ""
    state["w"] = torch.zeros(2)
    assert checkpoint_stall._fault(Path(), trainer) == "differs from the state in w"
