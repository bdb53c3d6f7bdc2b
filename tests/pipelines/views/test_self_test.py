"""The decoder's test before training: passes here, and a decoder that crashes, hangs or errs is
told from one that works."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

pytest.importorskip("nvidia.dali")

from fastmoco_pipelines.errors import DecoderBrokenError
from fastmoco_pipelines.views import dali, self_test
from fastmoco_pipelines.views.self_test import require_working_decoder, sample_jpegs


def child(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_this_machines_decoder_passes_in_a_process_of_its_own() -> None:
    require_working_decoder("cpu", None)


@pytest.mark.gpu
def test_this_gpus_decoder_passes() -> None:
    require_working_decoder("gpu", 0)


def test_the_eight_are_of_every_kind() -> None:
    files = sample_jpegs()
    assert len(files) == 8
    assert len({file.tobytes() for file in files}) == 8
    assert sum(b"\xff\xc2" in file.tobytes() for file in files) >= 2  # progressive


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("import os; os.abort()", "died of signal 6"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "died of signal 11"),
        ("import sys; sys.exit('nvImageCodec failure #3')", "failed: nvImageCodec failure #3"),
        ("import sys; sys.exit(1)", "failed: no output"),
    ],
)
def test_a_decoder_that_fails_is_named_with_the_cure(code: str, words: str) -> None:
    with pytest.raises(DecoderBrokenError, match=words) as raised:
        require_working_decoder("gpu", 0, command=child(code))
    assert "--data.device cpu" in str(raised.value)


def test_a_decoder_that_hangs_is_left() -> None:
    with pytest.raises(DecoderBrokenError, match="did not end within 1 s"):
        require_working_decoder(
            "gpu", 0, command=child("import time; time.sleep(60)"), deadline_s=1
        )


def test_wrong_pixels_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = dali.EvalPipeline.run
    self_test.main(["--device=cpu"])

    def tinted(self: dali.EvalPipeline, encoded: list[np.ndarray]) -> torch.Tensor:
        views = right(self, encoded).clone()
        views[5] += 0.1
        return views

    monkeypatch.setattr(dali.EvalPipeline, "run", tinted)
    with pytest.raises(SystemExit, match=r"JPEG 5 of 8 .* is [5-9]"):
        self_test.main(["--device=cpu"])


def test_a_loader_on_a_gpu_asks_first(packed, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastmoco_pipelines.loading.loader import build_loader
    from fastmoco_pipelines.spec import LoaderSpec

    def broken(device: str, device_id: int | None) -> None:
        raise DecoderBrokenError(f"asked for {device} {device_id}")

    monkeypatch.setattr(self_test, "require_working_decoder", broken)
    with pytest.raises(DecoderBrokenError, match="asked for gpu 3"):
        build_loader(LoaderSpec(shards=str(packed), global_batch_size=4, device="gpu"), device_id=3)
