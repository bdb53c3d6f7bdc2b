"""Photographs that travel in one small archive, and the images that are cut from them.

`python -m benchmarks.gpu.carry --pictures FOLDER` makes `.gpu/pictures.tar` of a folder with a
folder for each photograph in several sizes, as Debian's package plasma-workspace-wallpapers has
them in /usr/share/wallpapers. The images are files of about 500 x 375 pixels: those for training
from the left two thirds of each photograph, those for testing from the rest. A photograph is a
class.
"""

from __future__ import annotations

import io
import multiprocessing
import tarfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

NAME = "pictures.tar"
SIZE = (1200, 800)
"""Of a photograph in the archive."""
QUALITY = 75
MOST = 20
"""Photographs: those with the largest files, because flat ones take no time to decode."""
LIMIT_MIB = 2.5
IMAGE = (500, 375)
IMAGE_QUALITY = 95
"""As those of `benchmarks.photos`."""
WIDTHS = (290, 390)
"""Of the windows, in pixels of the photograph."""
LIGHT = (0.5, 1.5)
"""Factors of brightness, contrast and saturation, drawn for each image: else the colors alone tell
the photographs apart, also to an encoder that has learnt nothing."""
LEFT = 2 * SIZE[0] // 3
"""Where the part for training ends."""
SPLITS = ("train", "test")


def make(src: Path, out: Path, *, most: int = MOST) -> list[str]:
    """Write the archive; returns the names of its photographs.

    Args:
        src: each folder in it is a photograph; the widest file below it is taken.
        out: the archive.
        most: photographs at most.

    Raises:
        ValueError: if there is no photograph, or the archive is too large.
    """
    found = {}
    for folder in sorted(path for path in src.iterdir() if path.is_dir()):
        files = [path for path in folder.rglob("*") if path.suffix in (".jpg", ".jpeg", ".png")]
        if files:
            found[folder.name] = _encoded(max(sorted(files), key=_width))
    if not found:
        raise ValueError(f"src={str(src)!r}: no folder in it holds a photograph")
    names = sorted(sorted(found, key=lambda name: -len(found[name]))[:most])
    with tarfile.open(out, "w") as archive:
        for name in names:
            member = tarfile.TarInfo(f"{name}.jpg")
            member.size = len(found[name])
            archive.addfile(member, io.BytesIO(found[name]))
    if out.stat().st_size > LIMIT_MIB * 2**20:
        raise ValueError(f"{out}: {out.stat().st_size / 2**20:.2f} MiB, more than {LIMIT_MIB}")
    return names


def cut(archive: Path, out: Path, counts: Sequence[int], *, processes: int) -> None:
    """Cut images from all photographs of an archive into `out/train/CLASS` and `out/test/CLASS`.

    Args:
        archive: made by `make`.
        out: a new folder.
        counts: images for training and for testing, over all classes.
        processes: that work at the same time.
    """
    photos = out / "photos"
    with tarfile.open(archive) as tar:
        tar.extractall(photos, filter="data")
    files = sorted(photos.iterdir())
    jobs = [
        (file, out / split / file.stem, -(-count // len(files)), 2 * number + part)
        for number, file in enumerate(files)
        for part, (split, count) in enumerate(zip(SPLITS, counts, strict=True))
    ]
    if processes == 1:
        for job in jobs:
            _cut_one(job)
        return
    # New interpreters: a fork of a process that has threads may hang.
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(_cut_one, jobs))


def _cut_one(job: tuple[Path, Path, int, int]) -> None:
    """Some images of one photograph: the file, their folder, their number, the seed; an odd seed
    is that of the part for testing."""
    file, folder, count, seed = job
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    with Image.open(file) as opened:
        photo = opened.convert("RGB")
    first, end = (LEFT, SIZE[0]) if seed % 2 else (0, LEFT)
    for number in range(count):
        width = rng.uniform(*WIDTHS)
        height = width * IMAGE[1] / IMAGE[0]
        left, top = rng.uniform(first, end - width), rng.uniform(0, SIZE[1] - height)
        image = photo.resize(
            IMAGE, Image.Resampling.BICUBIC, box=(left, top, left + width, top + height)
        )
        for change in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
            image = change(image).enhance(rng.uniform(*LIGHT))
        image.save(folder / f"{number:04d}.jpg", quality=IMAGE_QUALITY)


def _encoded(file: Path) -> bytes:
    """A photograph as it is in the archive."""
    out = io.BytesIO()
    with Image.open(file) as opened:
        photo = ImageOps.fit(opened.convert("RGB"), SIZE, Image.Resampling.LANCZOS)
    photo.save(out, "JPEG", quality=QUALITY, optimize=True)
    return out.getvalue()


def _width(file: Path) -> int:
    with Image.open(file) as opened:
        return opened.width
