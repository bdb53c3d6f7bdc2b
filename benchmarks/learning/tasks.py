"""The tasks of the learning benchmark: real images from packages, and a recipe for each."""

from __future__ import annotations

import hashlib
import importlib.util
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.datasets import distinct_files, fashion, patches, windows
from fastmoco.config import Config, KnnConfig, ModelConfig
from fastmoco.recipes import get_recipe, with_image_size
from fastmoco_pipelines import pack_digits, pack_folder

IDX_FILES = tuple(
    f"{prefix}-{kind}-ubyte.gz"
    for prefix in ("train", "t10k")
    for kind in ("images-idx3", "labels-idx1")
)
SPLITS = ("train", "test")
PHOTO_SUFFIXES = (".jpg", ".jpeg", ".png")
FEWEST_PHOTOS = 10
"""Photographs below which their patches make no task."""
ENDLESS = 10_000.0
"""Epochs of the schedule. A run sees a few of them, so its rate is constant after the warm-up, to
one part in a million."""
WARM_STEPS = 50
"""Steps of the warm-up."""


class MissingData(Exception):
    """The files of a task are not there; the text names the package that has them."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """One set of images and how to train on it.

    Attributes:
        recipe: whose model, batch, views and rate are used.
        option: of the case, which names the folder of the source files; "": there is none.
        package: what to install.
        files: the source files in a folder.
        make: writes PNG files into train/CLASS and test/CLASS; None: the digits are packed.
        bank: training images of kNN, at most.
        queries: held-out images of kNN, at most.
    """

    recipe: str
    option: str = ""
    package: str
    files: Callable[[Path], list[Path]] = lambda _: []
    make: Callable[[Path, Path], object] | None = None
    bank: int = 5000
    queries: int = 5000


def _idx_files(folder: Path) -> list[Path]:
    found = [folder / name for name in IDX_FILES]
    return found if all(path.is_file() for path in found) else []


def _photographs(folder: Path) -> list[Path]:
    found = list(distinct_files(folder, PHOTO_SUFFIXES)) if folder.is_dir() else []
    return found if len(found) >= FEWEST_PHOTOS else []


TASKS: Mapping[str, Task] = {
    "fashion": Task(
        recipe="vit_nano7_e12_b256",
        option="fashion",
        package="Debian's package dataset-fashion-mnist",
        files=_idx_files,
        make=fashion,
    ),
    "patches": Task(
        recipe="vit_nano8_e60_b256",
        option="photos",
        package="Debian's package plasma-workspace-wallpapers",
        files=_photographs,
        make=patches,
        bank=0,
        queries=0,
    ),
    "windows": Task(
        recipe="vit_nano7_e12_b256",
        option="photos",
        package="Debian's package plasma-workspace-wallpapers",
        files=_photographs,
        make=windows,
        bank=0,
        queries=0,
    ),
    "digits": Task(
        recipe="quickstart_digits",
        package="the Python package scikit-learn",
        bank=0,
        queries=0,
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """Packed shards of a task.

    Attributes:
        train: pattern of the shards to train on; test: of the held-out ones.
        source: digest of the source files.
    """

    train: str
    test: str
    source: str


def prepare(name: str, options: Mapping[str, Any], folder: Path) -> Data:
    """Pack the images of a task, or find them packed from the same files in `folder`.

    Args:
        name: of the task.
        options: of the case; the task's own names the folder of its source files.
        folder: of packed sets.

    Raises:
        MissingData: if there are no such files.
    """
    task = TASKS[name]
    if task.make is None:
        if importlib.util.find_spec("sklearn") is None:
            raise MissingData(f"{name}: {task.package} is not installed")
        source, files = name, []
    else:
        where = Path(options[task.option])
        files = task.files(where)
        if not files:
            raise MissingData(
                f"{name}: nothing to use in {where}: install {task.package}, or give "
                f"{task.option}=FOLDER"
            )
        source = _digest(files)

    # A set gets its name when it is complete, so that a killed process leaves none.
    out = folder / "sets" / f"{name}-{source}"
    if not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="fastmoco-set-", dir=out.parent) as made:
            packed = Path(made) / "packed"
            if task.make is None:
                pack_digits(packed)
            else:
                task.make(where, Path(made) / "images")
                for split in SPLITS:
                    pack_folder(Path(made) / "images" / split, packed, prefix=split)
            packed.rename(out)
    train, test = (str(out / f"{split}-*.tar") for split in SPLITS)
    return Data(train=train, test=test, source=source)


def _digest(files: Iterable[Path]) -> str:
    """Of the contents, whatever the names of the files."""
    hashes = sorted(hashlib.sha256(path.read_bytes()).hexdigest() for path in files)
    return hashlib.sha256("".join(hashes).encode()).hexdigest()[:16]


def config_of(
    name: str,
    data: Data,
    *,
    seed: int,
    samples: int,
    recipe: str = "",
    image_size: int = 0,
    patch_size: int = 0,
    hidden_dim: int = 0,
    schedule: str = "",
) -> Config:
    """The config of a run: the recipe with one thread, a warm-up and a constant rate after it.

    A point of its curve then does not depend on where the run ends, so that the kNN after a budget
    of CPU-seconds is that of a run with this budget, for a fast trainer and for a slow one.

    Args:
        name: of the task.
        data: of the task.
        seed: of weights, order and views.
        samples: training images.
        recipe: instead of the task's.
        image_size: of views and evaluation, instead of the recipe's; 0: the recipe's.
        patch_size: likewise.
        hidden_dim: of the heads, likewise.
        schedule: of tokens and patches, as `phase_words` reads it; "": all tokens.
    """
    task = TASKS[name]
    config = get_recipe(recipe or task.recipe)
    if image_size or patch_size:
        size = image_size or config.model.image_size
        config = with_image_size(config, size, patch_size=patch_size)
    steps_per_epoch = max(1, samples // config.global_batch_size)
    objective: Any = config.objective
    if hasattr(objective, "ema_schedule"):
        objective = replace(objective, ema_schedule="constant")
    if patch_size and hasattr(objective, "cell"):  # of histograms, which fill a patch
        objective = replace(objective, cell=patch_size)
    model = replace(config.model, hidden_dim=hidden_dim or config.model.hidden_dim)
    if schedule:
        model = scheduled(model, schedule, round(ENDLESS * steps_per_epoch))
    return replace(
        config,
        seed=seed,
        device="cpu",
        threads=1,
        epochs=ENDLESS,
        model=model,
        objective=objective,
        optim=replace(config.optim, warmup_epochs=WARM_STEPS / steps_per_epoch),
        data=replace(config.data, shards=data.train, threads=1),
        knn=KnnConfig(
            every_epochs=0,
            test_shards=data.test,
            max_train_images=task.bank,
            max_test_images=task.queries,
        ),
    )


def scheduled(model: ModelConfig, schedule: str, total_steps: int) -> ModelConfig:
    """A model with the phases of `phase_words`, as shares of the run.

    Args:
        model: without phases.
        schedule: of tokens and patches.
        total_steps: of the whole run.
    """
    phases = [(patch, keep, step / total_steps) for patch, keep, step in phase_words(schedule)]
    keeps = ",".join(f"{keep!r}@{share!r}" for _, keep, share in phases)
    patches = ",".join(f"{patch}@{share!r}" for patch, _, share in phases)
    if phases[-1][0] != model.patch_size:
        patches += f",{model.patch_size}@0.99"  # a schedule of patches must end with them
    return replace(model, keep_tokens=keeps, patch_schedule=patches)


def phase_words(schedule: str) -> list[tuple[int, float, int]]:
    """Pixels of a patch, share of the tokens and first step of each phase of a schedule.

    Args:
        schedule: `PATCH/KEEP@STEP` with commas between them, as `8/0.5@0,4/0.25@200`.

    Raises:
        ValueError: if it is none.
    """
    found = []
    for word in schedule.split(","):
        read = re.fullmatch(r"(\d+)/([\d.]+)@(\d+)", word)
        if read is None:
            raise ValueError(f"schedule={schedule!r}: {word!r} is not PATCH/KEEP@STEP, as 4/0.5@0")
        found.append((int(read[1]), float(read[2]), int(read[3])))
    return found
