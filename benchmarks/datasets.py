"""Real images for benchmarks and regression runs, made from packages that need no registration.

    python -m benchmarks.datasets fashion SRC OUT    # idx files of Fashion-MNIST
    python -m benchmarks.datasets patches SRC OUT    # 32-pixel patches of a folder of photographs
    python -m benchmarks.datasets windows SRC OUT    # grey ones of photographs with structure

Images are written to OUT/{train,test}/CLASS/*.png.

Debian's packages dataset-fashion-mnist and plasma-workspace-wallpapers contain such files. The
class of a patch is its photograph: training patches come from the left 60 % of it, held-out ones
from the right 35 %, so no pixel is in both. Windows are patches without what makes them easy or
hopeless: they are grey, because colors tell most photographs apart, none is flat, and each folder of
SRC gives one photograph, because a wallpaper comes in several formats.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

FASHION = (
    "tshirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "boot",
)
PATCH, TRAIN_PATCHES, TEST_PATCHES, MIN_SIDE = 32, 250, 40, 700
TRAIN_WINDOWS, TEST_WINDOWS, MIN_WIDTH, MIN_STD = 600, 100, 1000, 16.0
"""Windows of a photograph; its width; deviation of the grey levels of a window that is not flat."""
TRIES = 8
"""Draws for each window; a photograph with fewer windows than wanted is left out."""


def fashion(src: Path, out: Path) -> int:
    """Unpack Fashion-MNIST's idx files into PNG files by class; returns the number of images."""
    written = 0
    for split, prefix in (("train", "train"), ("test", "t10k")):
        images = _idx(src / f"{prefix}-images-idx3-ubyte.gz", header=16).reshape(-1, 28, 28)
        labels = _idx(src / f"{prefix}-labels-idx1-ubyte.gz", header=8)
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            folder = out / split / FASHION[label]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / f"{i:05d}.png")
            written += 1
    return written


def distinct_files(src: Path, suffixes: tuple[str, ...]) -> Iterator[Path]:
    """Files below `src` with one of the suffixes, in order of their names, each content once."""
    seen = set()
    for path in sorted(p for p in src.rglob("*") if p.suffix.lower() in suffixes and p.is_file()):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if digest not in seen:
            seen.add(digest)
            yield path


def patches(src: Path, out: Path, *, seed: int = 0) -> int:
    """Cut 32-pixel patches of random scale from every distinct photograph below
    `src`; returns their number.
    """
    rng, written = np.random.default_rng(seed), 0
    for number, path in enumerate(distinct_files(src, (".jpg", ".jpeg", ".png")), start=1):
        with Image.open(path) as opened:
            if min(opened.size) < MIN_SIDE:
                continue
            opened.draft("RGB", (1280, 1280))
            photo = opened.convert("RGB")
        photo.thumbnail((1280, 1280))
        name = f"photo{number:03d}"
        width = photo.width
        for split, count, left, right in (
            ("train", TRAIN_PATCHES, 0, int(0.6 * width)),
            ("test", TEST_PATCHES, int(0.65 * width), width),
        ):
            folder = out / split / name
            folder.mkdir(parents=True, exist_ok=True)
            for i in range(count):
                side = int(rng.integers(PATCH, min(160, right - left, photo.height)))
                x, y = (
                    int(rng.integers(left, right - side + 1)),
                    int(rng.integers(0, photo.height - side + 1)),
                )
                patch = photo.resize(
                    (PATCH, PATCH), Image.Resampling.BILINEAR, box=(x, y, x + side, y + side)
                )
                patch.save(folder / f"{i:03d}.png")
                written += 1
    return written


def windows(src: Path, out: Path, *, seed: int = 0) -> int:
    """Cut grey 32-pixel windows of random scale from one JPEG photograph in landscape of each
    folder in `src`; returns their number.
    """
    rng, written = np.random.default_rng(seed), 0
    chosen: dict[str, Path] = {}
    for path in distinct_files(src, (".jpg", ".jpeg")):
        with Image.open(path) as opened:
            if opened.width >= max(MIN_WIDTH, opened.height):
                chosen.setdefault(path.relative_to(src).parts[0], path)
    for name, path in chosen.items():
        with Image.open(path) as opened:
            opened.draft("L", (1280, 1280))
            grey = opened.convert("L")
        photo = grey.resize((1280, 1280 * grey.height // grey.width), Image.Resampling.LANCZOS)
        train = _windows(photo, 0, int(0.6 * photo.width), TRAIN_WINDOWS, rng)
        test = _windows(photo, int(0.65 * photo.width), photo.width, TEST_WINDOWS, rng)
        if len(train) < TRAIN_WINDOWS or len(test) < TEST_WINDOWS:
            continue
        for split, found in (("train", train), ("test", test)):
            folder = out / split / Path(name).stem
            folder.mkdir(parents=True, exist_ok=True)
            for i, window in enumerate(found):
                window.save(folder / f"{i:03d}.png")
                written += 1
    return written


def _windows(
    photo: Image.Image, left: int, right: int, count: int, rng: np.random.Generator
) -> list[Image.Image]:
    """Windows between two columns that are not flat, `count` at most."""
    found: list[Image.Image] = []
    for _ in range(TRIES * count):
        if len(found) == count:
            break
        side = int(rng.integers(PATCH, 160))
        x = int(rng.integers(left, right - side + 1))
        y = int(rng.integers(0, photo.height - side + 1))
        box = (x, y, x + side, y + side)
        window = photo.resize((PATCH, PATCH), Image.Resampling.BILINEAR, box=box)
        if np.asarray(window, np.float32).std() >= MIN_STD:
            found.append(window)
    return found


def _idx(path: Path, *, header: int) -> NDArray[np.uint8]:
    """The bytes of an idx file after its header."""
    return np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=header)


SETS = {"fashion": fashion, "patches": patches, "windows": windows}


def main() -> None:
    """Make one of the sets."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("which", choices=tuple(SETS))
    parser.add_argument("src", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    make = SETS[arguments.which]
    print(f"{make(arguments.src, arguments.out)} images in {arguments.out}")


if __name__ == "__main__":
    main()
