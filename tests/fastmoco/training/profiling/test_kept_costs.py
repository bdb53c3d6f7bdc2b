"""What a step of every objective must keep: nothing waits for the device between log steps, memory
does not grow, and no more operators are called than are recorded.

The record is `operators.json`. To write it again: FASTMOCO_RECORD_OPERATORS=1 and this file.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastmoco.config import BatchConfig, Config
from fastmoco.distributed.mesh import World
from fastmoco.recipes import get_recipe, with_image_size
from fastmoco.training.profiling.counting import StepCounter
from fastmoco.training.profiling.profile import memory
from fastmoco.training.trainer import Trainer
from fastmoco_pipelines.loading.step_parts import collecting

RECORD = Path(__file__).with_name("operators.json")
AGAIN = "FASTMOCO_RECORD_OPERATORS"
OTHER_TORCH = 1.1
"""Allowance where torch is not the recorded version: it may split an operator into others."""
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "moco_v3": ("vit_nano8_e60_b256", {}),
    "moco_v3 in chunks": ("vit_nano8_e60_b256", {"chunk": 5, "kept": 1}),
    "moco_v3, clipped": ("vit_nano8_e60_b256", {"clip_norm": 1.0}),
    "byol": ("byol_digits", {}),
    "simclr": ("simclr_digits", {}),
    "swav": ("swav_digits", {}),
    "supmae": ("supmae_digits", {}),
    "supervised": ("supervised_digits", {}),
}
"""Recipe and changes by name."""


def small(
    recipe: str, *, chunk: Any = "none", kept: Any = "auto", clip_norm: float = 0.0
) -> Config:
    """A run of 12 images of 16 pixels, narrow heads, every fourth step logged."""
    config = with_image_size(get_recipe(recipe), 16, patch_size=4)
    optim = replace(config.optim, warmup_epochs=0, clip_norm=clip_norm)
    if config.objective.label_count == 0:
        config = replace(config, objective=replace(config.objective, classes=10))  # type: ignore[call-arg]
    return replace(
        config,
        device="cpu",
        precision="bf16",
        threads=1,
        epochs=1.0,
        global_batch_size=12,
        log_every_steps=4,
        model=replace(config.model, hidden_dim=32, projection_dim=16, compile=False),
        batch=BatchConfig(chunk=chunk, kept=kept),
        data=replace(config.data, synthetic=True),
        knn=replace(config.knn, every_epochs=0),
        optim=optim,
    )


@pytest.mark.parametrize("name", CASES)
def test_a_step_neither_waits_nor_grows_and_calls_no_more_operators_than_recorded(
    name: str, tmp_path: Path
) -> None:
    recipe, changes = CASES[name]
    cpu = torch.device("cpu")
    trainer = Trainer.build(small(recipe, **changes), tmp_path / "run", World(device=cpu))
    try:
        # Steps 6 and 7, neither of which is logged.
        trainer.run(5)
        with collecting() as collector, StepCounter(collector) as counter:
            trainer.run(2)

        # A logged step waits, so the counter does see it.
        with StepCounter() as logged:
            trainer.run(1)

        # Between log steps the recorder keeps norms: so from one log step to the next but one.
        trainer.run(4)
        before = memory(cpu)
        trainer.run(8)
        after = memory(cpu)
    finally:
        trainer.close()

    assert not counter.waits
    assert logged.waits
    assert after["tensor_bytes"] == before["tensor_bytes"]
    assert after["tensors"] == before["tensors"]
    judge(name, {key: count / 2 for key, count in counter.operators.items()})


def judge(name: str, found: dict[tuple[str, str], float]) -> None:
    """Compare the operators of a step with the record, or write it."""
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {"cases": {}}
    version = ".".join(torch.__version__.split(".")[:2])
    operators = Counter({f"{part or 'rest'}: {op}": count for (part, op), count in found.items()})
    if os.environ.get(AGAIN):
        record["torch"] = version
        record["cases"][name] = dict(sorted(operators.items()))
        RECORD.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
        return
    recorded = Counter(record["cases"][name])
    limit = sum(recorded.values()) * (1.0 if version == record["torch"] else OTHER_TORCH)
    total = sum(operators.values())
    more = dict(sorted((operators - recorded).items()))
    assert total <= limit, (
        f"{name}: {total:g} operators a step, {total - limit:g} more than recorded ({limit:g}); "
        f"more of: {more}. Remove them, or record again: {AGAIN}=1 python -m pytest "
        "tests/fastmoco/training/profiling/test_kept_costs.py"
    )
