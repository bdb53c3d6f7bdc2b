"""The speed of some steps of a config, and the answer of a process that measures it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastmoco.config import Config
from fastmoco.config.serial import to_json
from fastmoco.training.step_rate import COMPARED, _busy_seconds, answer


def asked(config: Config, *, steps: int = 2, shards: str | None = None) -> dict[str, object]:
    patterns = {"data.shards": config.data.shards if shards is None else shards}
    request = {"config": to_json(config), "patterns": patterns, "warm_up": 3, "steps": steps}
    request["at_rest"] = steps > 2
    return answer(json.loads(json.dumps(request)))


def test_steps_are_those_of_a_run_and_settings_of_speed_change_no_loss(brief_run: Config) -> None:
    found = asked(replace(brief_run, precision="fp32"))
    images = brief_run.global_batch_size
    assert found["images_per_s"] == pytest.approx(images / found["step_s"])  # type: ignore[operator]
    assert found["peak_bytes"] > 2**20  # type: ignore[operator]
    assert len(found["losses"]) == len(found["gradient_norms"]) == COMPARED  # type: ignore[arg-type]
    assert found["device_type"] == "cpu"
    assert (found["chunk"], found["precision"], found["threads"]) == (0, "fp32", 1)

    # In chunks, and from levels: the same numbers but for rounding.
    batch = replace(brief_run.batch, chunk=16)
    data = replace(brief_run.data, view_dtype="uint8")
    other = asked(replace(brief_run, precision="fp32", batch=batch, data=data))
    assert other["chunk"] == 16
    assert other["losses"] == pytest.approx(found["losses"], rel=1e-4)
    # AdamW turns rounding into steps of full size, so later norms drift apart.
    norms = [one["gradient_norms"][:2] for one in (other, found)]  # type: ignore[index]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    assert other["losses"] != asked(replace(brief_run, precision="fp32", seed=1))["losses"]


def test_what_cannot_run_is_an_answer_with_its_reason(
    brief_run: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "no-such" in str(asked(brief_run, shards="/no-such.tar")["refused"])
    assert "this run has" not in str(asked(brief_run, steps=50)["refused"])
    assert "the run has 15 steps, and 53" in str(asked(brief_run, steps=50)["refused"])

    def runs_out(*_: object) -> None:
        raise torch.OutOfMemoryError("tried to allocate 3 GiB\nand more")

    monkeypatch.setattr("fastmoco.training.trainer.Trainer.step", runs_out)
    assert asked(brief_run) == {"failed": "out of memory: tried to allocate 3 GiB"}


def test_a_killed_process_leaves_its_run_where_its_caller_removes_it(
    brief_run: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def step(*_: object) -> None:
        seen.extend(tmp_path.glob("fastmoco-short-*/run"))
        raise MemoryError

    monkeypatch.setattr("fastmoco.training.trainer.Trainer.step", step)
    request = {"config": to_json(brief_run), "warm_up": 1, "steps": 1}
    request |= {"patterns": {"data.shards": brief_run.data.shards}, "at_rest": False}
    assert "failed" in answer(request, within=tmp_path)
    assert len(seen) == 1
    assert list(tmp_path.iterdir()) == []


def test_busy_seconds_count_all_but_idle_and_waiting_for_disks(tmp_path) -> None:  # type: ignore[no-untyped-def]
    stat = tmp_path / "stat"
    stat.write_text("cpu  100 200 300 99999 88888 1 2 3 50 0\ncpu0 1 1\n")
    import os

    assert _busy_seconds(stat) == pytest.approx(606 / os.sysconf("SC_CLK_TCK"))
    assert _busy_seconds(tmp_path / "none") is None
