"""From JPEG shards to a kNN above that of the start, and images/s from shards over those of
synthetic images.

ViT-S trains by the clock on images cut from photographs (`pictures.py`), or on smooth noise without
their archive. Then it alternates with a trainer of one constant batch; ViT-B likewise, as far as
the time goes. If this fails with a loader on the GPU, the stage says so and begins again with a
loader on the CPU. A dry run has a tiny encoder and all else.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import os
import shutil
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from unittest import mock

import numpy as np
from PIL import Image

from benchmarks.gpu import pictures
from benchmarks.gpu.lines import emit
from benchmarks.outcome import FAILED, OK, SKIPPED

if TYPE_CHECKING:
    import torch

    from fastmoco.config import Config
    from fastmoco.training.trainer import Trainer

NAME, RATIO = "JPEG shards to kNN", "JPEG over synthetic, {}"
LOADER = f"{NAME}, loader on the {{}}"
ARCHIVE = Path(__file__).resolve().parents[2] / ".gpu" / pictures.NAME
GOALS = {"ViT-S": 0.90, "ViT-B": 0.95}
"""G11: images/s from shards over those of synthetic images."""
CLASSES = 4
"""Of the images without the archive."""
WARM_UP, TOTAL = 20, 5000
"""Steps of the schedule. No run reaches the total, so that the rate stays near its peak."""
LR = 4e-4
"""Base rate, times batch / 256: above that of the recipes, as the runs are short."""
CHUNKS: dict[str, Any] = {"chunk": 128, "activation_budget": 0.9}
"""As planned for 4096 images, for which blocks are compiled already."""
STRIDE = 4
"""Steps between two looks at the clock."""
BUILD_S = {"ViT-S": 15.0, "ViT-B": 40.0}
"""Seconds that a pair takes beside its windows: building, compiling."""
Model = Literal["ViT-S", "ViT-B"]
Device = Literal["gpu", "cpu"]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What one call measures, and on which images.

    Attributes:
        dry: on the CPU, small.
        loader: where images are decoded.
        train, test: shards.
        seconds: of training.
        window_s: of each of the windows that alternate.
        ends: by `time.monotonic`.
    """

    dry: bool
    loader: Device
    train: str
    test: str
    seconds: float
    window_s: float
    ends: float

    @property
    def left(self) -> float:
        """Seconds."""
        return self.ends - time.monotonic()

    @property
    def batch(self) -> int:
        """Images of a step."""
        return 8 if self.dry else 512

    def config(self, model: Model, *, synthetic: bool = False, knn: bool = False) -> Config:
        """The run of a model."""
        from fastmoco.config import BatchConfig, DataConfig, KnnConfig
        from fastmoco.recipes import vit_b16_e300_b4096, vit_nano8_e60_b256, vit_s16_e300_b1024

        recipe = {"ViT-S": vit_s16_e300_b1024, "ViT-B": vit_b16_e300_b4096}[model]
        base = vit_nano8_e60_b256() if self.dry else recipe()
        own = DataConfig(device=self.loader, timeout_s=40.0)
        epoch = max(1, train_images(self.dry) // self.batch)
        return replace(
            base,
            device="cpu" if self.dry else "gpu",
            threads=1 if self.dry else 14,
            global_batch_size=self.batch,
            batch=BatchConfig(**({} if self.dry else CHUNKS)),
            epochs=TOTAL / epoch,
            log_every_steps=20,
            data=replace(base.data if self.dry else own, shards=self.train, synthetic=synthetic),
            knn=KnnConfig(
                test_shards=self.test if knn else "", every_epochs=1e6, max_train_images=0
            ),
            optim=replace(base.optim, lr=LR, warmup_epochs=WARM_UP / epoch),
        )


def train_images(dry: bool) -> int:
    """Images for training; a quarter as many for testing."""
    return 64 if dry else 4096


@dataclass(frozen=True, kw_only=True)
class Window:
    """Some steps of a training loop.

    Attributes:
        steps: their number.
        images_per_s: by the clock.
        wait_share: share of the time in which the device had nothing to do but to wait for a batch.
        host_wait_share: in which the host waited, which is ahead of a GPU.
    """

    steps: int
    images_per_s: float
    wait_share: float
    host_wait_share: float


def main() -> int:
    """Train, evaluate and compare; returns 1 if something failed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--only", default="")
    parser.add_argument("--seconds", type=float, default=40.0, help="of training")
    parser.add_argument("--limit", type=float, default=110.0, help="seconds of everything")
    parser.add_argument("--loader", choices=("gpu", "cpu"), default="gpu")
    parser.add_argument("--folder", type=Path, help="with images of an earlier call")
    given = parser.parse_args()
    ends = time.monotonic() + given.limit
    dry = given.dry_run
    if not _has("webdataset"):
        emit(NAME, SKIPPED, reason="needs webdataset, which is not here")
        return 0
    loader: Device = "cpu" if dry else given.loader
    if loader == "gpu" and not _has("nvidia.dali"):
        emit(LOADER.format("GPU"), SKIPPED, reason="needs nvidia.dali, which is not here")
        loader = "cpu"

    folder = given.folder or Path(tempfile.mkdtemp())
    try:
        train, test, about = images(folder, dry)
        setting = Setting(
            dry=dry,
            loader=loader,
            train=train,
            test=test,
            seconds=0.5 if dry else given.seconds,
            window_s=0.1 if dry else 4.0,
            ends=ends,
        )
        return run(setting, folder, about, again=lambda: _again(folder, setting))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _has(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # nor its parent package
        return False


def _again(folder: Path, setting: Setting) -> None:
    """Begin again with a loader on the CPU, in a new process: after an error on a GPU this one may
    be of no use. Its memory goes with it."""
    words = [f"--folder={folder}", "--loader=cpu", f"--limit={max(1.0, setting.left):.0f}"]
    words += [f"--seconds={setting.seconds}"]
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, "-m", "benchmarks.gpu.end_to_end", *words])  # noqa: S606 - this module


def run(setting: Setting, folder: Path, about: dict[str, Any], *, again: Callable[[], None]) -> int:
    """All figures; `again` is called if the first training fails with a loader on the GPU."""
    failed = False
    with ExitStack() as stack:
        try:
            trainer, learnt = learn(setting, folder, about, stack)
        except Exception as error:
            traceback.print_exc()
            where = LOADER.format(setting.loader.upper())
            emit(where, FAILED, reason=f"{type(error).__name__}: {str(error)[:400]}")
            if setting.loader == "gpu":
                again()
            return 1
        failed = not learnt
        failed |= compare("ViT-S", setting, folder, stack, trainer)
    del trainer  # and the memory that it holds
    _release()
    with ExitStack() as stack:
        failed |= compare("ViT-B", setting, folder, stack)
    return int(failed)


def learn(
    setting: Setting, folder: Path, about: dict[str, Any], stack: ExitStack
) -> tuple[Trainer, bool]:
    """Train ViT-S for the given seconds, between two kNN figures; the trainer, and whether the
    second is above the first."""
    from fastmoco_pipelines.loading.memory import loader_bytes

    before = _outside_torch()
    trainer = _built(setting.config("ViT-S", knn=True), folder / "ViT-S", stack)
    (monitor,) = trainer.monitors
    began = time.monotonic()
    trainer.run(max_steps=STRIDE)  # measures kNN first, then compiles
    _wait(trainer)
    first_steps_s = time.monotonic() - began
    start = monitor.last["knn"]
    seconds = max(setting.window_s, min(setting.seconds, setting.left - 5))
    with _marked(trainer) as waited:
        found = window(trainer, seconds, waited)
    end = monitor.measure(monitor.subject(trainer.objective), 1.0, trainer.step_count)["knn"]

    # A tiny encoder in a dry run learns nothing within a second.
    learnt = end > start or setting.dry
    held = loader_bytes(trainer.loader.spec)
    memory = _memory()
    if memory:
        outside = memory["outside_torch_gb"] - before / 1e9
        # The batches ahead are in torch's memory. What else the driver has given out since: DALI's
        # buffers, and the code of kernels.
        memory["loader_gb"] = round(outside + held.ready_bytes / 1e9, 2)
        memory["loader_expected_gb"] = round(held.beside_batch_bytes / 1e9, 2)
    emit(
        NAME,
        OK if learnt else FAILED,
        reason="" if learnt else f"kNN {end:.3f} is not above {start:.3f} of the start",
        knn_start=round(start, 4),
        knn=round(end, 4),
        steps=trainer.step_count,
        **_rounded(found),
        **memory,
        loader=setting.loader,
        batch=setting.batch,
        first_steps_s=round(first_steps_s, 1),
        **about,
    )
    return trainer, learnt


def compare(
    model: Model,
    setting: Setting,
    folder: Path,
    stack: ExitStack,
    trainer: Trainer | None = None,
) -> bool:
    """Images/s from shards and of synthetic images, in turns; whether it failed.

    Args:
        model: that is trained.
        setting: of the call.
        folder: for the runs.
        stack: closes the trainers that are built here.
        trainer: of the side from shards, if there is one.
    """
    name = RATIO.format(model)
    if setting.left < BUILD_S[model] + 4 * setting.window_s and not setting.dry:
        emit(name, SKIPPED, reason=f"out of time: {setting.left:.0f} s left")
        return False
    try:
        trainer = trainer or _built(setting.config(model), folder / model, stack)
        config = setting.config(model, synthetic=True)
        sides = {"jpeg": trainer, "synthetic": _built(config, folder / f"{model} alone", stack)}
        turns: dict[str, list[Window]] = {side: [] for side in sides}
        for number in range(2):
            for side, each in sides.items():
                each.run(max_steps=STRIDE if number else 2 * STRIDE)  # compiles, uses up a batch
                _wait(each)
                with _marked(each) as waited:
                    turns[side].append(window(each, setting.window_s, waited))
    except Exception as error:
        traceback.print_exc()
        emit(name, FAILED, reason=f"{type(error).__name__}: {str(error)[:400]}")
        return True
    rates = {side: statistics.fmean(w.images_per_s for w in some) for side, some in turns.items()}
    emit(
        name,
        ratio=round(rates["jpeg"] / rates["synthetic"], 3),
        goal=GOALS[model],
        wait_share=round(statistics.fmean(w.wait_share for w in turns["jpeg"]), 3),
        images_per_s={side: round(rate, 1) for side, rate in rates.items()},
        turns={side: [round(w.images_per_s, 1) for w in some] for side, some in turns.items()},
        loader=setting.loader,
        batch=setting.batch,
        plans={side: str(each.forward_backward.plan) for side, each in sides.items()},
        **_memory(),
    )
    return False


def _built(config: Config, out: Path, stack: ExitStack) -> Trainer:
    from fastmoco.distributed.mesh import start_world
    from fastmoco.training.trainer import Trainer

    trainer = Trainer.build(config, out, start_world(config.device))
    stack.callback(trainer.close)
    return trainer


def window(trainer: Trainer, seconds: float, waited: Callable[[], float]) -> Window:
    """Some seconds of a training loop; `waited` gives the seconds that its device waited."""
    host = trainer.loader.figures().wait_s
    first = trainer.step_count
    began = time.monotonic()
    while time.monotonic() - began < seconds:
        trainer.run(max_steps=STRIDE)
    _wait(trainer)
    took = time.monotonic() - began
    steps = trainer.step_count - first
    host = trainer.loader.figures().wait_s - host
    return Window(
        steps=steps,
        images_per_s=steps * trainer.config.global_batch_size / took,
        wait_share=(waited() if trainer.world.device.type == "cuda" else host) / took,
        host_wait_share=host / took,
    )


@contextmanager
def _marked(trainer: Trainer) -> Iterator[Callable[[], float]]:
    """Marks on the stream of a GPU before and after each batch is taken: between the two it has
    nothing to do. Gives the sum in seconds, once the device has done all."""
    import torch

    marks: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
    take = trainer.loader.next

    def marked() -> Any:
        pair = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))  # type: ignore[no-untyped-call]
        pair[0].record()
        batch = take()
        pair[1].record()
        marks.append(pair)
        return batch

    on_gpu = trainer.world.device.type == "cuda"
    with mock.patch.object(trainer.loader, "next", marked if on_gpu else take):
        yield lambda: sum(one.elapsed_time(two) for one, two in marks) / 1e3


def _wait(trainer: Trainer) -> None:
    """Until the device has done what it was given."""
    import torch

    if trainer.world.device.type == "cuda":
        torch.cuda.synchronize(trainer.world.device)


def _outside_torch() -> int:
    """Bytes that the driver has given out, without those of torch's allocator."""
    import torch

    if not torch.cuda.is_available():
        return 0
    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved()


def _memory() -> dict[str, Any]:
    """Gigabytes on the GPU: what torch used and held at most, and what the driver has given out."""
    import torch

    if not torch.cuda.is_available():
        return {}
    free, total = torch.cuda.mem_get_info()
    found = {
        "peak_gb": torch.cuda.max_memory_allocated(),
        "reserved_gb": torch.cuda.max_memory_reserved(),
        "driver_gb": total - free,
        "outside_torch_gb": _outside_torch(),
    }
    return {name: round(size / 1e9, 2) for name, size in found.items()}


def _release() -> None:
    """Give memory back that closed trainers had, and forget their compiled graphs, of which torch
    keeps a few for each function only."""
    import torch

    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _rounded(found: Window) -> dict[str, Any]:
    """The figures of a window."""
    return {
        "images_per_s": round(found.images_per_s, 1),
        "wait_share": round(found.wait_share, 3),
        "host_wait_share": round(found.host_wait_share, 3),
    }


def images(folder: Path, dry: bool) -> tuple[str, str, dict[str, Any]]:
    """Packed images in a folder: shards for training and for testing, and facts about them."""
    from fastmoco_pipelines.making.pack import pack_folder

    out = folder / "shards"
    patterns = [str(out / f"{split}-*.tar") for split in pictures.SPLITS]
    if out.exists():  # packed by the call before
        return patterns[0], patterns[1], {}
    began = time.monotonic()
    counts = (train_images(dry), train_images(dry) // 4)
    if ARCHIVE.exists():
        pictures.cut(ARCHIVE, folder, counts, processes=1 if dry else os.cpu_count() or 1)
    else:
        for number, (split, count) in enumerate(zip(pictures.SPLITS, counts, strict=True)):
            _noise(folder / split, count, 40 if dry else 400, number)
    packed = [pack_folder(folder / split, out, prefix=split) for split in pictures.SPLITS]
    about = {
        "images": [report.samples for report in packed],
        "kb_per_image": round(packed[0].total_bytes / packed[0].samples / 1e3, 1),
        "photographs": ARCHIVE.exists(),
        "made_in_s": round(time.monotonic() - began, 1),
    }
    return patterns[0], patterns[1], about


def _noise(folder: Path, count: int, side: int, seed: int) -> None:
    """JPEGs of smooth noise, a folder for each class, each class with its own color."""
    rng = np.random.default_rng(seed)
    for number in range(count):
        label = number % CLASSES
        place = folder / f"class{label}"
        place.mkdir(parents=True, exist_ok=True)
        coarse = rng.integers(0, 128, (9, 12, 3), dtype=np.uint8)
        coarse[..., label % 3] += np.uint8(100 if label < 3 else 0)
        picture = Image.fromarray(coarse).resize((side * 4 // 3, side), Image.Resampling.BICUBIC)
        picture.save(place / f"{number:05d}.jpg", quality=90)


if __name__ == "__main__":
    raise SystemExit(main())
