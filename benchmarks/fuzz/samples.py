"""Sound inputs of small files, made by the project's own writers."""

from __future__ import annotations

import io
import json
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastmoco_pipelines.formats.index import build_index
from fastmoco_pipelines.formats.index_file import ShardIndex


@cache
def images() -> tuple[bytes, ...]:
    """One small picture in every encoding that is read."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 6, 3), dtype=np.uint8))
    picture = picture.resize((96, 64), Image.Resampling.BICUBIC)
    encodings: list[tuple[str, str, dict[str, Any]]] = [
        *(("JPEG", mode, {}) for mode in ("RGB", "L", "CMYK")),
        ("JPEG", "RGB", {"progressive": True}),
        ("JPEG", "RGB", {"subsampling": 0, "comment": b"words" * 20}),
        ("JPEG", "RGB", {"restart_marker_blocks": 2}),
        *(("PNG", mode, {}) for mode in ("RGB", "L", "P", "1", "RGBA", "LA", "I;16")),
        ("WEBP", "RGB", {}),
        ("WEBP", "RGB", {"lossless": True}),
        ("WEBP", "RGBA", {}),
    ]
    found = []
    for kind, mode, options in encodings:
        out = io.BytesIO()
        deep = Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257)
        (deep if mode == "I;16" else picture.convert(mode)).save(out, kind, **options)
        found.append(out.getvalue())
    return tuple(found)


@cache
def tars() -> tuple[bytes, ...]:
    """Three images with labels in every layout of a tar, with short and long names."""
    layouts = ((layout, long) for layout in (0, 1, 2) for long in (False, True))
    return tuple(_tar(layout, long) for layout, long in layouts if layout or not long)


def _tar(layout: int, long: bool) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=layout) as tar:
        for i, data in enumerate(images()[:3]):
            folder = "a-long-name/" * 12 if long else ""
            for name, content in (
                (f"{folder}{i:03d}.jpg", data),
                (f"{folder}{i:03d}.cls", b"%d" % i),
                (f"{folder}{i:03d}.json", b'{"label": "word-%d", "x": [1, {"y": null}]}' % i),
                (f"{folder}{i:03d}.txt", b"word %d\n" % i),
            ):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


@cache
def indexes() -> tuple[ShardIndex, ...]:
    """The indexes of `tars`, of files named x.tar."""

    def built(folder: Path) -> list[ShardIndex]:
        found = []
        for number, tar in enumerate(tars()):
            path = folder / f"{number}.tar"
            path.write_bytes(tar)
            found.append(replace(build_index(path), tar="x.tar"))
        return found

    made = in_folder(built)
    named = [*(f"cat/ü{i}.jpg" for i in range(2)), "b\udcff.png"]
    return (*made, replace(made[0], paths=named))


def in_folder(make: Callable[[Path], Any]) -> Any:
    """What a function makes in a folder that is removed afterwards."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        return make(Path(name))


def compact(content: Any) -> bytes:
    """JSON as the project writes it."""
    return json.dumps(content, separators=(",", ":")).encode("ascii")
