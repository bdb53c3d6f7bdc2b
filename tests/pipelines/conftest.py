"""Small sets of images and tars for the tests of the pipelines."""

from __future__ import annotations

import io
import tarfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.pipelines.http_fault_server import FaultServer


@pytest.fixture(scope="session")
def noise_image() -> Callable[..., bytes]:
    """An encoded image of smooth noise:
    `noise_image(i, height, width, format="JPEG", mode="RGB")`.
    """

    def make(
        i: int, height: int = 24, width: int = 32, format: str = "JPEG", mode: str = "RGB"
    ) -> bytes:
        coarse = np.random.default_rng(i).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        image = (
            Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).convert(mode)
        )
        out = io.BytesIO()
        image.save(out, format)
        return out.getvalue()

    return make


@pytest.fixture(scope="session")
def write_tar() -> Callable[..., Path]:
    """Writes (name, bytes or tarfile.TarInfo fields) members:
    `write_tar(path, [("a.jpg", data), ...])`.
    """

    def write(
        path: Path, members: list[tuple[str, bytes | dict[str, object]]], **options: int
    ) -> Path:
        with tarfile.open(path, "w", **options) as tar:  # type: ignore[call-overload]
            for name, content in members:
                info = tarfile.TarInfo(name)
                if isinstance(content, bytes):
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
                else:
                    for field, value in content.items():
                        setattr(info, field, value)
                    tar.addfile(info)
        return path

    return write


@pytest.fixture(scope="session")
def image_folder(
    tmp_path_factory: pytest.TempPathFactory, noise_image: Callable[..., bytes]
) -> Path:
    """45 images in three class folders, of several sizes and formats."""
    folder = tmp_path_factory.mktemp("images")
    for i in range(45):
        kind = ("jpg", "png", "webp")[i % 3]
        path = folder / ("cat", "dog", "owl")[i % 9 // 3] / f"{i:03d}.{kind}"
        path.parent.mkdir(exist_ok=True)
        format = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}[kind]
        path.write_bytes(
            noise_image(
                i, 20 + i % 7, 18 + i % 11, format, "L" if i % 5 == 0 and kind != "webp" else "RGB"
            )
        )
    return folder


@pytest.fixture(scope="session")
def packed(tmp_path_factory: pytest.TempPathFactory, image_folder: Path) -> Path:
    """`image_folder` packed into three shards `train-*.tar`. Copy it before you damage it."""
    from fastmoco_pipelines.making.pack import pack_folder

    out = tmp_path_factory.mktemp("packed")
    pack_folder(image_folder, out, shard_samples=16)
    return out


@pytest.fixture
def own_threads() -> Callable[[], list[str]]:
    """The names of our threads that live and did not when the test began: what an earlier test in
    this process has left may end at any time."""
    earlier = set(threading.enumerate())

    def names() -> list[str]:
        later = set(threading.enumerate()) - earlier
        return [thread.name for thread in later if thread.name.startswith("fastmoco")]

    return names


@pytest.fixture
def server(packed: Path) -> Iterator[FaultServer]:
    """The packed set on a local server with faults that a test controls."""
    with FaultServer(packed) as server:
        yield server
