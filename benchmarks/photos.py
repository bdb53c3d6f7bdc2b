"""Photographs of about 500 x 375 pixels, as in data sets from the web, packed in three sizes for
the loader benchmark.

    python -m benchmarks.photos SRC OUT

packs the JPEG photographs below SRC into OUT/{original,max256,max512}/train-*.tar.

Debian's package plasma-workspace-wallpapers contains such files (dpkg-deb -x); nothing is
downloaded here. Windows of several widths are cut from every distinct photograph and scaled to 500
x 375, 375 x 500 or a little more. Flat windows (sky, blur) are omitted, because wallpapers have
more of them than a data set, whose files have about 100 kB.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import tempfile
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from benchmarks.datasets import distinct_files
from fastmoco_pipelines.making.pack import pack_folder

MIN_SIDE, CUTS, TRIES, FLAT_BYTES = 1000, 36, 3, 60_000
"""Smallest side of a photograph; windows per photograph; tries for each window;
bytes below which a file is flat."""
SHAPES = ((500, 375), (500, 375), (500, 375), (375, 500), (500, 334), (640, 480))
"""Width and height, drawn uniformly."""
PACKED = {"original": None, "max256": 256, "max512": 512}
"""Folder of shards -> longest side."""

DISTINCT = 256
"""Windows per sample photograph; a larger set repeats them."""


def cut_photos(
    src: Path, out: Path, *, cuts: int = CUTS, flat_bytes: int = FLAT_BYTES, seed: int = 0
) -> int:
    """Cut windows from every distinct JPEG photograph below `src` into `out`;
    returns the number of images.

    Args:
        src: searched recursively for .jpg and .jpeg files of at least 1000 pixels per side.
        out: created; one folder per photograph.
        cuts: windows of each photograph at most.
        flat_bytes: a window with a smaller file is omitted.
        seed: of the windows; the same files and seed give the same pixels.

    Raises:
        ValueError: if there is no photograph of that size.
    """
    rng, written = np.random.default_rng(seed), 0
    for number, path in enumerate(distinct_files(src, (".jpg", ".jpeg")), start=1):
        with Image.open(path) as opened:
            if min(opened.size) < MIN_SIDE:
                continue
            photo = opened.convert("RGB")
        folder = out / f"photo{number:03d}"
        folder.mkdir(parents=True, exist_ok=True)
        windows = (cut_window(photo, rng) for _ in range(TRIES * cuts))
        for i, data in enumerate(
            islice((data for data in windows if len(data) >= flat_bytes), cuts)
        ):
            (folder / f"{i:03d}.jpg").write_bytes(data)
            written += 1
    if not written:
        raise ValueError(
            f"src={str(src)!r}: holds no JPEG photograph of {MIN_SIDE} pixels a side or more that "
            "is not flat"
        )
    return written


def cut_window(photo: Image.Image, rng: np.random.Generator) -> bytes:
    """One window, scaled and encoded as JPEG."""
    width, height = SHAPES[int(rng.integers(len(SHAPES)))]
    most = min(photo.width / width, photo.height / height)
    scale = float(rng.uniform(min(2.0, most), min(4.0, most)))
    left, top = (
        rng.uniform(0, photo.width - scale * width),
        rng.uniform(0, photo.height - scale * height),
    )
    box = (left, top, left + scale * width, top + scale * height)
    out = io.BytesIO()
    photo.resize((width, height), Image.Resampling.LANCZOS, box=box).save(out, "JPEG", quality=95)
    return out.getvalue()


def main() -> None:
    """Cut and pack."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("src", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument(
        "--cuts", type=int, default=CUTS, help="windows of each photograph (default: %(default)s)"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        cut_photos(arguments.src, Path(folder), cuts=arguments.cuts)
        for name, max_side in PACKED.items():
            report = pack_folder(
                Path(folder), arguments.out / name, max_side=max_side, shard_samples=200
            )
            mean = report.total_bytes / report.samples / 1e3
            print(f"{report.samples} images of {mean:.0f} kB on average: {report.pattern}")


def sample_shards(folder: Path, batch: int) -> str:
    """At least two batches of windows of the two photographs of scikit-learn,
    or of smooth noise without it.
    """
    rng, src = np.random.default_rng(0), folder / "images"
    src.mkdir()
    for number, photo in enumerate(_photographs(rng)):
        windows = [
            cut_window(Image.fromarray(photo), rng) for _ in range(min(DISTINCT, max(24, batch)))
        ]
        for i in range(max(24, batch)):
            (src / f"{number}-{i:05d}.jpg").write_bytes(windows[i % len(windows)])
    return pack_folder(src, folder / "shards").pattern


def _photographs(rng: np.random.Generator) -> list[NDArray[np.uint8]]:
    if importlib.util.find_spec("sklearn") is not None:
        from sklearn.datasets import load_sample_images

        return list(load_sample_images().images)
    coarse = rng.integers(0, 256, (2, 60, 90, 3), dtype=np.uint8)
    return [
        np.asarray(Image.fromarray(noise).resize((640, 427), Image.Resampling.BICUBIC))
        for noise in coarse
    ]


if __name__ == "__main__":
    main()
