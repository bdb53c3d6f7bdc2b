"""`python -m benchmarks.fuzz --inputs 20000 --seconds 600 --seed 0`: mutated images, tars and
indexes, and their outcomes.

Every input is processed in a child process with limits on time and memory. Outcomes are: refused
with a reason; accepted with the same pixels, members or labels as in Pillow or the standard
library; and violations: wrong pixels or samples without an error, crashes, hangs over 10 s. A
flipped bit in the scan of a JPEG gives the same wrong pixels in every decoder; only the crc32 in
the index detects it, and such inputs are counted separately. Exit code 1 on a violation.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import os
import sys
import tarfile
import tempfile
import time
import zlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastmoco_pipelines.files import sealed_json
from fastmoco_pipelines.formats.index import build_index
from fastmoco_pipelines.formats.index_file import to_bytes
from fastmoco_pipelines.formats.index_json import json_content
from fastmoco_pipelines.views.decode_pool import ChildLimits, DecodePool, Item

ROOT = Path(__file__).resolve().parent.parent
TARGETS = {"image": 0.8, "tar": 0.15, "index": 0.05}
"""Share of the inputs."""
VIOLATIONS = ("VIOLATION", "crash", "hang")
_ROUND = 2000


def main(argv: Sequence[str] | None = None) -> int:
    """Run, print a table, return 1 on a violation."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fuzz", description=__doc__)
    parser.add_argument("--inputs", type=int, default=20_000, help="mutated inputs in all")
    parser.add_argument("--seconds", type=float, default=3600.0, help="stop after so long")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument(
        "--keep", type=Path, help="write the inputs that break a rule into this folder"
    )
    options = parser.parse_args(argv)
    paths = [str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)  # the children import this package
    start = time.monotonic()
    counts: dict[str, Counter[tuple[str, str]]] = defaultdict(Counter)
    done = 0
    with (
        tempfile.TemporaryDirectory(prefix="fuzz-") as name,
        DecodePool(options.workers, ChildLimits(seconds=10.0), "benchmarks.fuzz_child") as pool,
    ):
        folder = Path(name)
        seeds = write_seeds(folder)
        while done < options.inputs and time.monotonic() - start < options.seconds:
            rng = np.random.default_rng([options.seed, done])
            inputs = [mutated(rng, seeds) for _ in range(min(_ROUND, options.inputs - done))]
            items = _written(folder / f"round-{done}", inputs)
            for (target, _, data), outcome in zip(inputs, pool.run(items), strict=True):
                counts[target][outcome.kind, outcome.reason] += 1
                if options.keep and outcome.kind.startswith(VIOLATIONS):
                    options.keep.mkdir(parents=True, exist_ok=True)
                    (options.keep / f"{target}-{zlib.crc32(data):08x}").write_bytes(data)
            (folder / f"round-{done}").unlink()
            done += len(inputs)
            if sys.stderr.isatty():
                print(f"\r{done} inputs", end="", file=sys.stderr)
        restarts = pool.restarts
    return report(counts, restarts=restarts, seconds=time.monotonic() - start)


def report(counts: dict[str, Counter[tuple[str, str]]], *, restarts: int, seconds: float) -> int:
    """Print outcomes by target, most frequent first, with their most common
    details; 1 on a violation.
    """
    total = sum(sum(counter.values()) for counter in counts.values())
    violations = 0
    for target in TARGETS:
        of_target = counts.get(target, Counter())
        print(f"{target}: {sum(of_target.values())} inputs")
        kinds: Counter[str] = Counter()
        for (kind, _), count in of_target.items():
            kinds[kind] += count
        for kind, count in kinds.most_common():
            print(f"  {count:8d}  {kind}")
            details = Counter(
                {reason: n for (k, reason), n in of_target.items() if k == kind and reason}
            )
            for reason, n in details.most_common(5 if kind.startswith(VIOLATIONS) else 3):
                print(f"            {n:8d}  {reason}")
            violations += count if kind.startswith(VIOLATIONS) else 0
    print(
        f"{total} inputs in {seconds:.0f} s, {restarts} processes ended at work, {violations} "
        "violations"
    )
    return 1 if violations else 0


def write_seeds(folder: Path) -> dict[str, list[bytes]]:
    """Small images of every kind, tars of every layout, and an index, in one folder."""
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
    images = []
    for kind, mode, options in encodings:
        out = io.BytesIO()
        deep = Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257)
        (deep if mode == "I;16" else picture.convert(mode)).save(out, kind, **options)
        images.append(out.getvalue())
    tars = [
        _tar(images[:3], layout, long)
        for layout in (0, 1, 2)
        for long in (False, True)
        if layout or not long
    ]
    indexes = []
    for i, tar in enumerate(tars):
        for path in (folder / f"index-{2 * i}", folder / f"index-{2 * i + 1}"):
            path.write_bytes(tar)
        index = replace(build_index(path), tar="x.tar")
        indexes += [to_bytes(index), sealed_json(json_content(index))]
    seeds = {"image": images, "tar": tars, "index": indexes}
    for target in ("image", "tar"):
        for i, data in enumerate(seeds[target]):
            (folder / f"{target}-{i}").write_bytes(data)
    return seeds


def _tar(images: list[bytes], layout: int, long: bool) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=layout) as tar:
        for i, data in enumerate(images):
            folder = "a-long-name/" * 12 if long else ""
            for name, content in (
                (f"{folder}{i:03d}.jpg", data),
                (f"{folder}{i:03d}.cls", b"%d" % i),
            ):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


def mutated(rng: np.random.Generator, seeds: dict[str, list[bytes]]) -> tuple[str, int, bytes]:
    """(target, number of the seed, bytes): one to four mutations of a seed."""
    target = str(rng.choice(list(TARGETS), p=list(TARGETS.values())))
    number = int(rng.integers(len(seeds[target])))
    data = bytearray(seeds[target][number])
    # The JSON form without the hash of its content, as the first versions wrote it.
    if target == "index" and number % 2 and rng.random() < 0.5:
        data = data[: data.rindex(b',"content_hash"')] + b"}"
    for _ in range(int(rng.integers(1, 5))):
        _mutate(rng, data, target)
    if target == "image" and rng.random() < 0.5:
        _mend_png(data)
    if target == "tar" and rng.random() < 0.7:
        _mend_tar(data)
    if target == "index" and number % 2 == 0 and rng.random() < 0.5:
        _mend_index(data)
    return target, number, bytes(data)


def _mend_index(data: bytearray) -> None:
    """The hash of the header made right, so that what is in it is looked at."""
    size = int.from_bytes(data[12:16], "little")
    data[16:48] = hashlib.sha256(data[48 : 48 + size]).digest()


def _mutate(rng: np.random.Generator, data: bytearray, target: str) -> None:
    """Change a few bytes in place; half of the time near the start, or in a tar in its headers."""
    if not data:
        return
    near = rng.random() < 0.5
    at = int(rng.integers(min(len(data), 700) if near and target != "tar" else len(data)))
    if near and target == "tar":  # a field of a header: name, size, checksum, type
        blocks = [
            i for i in range(0, len(data) - 511, 512) if data[i + 257 : i + 262] == b"ustar"
        ] or [0]
        at = min(
            int(rng.choice(blocks)) + int(rng.choice([0, 3, 124, 130, 148, 156, 257, 345])),
            len(data) - 1,
        )
    length = int(rng.integers(1, 40))
    kind = int(rng.integers(9))
    if kind == 0:
        data[at] ^= 1 << int(rng.integers(8))
    elif kind == 1:
        data[at] = int(rng.choice([0, 1, 0x7F, 0x80, 0xFF, ord("-"), ord("9")]))
    elif kind == 2:
        data[at : at + length] = rng.bytes(len(data[at : at + length]))
    elif kind == 3:
        data[at : at + length] = bytes(len(data[at : at + length]))
    elif kind == 4:
        del data[at : at + length]
    elif kind == 5:
        data[at:at] = data[at : at + length]
    elif kind == 6 and rng.random() < 0.3:
        del data[at:]
    elif kind == 7:
        size = int(rng.choice([2, 4]))
        value = int(rng.choice([0, 1, 2**15, 2**16 - 1, 2**31 - 1, 2**32 - 1])) % 256**size
        data[at : at + size] = value.to_bytes(size, "big")[: len(data[at : at + size])]
    else:
        data[at] = (data[at] + int(rng.choice([1, 255]))) % 256


def _mend_png(data: bytearray) -> None:
    """Correct the checksums, so that the decoder is reached."""
    if data[:8] != b"\x89PNG\r\n\x1a\n":
        return
    at = 8
    while at + 12 <= len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        end = at + 8 + length
        if end + 4 > len(data):
            return
        data[end : end + 4] = zlib.crc32(data[at + 4 : end]).to_bytes(4, "big")
        at = end + 4


def _mend_tar(data: bytearray) -> None:
    """Correct the checksums of everything that looks like a header."""
    for at in range(0, len(data) - 511, 512):
        if data[at + 257 : at + 262] == b"ustar":
            data[at + 148 : at + 156] = b" " * 8
            data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])


def _written(path: Path, inputs: Sequence[tuple[str, int, bytes]]) -> list[Item]:
    """Put all inputs into one file."""
    items = []
    with open(path, "wb") as file:
        for target, number, data in inputs:
            items.append(Item(f"{target}:{path}", file.tell(), len(data), number))
            file.write(data)
    return items


if __name__ == "__main__":
    sys.exit(main())
