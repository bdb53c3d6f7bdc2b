"""A run's model, read back for use elsewhere."""

from __future__ import annotations

import pytest
import torch

from fastmoco.distributed.mesh import World
from fastmoco.errors import RunError
from fastmoco.training.load_run import load_run
from fastmoco.training.trainer import Trainer


def test_the_encoder_of_a_run_is_the_one_that_was_trained(brief_run, tmp_path):
    trainer = Trainer.build(brief_run, tmp_path, World())
    try:
        assert trainer.run() == 0
        images = trainer.loader.next().views[0]
    finally:
        trainer.close()
    objective, config, checkpoint = load_run(tmp_path)
    assert config == brief_run
    assert checkpoint.step == 15
    expected = trainer.objective.encoder.eval()(images)
    assert torch.equal(objective.encoder.eval()(images), expected)
    assert expected.shape == (64, 64)


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(RunError, match="contains no checkpoint"):
        load_run(tmp_path)
