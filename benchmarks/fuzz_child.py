"""The child of `benchmarks.fuzz`: one mutated input at a time, decoded by this
project and by another library.

Uses the protocol of `fastmoco_pipelines.views.decode_child`. The `path` of an item is
`TARGET:FILE`; its crc32 is the number of the seed that the input was made from, the file
`TARGET-NUMBER` in the same folder. `kind` is the outcome, `reason` its detail.
"""

from __future__ import annotations

import io
import json
import os
import re
import sys
import tarfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fastmoco_pipelines.errors import ImageRefusedError, ShardError, TarError
from fastmoco_pipelines.formats.images import read_header
from fastmoco_pipelines.formats.index import (
    build_index,
    index_path,
    json_path,
    read_index,
    write_index,
)
from fastmoco_pipelines.formats.tar import walk_damaged, walk_tar
from fastmoco_pipelines.sets.shard_set import ShardSet
from fastmoco_pipelines.views.decode_child import Decoder, limit_memory, limit_time

Outcome = tuple[str, str]
ALIKE_LEVELS = 1.0
"""Two decoders agree within this many levels of 0 to 255; CMYK has no unique
conversion: see CMYK_LEVELS."""
CMYK_LEVELS = 3.0


def main() -> int:
    """Answer until the other side closes."""
    answers = os.fdopen(os.dup(1), "w", encoding="ascii", buffering=1)
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    warnings.simplefilter("ignore")
    limits = json.loads(sys.stdin.buffer.readline())
    targets: dict[str, Callable[[Path, bytes, Path], Outcome]] = {
        "image": _Images().judge,
        "tar": judge_tar,
        "index": judge_index,
    }
    warm_up()  # libraries are loaded before memory is limited
    limit_memory(limits["memory_bytes"], file_bytes=8 << 20)
    answers.write('{"ready": true}\n')
    for line in sys.stdin.buffer:
        for path, offset, size, number in json.loads(line):
            limit_time(limits["cpu_seconds"])
            target, _, name = path.partition(":")
            with open(name, "rb") as file:
                data = os.pread(file.fileno(), size, offset)
            folder = Path(name).parent
            own = folder / f"child-{os.getpid()}"
            own.mkdir(exist_ok=True)
            kind, reason = targets[target](own / "x.tar", data, folder / f"{target}-{number}")
            answer: dict[str, Any] = {
                "crc32": 0,
                "listed": True,
                "shape": None,
                "kind": kind,
                "reason": reason,
            }
            answers.write(json.dumps(answer) + "\n")
    return 0


class _Images:
    """Mutated image: refused, accepted with the same pixels as in Pillow, or a violation."""

    def __init__(self) -> None:
        self._decoder = Decoder()
        self._originals: dict[Path, NDArray[np.uint8]] = {}

    def judge(self, _: Path, data: bytes, seed: Path) -> Outcome:
        """(outcome, detail)."""
        if seed not in self._originals:
            self._originals[seed] = self._decoder.decode(seed.read_bytes()).copy()
        try:
            header = read_header(data)
        except ImageRefusedError as refused:
            return "refused by its header", _pith(str(refused))
        try:
            pixels = self._decoder.decode(data)
        except Exception as error:  # DALI raises several types
            return "refused by the decoder", type(error).__name__
        if pixels.shape != (header.height, header.width, 3):
            return "VIOLATION: another size than its header", f"{pixels.shape} {header}"
        if np.array_equal(pixels, self._originals[seed]):
            return "accepted, pixels of the original", ""
        try:
            wanted, levels = pillow_pixels(data)
        except Exception as error:  # hostile bytes may raise anything
            return "accepted, Pillow refuses, caught by crc32", _pith(
                f"{type(error).__name__}: {error}"
            )
        if wanted.shape != pixels.shape:
            return "VIOLATION: another size than Pillow's", f"{pixels.shape} {wanted.shape}"
        far = np.abs(pixels - wanted).max()
        if far > levels:
            return "VIOLATION: pixels differ from Pillow's", f"by up to {far:.0f} levels"
        return "accepted, pixel-equal to Pillow, caught by crc32", ""


def pillow_pixels(data: bytes) -> tuple[NDArray[np.float64], float]:
    """(pixels as RGB of 8 bits, levels by which another decoder may differ)."""
    image = Image.open(io.BytesIO(data))
    image.load()
    if image.mode.startswith("I"):
        grey = np.asarray(image).astype(np.float64) / 257
        return np.repeat(grey[..., None], 3, axis=2), ALIKE_LEVELS
    return np.asarray(image.convert("RGB")).astype(
        np.float64
    ), CMYK_LEVELS if image.mode == "CMYK" else ALIKE_LEVELS


def warm_up() -> None:
    """Load the decoders of every format in both libraries."""
    for kind in ("JPEG", "PNG", "WEBP"):
        out = io.BytesIO()
        Image.new("RGB", (16, 16)).save(out, kind)
        Decoder().decode(out.getvalue())
        pillow_pixels(out.getvalue())


def judge_tar(path: Path, data: bytes, seed: Path) -> Outcome:
    """Mutated tar: refused with a reason, or read as by the standard library."""
    del seed
    path.write_bytes(data)
    index_path(path).unlink(missing_ok=True)

    # The strict and the tolerant reader must agree on whether the tar is damaged.
    members, faults = walk_damaged(path)
    try:
        strict = list(walk_tar(path))
    except TarError as error:
        if not faults:
            return "VIOLATION: refused and found sound", str(error)
        try:
            build_index(path)
        except ShardError:
            return "refused by name", _pith(str(error))
        return "VIOLATION: a refused tar got an index", str(error)
    if faults or strict != members:
        return "VIOLATION: accepted and found damaged", str(faults)

    # The standard library is the reference for members.
    ours = [(m.name, m.offset, m.size) for m in strict if not m.kind]
    try:
        with tarfile.open(path) as tar:
            theirs = [(m.name, m.offset_data, m.size) for m in tar.getmembers() if m.isreg()]
    except Exception as error:  # of any kind
        return "accepted, the standard library refuses", _pith(f"{type(error).__name__}: {error}")
    try:
        write_index(path, build_index(path))
        with ShardSet.open(str(path)) as shards:
            shards.read(np.arange(len(shards)))
    except ShardError as error:
        return "accepted tar without a usable index", _pith(str(error))

    # Compare the members of both.
    places = [(offset, size) for _, offset, size in ours]
    if {(offset, size) for _, offset, size in theirs} - set(places):
        return (
            "VIOLATION: a member that the standard library finds is missing",
            f"{len(ours)} {len(theirs)}",
        )
    if len(places) > len(theirs):  # at a damaged field that no reader needs: an owner, a date
        return "accepted, the standard library loses members", ""
    if (
        ours != theirs
    ):  # a forged checksum over a damaged prefix, which GNU's own headers do not have
        return "accepted, the standard library reads another name", ""
    return "accepted, the members of the standard library", ""


def judge_index(path: Path, data: bytes, seed: Path) -> Outcome:
    """Mutated index of a sound tar: refused with a reason, or every sample has
    the right bytes and label.
    """
    raw = seed.read_bytes()
    path.write_bytes(raw)
    forms = (index_path(path), json_path(path))
    for form in forms:
        form.unlink(missing_ok=True)
    truth = build_index(path)
    forms[data.lstrip()[:1] == b"{"].write_bytes(data)
    try:
        index = read_index(path)
        with ShardSet.open(str(path)) as shards:
            encoded = shards.read(np.arange(len(shards)))
    except ShardError as error:
        return "refused by name", _pith(str(error))
    offsets = truth.columns["offset"]
    for i, image in enumerate(encoded):
        row = (
            offsets.index(index.columns["offset"][i])
            if index.columns["offset"][i] in offsets
            else -1
        )
        wanted = raw[offsets[row] : offsets[row] + truth.columns["size"][row]]
        if row < 0 or image.tobytes() != wanted:
            return "VIOLATION: a wrong sample", index.member(i)
        if (
            index.columns["label"][i] != truth.columns["label"][row]
            or index.keys[i] != truth.keys[row]
        ):
            sealed = b'"content_hash"' in data or not data.lstrip().startswith(b"{")
            return (
                "VIOLATION: a wrong label"
                if sealed
                else "accepted, another label or key in an index without hash",
                "",
            )
    if len(encoded) != len(truth):
        return "VIOLATION: samples lost without an error", str(len(encoded))
    return "accepted, nothing that matters is changed", ""


def _pith(text: str) -> str:
    """A message without its numbers and names, for counting."""
    return re.sub(r"\d+", "N", re.sub(r"'[^']*'|b\"[^\"]*\"", "'...'", text))[:90]


if __name__ == "__main__":
    sys.exit(main())
