"""Data of a soak: a set of images, a damaged copy of it, and a server that drops connections."""

from __future__ import annotations

import io
import random
import re
import shutil
import threading
import zlib
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Self

import numpy as np
from PIL import Image

from fastmoco_pipelines import ShardSet, pack_folder
from fastmoco_pipelines.formats.index import read_any_index, tar_hash, write_index

_SHARDS = 20
_KINDS = ("changed", "garbage", "truncated", "zeros")


def make_set(folder: Path, images: int) -> tuple[Path, str, int]:
    """Pack JPEG images of smooth noise, about 100 to 300 pixels a side.

    Returns:
        (folder of the shards, pattern of their names, bytes in all shards).
    """
    source = folder / "source"
    source.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(images):
        coarse = rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)
        width, height = rng.integers(100, 300, 2).tolist()
        out = io.BytesIO()
        Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(
            out, "JPEG", quality=90
        )
        (source / f"{i:06d}.jpg").write_bytes(out.getvalue())
    pack_folder(source, folder / "shards", shard_samples=max(1, images // _SHARDS))
    shutil.rmtree(source)
    tars = sorted((folder / "shards").glob("*.tar"))
    pattern = f"train-{{000000..{len(tars) - 1:06d}}}.tar"
    return folder / "shards", pattern, sum(tar.stat().st_size for tar in tars)


def damaged_set(clean: Path, to: Path, share: float) -> list[int]:
    """Copy a set and damage a share of its images; returns their sample numbers.

    The index contains three kinds, as if another tool had packed damaged files; "changed" bytes
    differ from the index.
    """
    shutil.copytree(clean, to)
    (to / "manifest.json").unlink()  # its checksums would refuse whole shards
    with ShardSet.open(str(to)) as shards:
        bad = (
            np.random.default_rng(1)
            .choice(len(shards), int(share * len(shards)), replace=False)
            .tolist()
        )
        places = [(shards.entry(i), i - shards.shard_of(i)[1].start) for i in bad]
    for number, (entry, row) in enumerate(places):
        _damage(
            to / str(entry["shard"]),
            row,
            int(entry["offset"]),
            int(entry["size"]),
            _KINDS[number % len(_KINDS)],
        )
    return list(bad)


def _damage(tar: Path, row: int, offset: int, size: int, kind: str) -> None:
    data = bytearray(tar.read_bytes())
    new = {
        "changed": bytes([data[offset + size // 2] ^ 0xFF]),
        "garbage": np.random.default_rng(offset).bytes(size),
        "truncated": bytes(size - size // 2),
        "zeros": bytes(size),
    }[kind]
    at = offset + (size // 2 if kind in ("changed", "truncated") else 0)
    data[at : at + len(new)] = new
    tar.write_bytes(data)
    index = replace(read_any_index(tar), tar_hash=tar_hash(tar))
    if kind != "changed":
        index.columns["crc32"][row] = zlib.crc32(bytes(data[offset : offset + size]))
    write_index(tar, index)


class DroppingServer(ThreadingHTTPServer):
    """Serves the tars and indexes of a folder on 127.0.0.1, with ranges; cuts off one answer with a
    tar in `drop_every`.

    Attributes:
        answers: number of answers with a tar.
        drops: how many of these were cut off.
    """

    daemon_threads = True

    def __init__(self, folder: Path, drop_every: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.drop_every = drop_every
        self.answers = 0
        self.drops = 0
        self._random = random.Random(0)
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        """URL of the folder, without a slash at the end."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def keeps(self, name: str, size: int) -> int:
        """Number of bytes of an answer that are sent."""
        with self._lock:
            if not name.endswith(".tar"):
                return size
            self.answers += 1
            if not self.drop_every or self._random.randrange(self.drop_every):
                return size
            self.drops += 1
            return self._random.randrange(size)

    def handle_error(self, request: object, client_address: object) -> None:
        """Ignore clients that disconnect during an answer."""

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, args=(0.1,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: DroppingServer
    protocol_version = "HTTP/1.1"
    timeout = 30

    def do_GET(self) -> None:
        """Send a file, or the end of one."""
        name = self.path.lstrip("/")
        path = self.server.folder / name
        if not re.fullmatch(r"[\w.-]+", name) or not path.is_file():
            self.send_error(404)
            return
        data, start = path.read_bytes(), 0
        etag = f'"{zlib.crc32(data):08x}"'
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        stop = len(data)
        if asked and self.headers.get("If-Range", etag) == etag:
            start, stop = int(asked[1]), int(asked[2] or len(data) - 1) + 1
        body = data[start:stop]
        self.send_response(206 if asked and len(body) < len(data) else 200)
        if len(body) < len(data):
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(data)}")
        self.send_header("ETag", etag)
        self.send_header("Content-Type", "application/x-tar")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        sent = self.server.keeps(name, len(body))
        try:
            self.wfile.write(body[:sent])
        except OSError:  # the client has disconnected
            sent = 0
        if sent < len(body):
            self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing."""
