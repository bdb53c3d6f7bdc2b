"""The cases that compare fastmoco with the baseline: their gates, turns and parts of a step."""

from __future__ import annotations

import json
from contextlib import ExitStack

import pytest

from benchmarks.cases import end_to_end, equality
from benchmarks.command import main
from benchmarks.end_to_end_child import check, open_side, parts
from benchmarks.photos import sample_shards
from fastmoco.models.vit import ARCHITECTURES
from fastmoco_pipelines.loading.step_parts import PARTS

OPTIONS = {**end_to_end.DEFAULTS, **end_to_end.QUICK}
EQUALITY = {
    **equality.DEFAULTS,
    **equality.QUICK,
    "batch": 16,
    "steps": 3,
    "loader_steps": 1,
    "distinct": 2,
}


@pytest.fixture(autouse=True)
def _shape_of_the_child(monkeypatch) -> None:
    """A child gives `vit_tiny` another shape, for the rest of its process."""
    monkeypatch.setitem(ARCHITECTURES, "vit_tiny", ARCHITECTURES["vit_tiny"])


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> str:
    pytest.importorskip("webdataset", reason="webdataset is not installed")
    return sample_shards(tmp_path_factory.mktemp("photos"), 16)


@pytest.mark.parametrize("contender", ["fastmoco", "baseline eager"])
def test_parts_of_a_step_add_up_to_the_whole(shards, contender):
    own = {"contender": contender, "size": 32, "steps": 2, "shards": shards, "threads": 1}
    with ExitStack() as stack:
        side = open_side({**OPTIONS, **own}, stack)
        losses = check(side, {**OPTIONS, **own})["losses"]
        found = parts(side, {**OPTIONS, **own})
    assert len(losses) == 2
    assert set(found["parts"]) <= {*PARTS, "hand over", "rest"}
    most = {"read", "decode", "augment", "query forward", "key forward", "loss", "backward"}
    assert most <= set(found["parts"])
    assert sum(found["parts"].values()) == pytest.approx(found["total"], abs=0.01)


def test_a_contender_with_other_losses_is_not_compared(monkeypatch):
    asked = []

    class Fake:
        def __init__(self, options, **variables):
            self.key = options["contender"], options["size"], options["steps"]

        def ask(self, word):
            asked.append((word, *self.key))
            wrong = 1.0 if self.key[0] == "baseline sdpa" else 0.0
            return {
                "check": {"losses": [3.0, 2.0 + wrong]},
                "turn": {"images_per_cpu_s": 20.0 if self.key[0] == "fastmoco" else 10.0},
                "parts": {"parts": {"loss": 1.0}, "total": 2.0},
            }[word]

        def close(self):
            asked.append(("end", *self.key))

    monkeypatch.setattr(end_to_end, "Child", Fake)
    options = {
        **end_to_end.DEFAULTS,
        "shards": "x",
        "sizes": "64,32",
        "rounds": 2,
        "measures": "rate,parts",
        "contenders": "fastmoco,baseline eager,baseline sdpa",
    }
    result = end_to_end.run(options)
    assert set(result["failed"]) == {"baseline sdpa at 64", "baseline sdpa at 32"}
    assert "first losses 1 from" in result["failed"]["baseline sdpa at 32"]
    for size in ("64", "32"):
        assert set(result[size]["speedup"]) == {"baseline eager"}
        assert result[size]["speedup"]["baseline eager"]["median"] == 2
        assert result[size]["parts_total"] == {"fastmoco": 2.0, "baseline eager": 2.0}
    turns = [own[1:] for own in asked if own[0] == "turn"]
    assert turns[:4] == turns[4:8]
    assert set(turns) == {
        (name, *of) for name in ("fastmoco", "baseline eager") for of in ((64, 1), (32, 2))
    }


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"contenders": "fastmoco,fast"}, "'fast' is none of"),
        ({"measures": "speed"}, "'speed' is none of"),
        ({"precision": "fp8"}, "'fp8' is none of"),
        ({"contenders": "fastmoco"}, "needs 'baseline eager'"),
    ],
)
def test_unknown_options_are_refused_by_name(changed, named):
    with pytest.raises(ValueError, match=named):
        end_to_end.run({**end_to_end.DEFAULTS, **changed})


def test_differences_are_drawn_with_their_limits_where_there_are_any():
    some, none = ({"differences": [1e-16 * n, 0.0], "limit": 1e-9} for n in (1, 0))
    (chart,) = equality.charts({"fp64": some, "fp32": none})
    assert chart.lines == {"fp64": [(1, 1e-16)], "limit of fp64": [(1, 1e-9), (2, 1e-9)]}
    assert equality.charts({"fp32": none}) == []


def test_losses_side_by_side_are_stored_checked_and_drawn(shards, tmp_path, monkeypatch):
    out = tmp_path / "lines.jsonl"
    words = [f"{key}={value}" for key, value in EQUALITY.items() if key != "shards"]
    assert main(["run", "equality", *words, f"shards={shards}", "--out", str(out)]) == 0
    result = json.loads(out.read_text())["result"]
    assert result["failed"] == {}
    assert result["views"]["same_samples"]
    assert result["views"]["compared"] == 2 * 16
    assert result["views"]["share_of_levels_that_differ"] < 0.01
    for precision in ("fp64", "fp32"):
        assert len(result[precision]["differences"]) == 3
        assert result[precision]["largest_difference"] <= equality.LIMITS[precision]
    # On some processors no loss differs at all.
    differ = {name for name in ("fp64", "fp32") if result[name]["largest_difference"] > 0}
    lines = {line for chart in equality.charts(result) for line in chart.lines}
    assert lines == differ | {f"limit of {name}" for name in differ}

    monkeypatch.setitem(equality.LIMITS, "fp64", -1.0)
    result = equality.run({**EQUALITY, "shards": shards, "precisions": "fp64"})
    assert "a loss differs by" in result["failed"]["fp64"]
