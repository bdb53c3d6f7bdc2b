"""A shard that is cut while a run reads it: the cure that the run names is done, and the same command
goes on as if the lost images had been listed before."""

from __future__ import annotations

import os
import re
import shlex
import shutil
from pathlib import Path

from fastmoco.checkpoint import load_latest
from fastmoco.training.trainer import Trainer
from fastmoco_pipelines.formats.quarantine import Quarantine, quarantine_path
from fastmoco_pipelines.inspecting import check as check_module
from tests.checkpoint_content import assert_same
from tests.command_line import main
from tests.pipelines.quick_pool import QuickPool

WORDS = (
    "train quickstart_digits --epochs 0.1 --optim.warmup-epochs 0 --global-batch-size 16 "
    "--device cpu --threads 1 --knn.test-shards= --checkpoint.every-steps 2 --data.max-bad-share 0"
)


def test_a_cut_in_mid_run_is_cured_by_the_command_that_its_message_names(
    digits, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(check_module, "DecodePool", QuickPool)
    folder = Path(shutil.copytree(Path(digits[0]).parent, tmp_path / "digits"))
    tar, pattern, out = folder / "test-000000.tar", f"{folder}/t*.tar", tmp_path / "run"
    whole = tar.read_bytes()
    step = Trainer.step

    def cut(self: Trainer, *args: object, **more: object) -> object:
        if self.step_count == 3:
            os.truncate(tar, len(whole) // 3)
        return step(self, *args, **more)  # type: ignore[arg-type]

    command = [*WORDS.split(), "--data.shards", pattern, "--out"]
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", cut)
        assert main([*command, str(out)]) == 1
    message = capsys.readouterr().err
    shutil.copytree(out, tmp_path / "other")
    assert main([*command, str(out)]) == 2  # not before the cure
    again = capsys.readouterr().err

    cures = {
        found[1]
        for text in (message, again)
        if (found := re.search(r"[Rr]un `(fastmoco data check)` on the shards", text))
    }
    assert cures == {"fastmoco data check"}, message + again
    assert "the same command then continues without it" in message
    assert main([*shlex.split(cures.pop())[1:], pattern]) == 1
    listed = len(Quarantine.read(quarantine_path(folder)))
    assert listed > 100
    capsys.readouterr()
    assert main([*command, str(out)]) == 0
    text = capsys.readouterr()
    assert "continuing from step_0000000" in text.out + text.err
    assert f"{listed} of 1797 images are left out" in text.out + text.err

    # The same from the same checkpoint, with the whole tar and the same list.
    tar.write_bytes(whole)
    assert main([*command, str(tmp_path / "other")]) == 0
    cured, undamaged = (load_latest(run / "checkpoints") for run in (out, tmp_path / "other"))
    assert cured is not None
    assert undamaged is not None
    assert cured.step == undamaged.step == 11
    assert_same(cured.tensors, undamaged.tensors)
    assert cured.state["data"] == undamaged.state["data"]
