"""`fastmoco profile`: its table, its files, and one line for mistakes."""

from __future__ import annotations

import gzip
import json
import math
import os
import signal
from pathlib import Path

import pytest

pytest.importorskip("tyro", reason="tyro is not installed")

from fastmoco.cli.main import main
from fastmoco.cli.recipe_commands import ConfigArguments, parse_config
from fastmoco.errors import EXIT_INTERRUPTED
from fastmoco.planning.costs import measure_costs
from fastmoco.training.trainer import Trainer
from fastmoco_pipelines.loading.step_parts import (
    BACKWARD,
    EMA,
    KEY_FORWARD,
    LOG,
    LOSS,
    OPTIMIZER,
    QUERY_FORWARD,
    RANGE,
    TRANSFER,
)

SMALL = [
    *("--device", "cpu", "--threads", "1", "--precision", "fp32", "--global-batch-size", "16"),
    *("--model.hidden-dim", "32", "--model.projection-dim", "8", "--model.compile", "False"),
]


def test_a_profile_names_every_part_and_its_figures_hold_together(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["quickstart_digits", "--data.synthetic", *SMALL]
    assert main(["profile", *words, "--steps", "3", "--out", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((tmp_path / "profile.json").read_text())
    parts = found["parts"]
    computed = [QUERY_FORWARD, KEY_FORWARD, LOSS, BACKWARD]
    assert list(parts) == [TRANSFER, *computed, OPTIMIZER, EMA, LOG, "rest"]
    assert sum(row["share"] for row in parts.values()) == pytest.approx(1.0)
    assert sum(row["cpu_ms"] for row in parts.values()) == pytest.approx(found["cpu_ms"])
    assert all(parts[name]["calls"] > 0 and parts[name]["cpu_ms"] > 0 for name in computed)
    assert (found["steps"], found["images"], found["recompilations"]) == (3, 16, 0)
    assert found["waits"] == {}
    assert found["growth"]["tensor_bytes"] < 2**16

    # FLOPs: those that the planner counts, by another way, and the loss on top.
    parsed = parse_config(ConfigArguments, "print-config", words)
    assert parsed is not None
    planned = 16 * measure_costs(parsed.config, "fp32").step_flops
    flops = {name: parts[name]["flops"] for name in computed}
    assert math.isclose(sum(flops.values()) - flops[LOSS], planned, rel_tol=1e-6)
    assert flops[LOSS] == 2 * 4 * 16 * 16 * 8  # two directions, logits and gradient
    assert parts[EMA]["bytes_per_s"] > 0

    # The table and the trace.
    text = (tmp_path / "table.txt").read_text()
    assert all(name in text for name in (*parts, "aten::mm", "recompilations: 0"))
    with gzip.open(tmp_path / "trace.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    assert {RANGE + name for name in computed} <= {event.get("name") for event in events}


def test_ctrl_c_ends_a_profile_without_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one_step = Trainer._one_step

    def interrupted(trainer: Trainer) -> None:
        one_step(trainer)
        if trainer.step_count == 4:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Trainer, "_one_step", interrupted)
    words = ["quickstart_digits", "--data.synthetic", *SMALL, "--steps", "3"]
    assert main(["profile", *words, "--out", str(tmp_path)]) == EXIT_INTERRUPTED
    assert not (tmp_path / "profile.json").exists()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--data.shards", "/absent/*.tar"], "--data.shards"),
        ([], "data.shards"),
        (["--data.images", "/tmp"], "fastmoco data pack"),  # noqa: S108 - refused unopened
        (["--data.synthetic", "--steps", "0"], "--steps 0: needs at least 1"),
    ],
)
def test_a_mistake_is_one_line(
    words: list[str], line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["profile", "quickstart_digits", *SMALL, "--out", str(tmp_path / "out"), *words]
    assert main(command) == 2
    shown = capsys.readouterr().err.strip()
    assert line in shown
    assert "\n" not in shown
