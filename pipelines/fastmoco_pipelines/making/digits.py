"""Ready-made shards of real images that need no download: scikit-learn's handwritten digits."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from fastmoco_pipelines.making.pack import Progress, pack_folder
from fastmoco_pipelines.sampling.order_v1 import shuffled


def pack_digits(
    out: Path, *, seed: int = 0, overwrite: bool = False, progress: Progress | None = None
) -> tuple[str, str]:
    """Pack the 1797 digits (8 x 8 pixels, 10 classes; Alpaydin and Kaynak 1998) as grey PNG, 1437
    to train on, 360 to test.

    Every class is split in the same proportion, to within one image. Levels 0 to 16 become 0 to
    255. The images are packed by `pack_folder`, like any others.

    Args:
        out: folder of the shards `train-*.tar` and `test-*.tar`.
        seed: of the split and of the order in the shards.
        overwrite: replace sets that exist already.
        progress: called with (images done, 1797).

    Returns:
        (pattern of the training shards, pattern of the test shards).

    Raises:
        FileExistsError: if `out` holds such shards already.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    levels = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    drawn = shuffled(seed, len(levels))
    by_class = drawn[np.argsort(digits.target[drawn], kind="stable")]
    parts = {"train": np.delete(by_class, np.s_[::5]), "test": by_class[::5]}
    done = 0
    patterns = {}
    with tempfile.TemporaryDirectory(prefix="digits-") as folder:
        for name, ids in parts.items():
            for i in ids.tolist():
                path = Path(folder) / name / str(digits.target[i]) / f"{i:04d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(levels[i]).save(path)
        for name, ids in parts.items():
            report = None if progress is None else _shifted(progress, done, len(levels))
            source = Path(folder) / name
            patterns[name] = pack_folder(
                source, out, prefix=name, seed=seed, overwrite=overwrite, progress=report
            ).pattern
            done += len(ids)
    return patterns["train"], patterns["test"]


def _shifted(progress: Progress, start: int, total: int) -> Progress:
    return lambda done, _: progress(start + done, total)
