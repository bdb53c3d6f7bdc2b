"""What a case cannot do costs that part alone: the rest is reported, and the reason with it."""

from __future__ import annotations

import sys

import pytest

from benchmarks import step_sides
from benchmarks.cases import loader, view_color
from benchmarks.gpu import end_to_end
from benchmarks.outcome import outcome
from benchmarks.registry import CASES


@pytest.mark.parametrize(
    "error", [RuntimeError("no decoder"), ValueError("no size"), ImportError("no module")]
)
def test_colours_are_measured_whatever_dali_does(monkeypatch, error):
    def fails(*_, **__):
        raise error

    monkeypatch.setattr(view_color, "_has_dali", lambda: True)
    monkeypatch.setattr("fastmoco_pipelines.views.dali.ViewPipeline", fails)
    case = CASES["view_color"]
    result = case.run(case.options(["device=cpu", "images=2", "size=16", "rounds=1"]))
    assert result["view1"]["speedup"]
    reason = f"{type(error).__name__}: {error}"
    assert result["pipeline"]["failed"] == {"exact": reason, "dali": reason}
    assert outcome(result) == ("failed", f"exact: {reason}")


def test_without_webdataset_nothing_that_packs_shards_is_begun(monkeypatch, capsys):
    for module in (loader, end_to_end):
        monkeypatch.setattr(module, "_has", lambda name: name != "webdataset")
    reason = {"skipped_because": "the loader needs webdataset, which is not here"}
    assert loader.run({**loader.DEFAULTS, "device": "cpu"}) == reason
    monkeypatch.setattr(sys, "argv", ["end_to_end", "--dry-run"])
    assert end_to_end.main() == 0
    assert "needs webdataset, which is not here" in capsys.readouterr().out


def test_errors_of_a_side_reach_the_log_and_its_last_words_the_reason(
    monkeypatch, tmp_path, capsys
):
    python = tmp_path / "python"
    python.write_text(
        "#!/bin/sh\necho '{\"images_per_s\": [1.0]}'\necho out of memory >&2\nexit 3\n"
    )
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(RuntimeError, match="eager: exit 3: out of memory"):
        step_sides.measure_apart("eager", {})
    assert capsys.readouterr().err == "out of memory\n"
    python.write_text("#!/bin/sh\necho noise\necho '{\"images_per_s\": [1.0]}'\n")
    assert step_sides.measure_apart("eager", {}) == {"images_per_s": [1.0]}
