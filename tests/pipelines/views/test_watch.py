"""A decoder that does not come back costs the images that keep it, and nothing else."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from fastmoco_pipelines.errors import DecodeError
from fastmoco_pipelines.formats.quarantine import NAME, Quarantine
from fastmoco_pipelines.loading.batch import Batch
from fastmoco_pipelines.loading.loader import build_loader
from fastmoco_pipelines.sampling.order import epoch_order
from fastmoco_pipelines.sets.shard_set import ShardSet
from fastmoco_pipelines.spec import EvalSpec, LoaderSpec, moco_v3_views
from fastmoco_pipelines.views import watch
from fastmoco_pipelines.views.dali import EvalPipeline
from fastmoco_pipelines.views.decode_child import Decoder, _examine
from fastmoco_pipelines.views.decode_pool import ChildLimits, DecodePool
from fastmoco_pipelines.views.engine import Engine
from fastmoco_pipelines.views.watch import StuckError, endless_images, watched
from tests.pipelines.damage import damaged_copy
from tests.pipelines.image_corpus import GOOD

NO_TIME = 1e-3
CHILD = """
import json, os, sys, time
json.loads(sys.stdin.readline())
print('{"ready": true}', flush=True)
for line in sys.stdin:
    for path, offset, size, crc32 in json.loads(line):
        with open(path, "rb") as file:
            word = os.pread(file.fileno(), size, offset)
        if word == b"endless":
            time.sleep(600)
        if word == b"crash":
            os.abort()
        answer = {"kind": "damaged image" if word == b"bad" else "", "reason": "", "listed": True}
        print(json.dumps(answer | {"crc32": 7, "shape": None}), flush=True)
"""


@pytest.fixture
def blamed(monkeypatch) -> list[list[bytes]]:
    """Stands for the disposable processes: images whose bytes are in `endless` do not end there."""
    asked: list[list[bytes]] = []
    monkeypatch.setattr(watch, "SLOW_SECONDS_PER_PIXEL", 0.0)
    return asked


def blame(monkeypatch, asked: list[list[bytes]], *endless: bytes) -> None:
    def find(encoded, *, seconds):
        asked.append([data.tobytes() for data in encoded])
        return {row: "endless" for row, data in enumerate(asked[-1]) if data in endless}

    monkeypatch.setattr(watch, "endless_images", find)


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """What a stuck decoder waits for; opened at the end."""
    event = threading.Event()
    yield event
    event.set()


def images(*names: str) -> list[np.ndarray]:
    return [np.frombuffer(GOOD[name], np.uint8) for name in names]


def stuck_on(monkeypatch, gate: threading.Event, *endless: bytes) -> Callable[[], int]:
    """Every decoder stays with these images until the gate opens; returns how many did."""
    outputs = Engine._outputs
    stuck: list[slice] = []

    def slow(self, encoded, inputs, rows, count):
        if any(data.tobytes() in endless for data in encoded):
            stuck.append(rows)
            gate.wait()
        return outputs(self, encoded, inputs, rows, count)

    monkeypatch.setattr(Engine, "_outputs", slow)
    return lambda: len(stuck)


def test_results_and_errors_pass() -> None:
    assert watched(lambda: 7, [], 0, seconds=60) == 7
    with pytest.raises(ZeroDivisionError):
        watched(lambda: 1 // 0, [], 0, seconds=60)


def test_a_slow_machine_is_waited_for(blamed, gate, monkeypatch) -> None:
    def none_is_endless(encoded, *, seconds):
        gate.set()
        return {}

    monkeypatch.setattr(watch, "endless_images", none_is_endless)
    assert watched(lambda: gate.wait() and 7, images("jpeg.jpg"), 9, seconds=NO_TIME) == 7


def test_a_decoder_that_ends_late_is_not_left_behind(blamed, gate, monkeypatch) -> None:
    """The image is left out all the same, as `data check` leaves it out."""
    ended = threading.Event()

    def work() -> None:
        gate.wait()
        ended.set()

    def found_late(encoded, *, seconds):
        gate.set()
        ended.wait()
        for thread in threading.enumerate():
            if thread.name == "fastmoco-decode":
                thread.join()
        return {0: "endless"}

    monkeypatch.setattr(watch, "endless_images", found_late)
    with pytest.raises(StuckError) as raised:
        watched(work, images("jpeg.jpg"), 9, seconds=NO_TIME)
    assert raised.value.reasons == {0: "endless"}
    assert not raised.value.at_work


def test_those_that_do_not_end_in_a_process_of_their_own_are_found(tmp_path, monkeypatch) -> None:
    (tmp_path / "odd_child.py").write_text(CHILD)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    # A child that is stopped for a while is no hang: the time is long, and the hang is forever.
    seconds = 3.0
    pool = DecodePool(1, ChildLimits(seconds=seconds), "odd_child")
    monkeypatch.setattr(watch, "DecodePool", lambda workers, limits: pool)
    words = (b"good", b"crash", b"bad", b"endless", b"good")
    found = endless_images([np.frombuffer(word, np.uint8) for word in words], seconds=seconds)
    assert found == {
        1: "the decoder's process ended (SIGABRT)",
        3: "the decoder did not finish within 3 s",
    }


def test_a_file_that_cannot_be_read_is_no_crash_of_its_decoder(tmp_path) -> None:
    answer = _examine(Decoder(), -1, str(tmp_path / "gone"), 0, 9, 7)
    assert answer["kind"] == "unreadable"
    assert answer["crc32"] == 7
    assert "No such file" in answer["reason"]


def test_where_no_process_starts_the_decoder_is_waited_for(monkeypatch) -> None:
    monkeypatch.setattr(watch, "DecodePool", lambda *_: DecodePool(1, module="no_such_module"))
    assert endless_images(images("jpeg.jpg"), seconds=5.0) == {}


@pytest.mark.parametrize("sub_batch", [None, 2])
def test_an_engine_names_the_row_and_works_again(sub_batch, blamed, gate, monkeypatch) -> None:
    files = images("jpeg.jpg", "grey.jpg", "png.png", "webp.webp", "cmyk.jpg")
    pipeline = EvalPipeline(EvalSpec(size=8, resize=8), batch_size=5, threads=1)
    pipeline._engine._sub_batch = sub_batch or 5
    wanted = pipeline.run(files)
    pipeline._engine._seconds = NO_TIME
    blame(monkeypatch, blamed, GOOD["webp.webp"])
    stuck = stuck_on(monkeypatch, gate, GOOD["webp.webp"])
    with pytest.raises(DecodeError, match="1 of 5 images cannot be decoded; image 3: endless") as e:
        pipeline.run(files)
    assert e.value.faults == ((3, "endless"),)
    assert stuck() == 1
    others = [0, 1, 2, 4]
    pipeline._engine._seconds = 60.0
    assert torch.equal(pipeline.run([files[row] for row in others]), wanted[others])


def take(folder: Path, run_list: Path | None = None, **changes) -> list[Batch]:
    options = {"views": moco_v3_views(16), "global_batch_size": 40, "seed": 7, "threads": 1}
    spec = LoaderSpec(shards=str(folder), **options | changes)
    with build_loader(spec, quarantine_list=run_list) as loader:
        return [loader.next() for _ in range(4)]


def test_training_goes_on_without_it_as_without_any_bad_image(
    packed, tmp_path, blamed, gate, monkeypatch
) -> None:
    """The same batches as with a file that is damaged, also when it is known from the start; and
    the decoder is left behind once, though the image was read for a later step by then."""
    # Of a step of each of the first epochs, which have one step each.
    sample = min(set.intersection(*(set(epoch_order(7, e, 45)[:40].tolist()) for e in range(5))))
    wanted = take(damaged_copy(packed, tmp_path / "damaged", {sample: "garbage"}))
    with ShardSet.open(str(packed)) as shards:
        endless = shards.read(np.array([sample]))[0].tobytes()
    blame(monkeypatch, blamed, endless)
    stuck = stuck_on(monkeypatch, gate, endless)
    run_list = tmp_path / NAME
    for _ in range(2):
        made = take(packed, run_list, seconds_per_image=0.5, prefetch=4)
        for got, want in zip(made, wanted, strict=True):
            assert np.array_equal(got.sample_ids, want.sample_ids)
            assert all(torch.equal(a, b) for a, b in zip(got.views, want.views, strict=True))
    assert stuck() == 1
    (entry,) = Quarantine.read(run_list)
    assert entry.reason == "it cannot be decoded (endless)"
