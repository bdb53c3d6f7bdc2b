"""A checkpoint whose random numbers have another form is refused by name, before they are used."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from fastmoco.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from fastmoco.training import state as training_state

pytestmark = pytest.mark.faults


@pytest.mark.parametrize(
    ("rng", "words"),
    [
        (torch.zeros(5056), r"rng\.cpu is torch\.float32 of shape \(5056,\)"),
        (torch.zeros(10, dtype=torch.uint8), r"rng\.cpu is no state of random numbers"),
        (torch.zeros(2, 2528, dtype=torch.uint8), r"rng\.cpu is torch\.uint8 of shape"),
        (torch.zeros(2 << 20, dtype=torch.uint8), r"rng\.cpu is torch\.uint8 of shape"),
        (torch.zeros(5056, dtype=torch.int8), r"rng\.cpu is torch\.int8"),
    ],
)
def test_a_forged_state_of_random_numbers_is_refused(
    tmp_path: Path, rng: torch.Tensor, words: str
) -> None:
    model = nn.Linear(2, 2)
    optimizer: Any = SimpleNamespace(inner=torch.optim.AdamW(model.parameters()))
    tensors = training_state.collect(model, optimizer) | {"rng.cpu": rng}
    path = save_checkpoint(tmp_path, step=1, tensors=tensors, state={}, keep=1)
    before = torch.get_rng_state()
    with pytest.raises(CheckpointError, match=words):
        training_state.restore(model, optimizer, load_checkpoint(path))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("forged", ["weight", "bias"])
def test_whole_numbers_in_place_of_weights_are_refused(tmp_path: Path, forged: str) -> None:
    model = nn.Linear(2, 2)
    optimizer: Any = SimpleNamespace(inner=torch.optim.AdamW(model.parameters()))
    tensors = training_state.collect(model, optimizer)
    name = f"model.{forged}"
    tensors[name] = tensors[name].view(torch.int32)
    path = save_checkpoint(tmp_path, step=1, tensors=tensors, state={}, keep=1)
    with pytest.raises(CheckpointError, match=rf"{name} is torch\.int32 .*has torch\.float32"):
        training_state.restore(model, optimizer, load_checkpoint(path))
