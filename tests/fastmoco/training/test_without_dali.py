"""A run on a CPU without DALI: the same losses to the bit, and one line that says so."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastmoco.cli.train import train
from fastmoco.config import Config
from fastmoco.config.serial import to_json
from fastmoco.recipes import with_image_size
from fastmoco.run.folder import RunFolder
from fastmoco_pipelines import moco_v3_views
from tests.fault_runs import environment

PROGRAM = """
import json, sys
from pathlib import Path
sys.modules["nvidia.dali"] = None
from fastmoco.cli.train import train
from fastmoco.config.serial import from_json
sys.exit(train(from_json(json.loads(sys.argv[1])), Path(sys.argv[2])))
"""


@pytest.fixture(scope="module")
def jpegs(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A set of JPEGs of several kinds: subsamplings, grey, progressive, four inks."""
    pytest.importorskip("webdataset", reason="webdataset is not installed")
    from fastmoco_pipelines import pack_folder

    source = tmp_path_factory.mktemp("jpegs")
    for number in range(64):
        coarse = np.random.default_rng(number).integers(0, 256, (5, 5, 3), dtype=np.uint8)
        mode = ("RGB", "RGB", "L", "CMYK")[number % 4]
        size = (20 + number % 7, 17 + number % 5)
        image = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).convert(mode)
        more = {"subsampling": number % 3} if mode == "RGB" else {}
        image.save(
            source / f"{number}.jpg", quality=60 + number % 40, progressive=number % 2, **more
        )
    return pack_folder(source, source / "packed").pattern


def test_the_losses_are_those_with_dali(
    small_run: Config, jpegs: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("nvidia.dali")
    sized = with_image_size(small_run, 8)
    view1, view2 = (replace(view, mean=(0.3,) * 3) for view in moco_v3_views(8))
    data = replace(sized.data, shards=jpegs, view1=view1, view2=view2, threads=2)
    config = replace(sized, epochs=3, global_batch_size=16, data=data)
    hidden, there = tmp_path / "hidden", tmp_path / "there"
    command = [sys.executable, "-c", PROGRAM, json.dumps(to_json(config)), str(hidden)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (done.stdout + done.stderr).count("NVIDIA DALI is not installed") == 1
    capsys.readouterr()
    assert train(config, there) == 0
    assert "DALI" not in "".join(capsys.readouterr())
    losses = RunFolder(there).read_metric("loss")
    assert len(losses) == 12
    assert RunFolder(hidden).read_metric("loss") == losses
