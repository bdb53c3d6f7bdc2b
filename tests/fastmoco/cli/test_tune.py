"""`fastmoco tune`: refusals before anything is measured, planned scripts, and a whole search."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tyro", reason="tyro is not installed")

from fastmoco.cli.main import main
from fastmoco.cli.tune import budget_seconds
from fastmoco.planning.tuning import halving, search
from fastmoco.planning.tuning.machine import Machine
from fastmoco.planning.tuning.measure import Measurement
from tests.fault_runs import environment

TINY = ["--model.hidden-dim", "32", "--model.projection-dim", "8"]


def test_a_budget_is_a_time() -> None:
    assert [budget_seconds(text) for text in ("90s", "10m", "1.5h", "45")] == [90, 600, 5400, 45]
    with pytest.raises(ValueError, match="must be a time above 0 with s, m or h"):
        budget_seconds("ten")
    with pytest.raises(ValueError, match="at most 100h"):
        budget_seconds("1000000000h")


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--budget", "0m"], "--budget 0m: must be a time above 0"),
        (["--out", "{folder}"], "--out {folder}: is a folder; give a file"),
        (["--out", "{folder}/old.sh"], "old.sh: exists already; --force replaces it"),
        ([], "--data.shards is missing: name the shards to measure with"),
        (["--data.images", "photos"], "--data.images photos: must be shards here"),
        (["--data.synthetic", "--gpus", "3"], "--gpus 3: must divide --global-batch-size 256"),
        (["--only", "everything"], "--only everything: must be of cores, allocator, chunks"),
    ],
)
def test_mistakes_are_reported_before_anything_is_measured(
    words: list[str], text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("fastmoco.cli.tune.FreshProcess", None)
    (tmp_path / "old.sh").touch()
    out = ["--out", str(tmp_path / "new.sh")]
    given = [word.format(folder=tmp_path) for word in words]
    assert main(["tune", "quickstart_digits", *out, *given]) == 2
    assert text.format(folder=tmp_path) in capsys.readouterr().err
    assert not (tmp_path / "new.sh").exists()


def fake(settings, *, warm_up, steps, limit_s, at_rest=False):  # type: ignore[no-untyped-def]
    """A machine on which fused blocks are twice as fast, and chunks of 64 end in Ctrl-C."""
    if ("batch.chunk", 64) in settings.options:
        raise KeyboardInterrupt
    speed = 2.0 if ("model.blocks", "fused") in settings.options else 1.0
    details = {
        "precision": "fp32", "device": "cpu", "device_type": "cpu", "versions": {"torch": "2"},
        "attention_backend": "sdpa", "compiled": False, "chunk": 0,
    }  # fmt: skip
    return Measurement(
        100 * speed, 50 * speed, 0.01, 2**30, (4.0,) * 3, (1.0,) * 3, 0.01, 0.1, details
    )


def test_a_search_writes_a_script_prints_its_table_and_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastmoco.cli.tune.FreshProcess", lambda config: fake)
    words = ["tune", "quickstart_digits", "--only", "blocks", "--data.synthetic", *TINY]
    out = tmp_path / "fast.sh"
    assert main([*words, "--model.compile", "False", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "| --model.blocks fused | 3 | 200 | 100 | 1.00 | 2.000 | winner |" in printed
    assert "ratio                2.000 (2.000 to 2.000)" in printed
    text = out.read_text()
    assert "--model.hidden-dim 32 \\\n" in text
    assert "--model.blocks fused \\\n" in text
    assert "#   ratio                2.000 (2.000 to 2.000)" in text
    assert str(tmp_path) not in text
    assert os.access(out, os.X_OK)
    assert main([*words, "--out", str(out), "--force", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["chosen"]["options"] == {"model.blocks": "fused"}
    assert found["script"] == str(out)


def test_one_of_several_processes_is_measured_with_its_part_of_batch_and_cores(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = []
    monkeypatch.setattr(
        "fastmoco.cli.tune.FreshProcess", lambda config: measured.append(config) or fake
    )
    machine = Machine(cores=tuple(range(8)), one_per_core=tuple(range(8)))
    monkeypatch.setattr("fastmoco.cli.tune.this_machine", lambda: machine)
    words = ["tune", "quickstart_digits", "--only", "cores", "binding", "--data.synthetic"]
    out = tmp_path / "x.sh"
    assert main([*words, "--gpus", "2", "--out", str(out)]) == 0
    assert (measured[0].global_batch_size, measured[0].threads) == (128, 4)
    printed = capsys.readouterr().out
    assert "| --threads 3 --data.threads 1 |" in printed
    assert "| --threads 8" not in printed
    assert "bound to the same cores" in printed
    assert "    --gpus 2 \\\n" in out.read_text()
    assert "# One process was measured, with 128 images a step" in out.read_text()


def test_an_interrupt_writes_nothing_and_prints_the_best_so_far(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastmoco.cli.tune.FreshProcess", lambda config: fake)
    monkeypatch.setattr(search, "BESIDE", 1)
    words = ["tune", "quickstart_digits", "--only", "blocks", "chunks", "--data.synthetic"]
    assert main([*words, "--out", str(tmp_path / "x.sh")]) == 130
    said = capsys.readouterr()
    assert "x.sh is not written; the best so far: --model.blocks fused, ratio 2.000" in said.err
    assert "| --model.blocks fused |" in said.out
    assert list(tmp_path.iterdir()) == []


def test_a_planned_script_has_the_setting_that_fits_and_computes_least_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And says that nothing was measured. The figures are made up."""

    def row(checkpointing: str, over: int, overhead: float, *, fits: bool = True) -> dict[str, Any]:
        plan = {"chunk": 64, "chunks": 4, "kept_images": 32, "activation_budget": 0.9}
        return {
            "checkpointing": checkpointing, "state_over": over, "fits": fits, "step_bytes": 2**30,
            "state_bytes": {"total": 2**30}, "plan": plan | {"overhead": overhead},
        }  # fmt: skip

    settings = [row("none", 2, 0.0, fits=False), row("selective", 2, 0.2), row("full", 2, 0.1)]
    settings += [row("none", 1, 0.0)]
    found = {
        "chosen": settings[0],
        "settings": settings,
        "local_batch_size": 256,
        "precision": "bf16",
    }
    monkeypatch.setattr("fastmoco.cli.plan.count", lambda config: config)
    monkeypatch.setattr("fastmoco.cli.plan.describe", lambda *_, **more: found)
    out = tmp_path / "planned.sh"
    words = ["tune", "quickstart_digits", "--plan-only", "--gpus", "2", "--out", str(out), *TINY]
    assert main([*words, "--memory", "24GB"]) == 0
    text = out.read_text()
    for part in (
        "# Not measured on a GPU: the choice of the planner (fastmoco plan) for 2 GPUs of 24GB, 256",
        "#     4 chunks of 64 images, 32 keep their graphs; checkpointing full; +10.0% FLOPs; 2.0 GiB",
        "    --model.checkpointing full \\\n    --batch.chunk 64 \\\n",
        "    --batch.activation-budget 0.9 \\\n    --gpus 2 \\\n",
    ):
        assert part in text

    # A typed setting stays, and a CPU is no GPU.
    found["settings"] = settings
    typed = ["--model.checkpointing", "selective", "--device", "cpu"]
    assert main([*words, "--force", *typed]) == 0
    text = out.read_text()
    assert text.count("    --model.checkpointing") == 1
    assert "checkpointing selective; +20.0% FLOPs" in text
    assert (
        "# Not measured: the choice of the planner (fastmoco plan) for 2 CPU processes of" in text
    )
    found["settings"] = [row("none", 2, 0.0, fits=False)]
    assert main([*words, "--force", "--memory", "1GB"]) == 2
    assert "no setting of quickstart_digits fits on 2 GPUs" in capsys.readouterr().err
    assert out.read_text() == text

    # A config file is what the script trains, not the recipe that it began with.
    found["settings"] = settings
    monkeypatch.chdir(tmp_path)
    Path("my.json").write_text('{"recipe": "quickstart_digits", "seed": 7}')
    words[1] = "my.json"
    assert main([*words, "--force", "--memory", "24GB"]) == 0
    text = out.read_text()
    assert f" -m fastmoco train {tmp_path}/my.json \\\n" in text
    assert f"#     fastmoco tune {tmp_path}/my.json --plan-only" in text


@pytest.mark.slow
@pytest.mark.long
def test_a_real_search_writes_a_script_that_trains(
    digits: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """One candidate: attention and compiled blocks are given. In float64, where the gradients of this
    tiny model agree on every processor; in float32 rounding may be enough to refuse it.
    """
    monkeypatch.setattr(halving, "MOST_PAIRS", 1)
    out = tmp_path / "fast.sh"
    words = ["--data.shards", digits[0], "--threads", "1", *TINY]
    words += ["--model.attention", "sdpa", "--model.compile", "False", "--only", "blocks"]
    words += ["--precision", "fp64"]
    assert main(["tune", "quickstart_digits", *words, "--budget", "5m", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "--model.blocks fused: round 1" in printed
    done = subprocess.run(
        [str(out), "--data.shards", digits[0], "--out", "run", "--epochs", "1"],
        cwd=tmp_path,
        env=environment(PYTHON=sys.executable),
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert "finished after 5 steps" in done.stdout
