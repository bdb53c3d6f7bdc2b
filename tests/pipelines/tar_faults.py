"""The tar faults of the test plan, each made from a sound tar of 20 samples,
and the expected outcome.
"""

from __future__ import annotations

import gzip
import io
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

COUNT = 20


@dataclass(frozen=True)
class TarFault:
    """Outcome for a tar that was indexed while it was whole, and for one that never had an index.

    `delivered` counts the samples that remain with the old index, `fresh` those found without one;
    `kinds` are faults that the check must report, with and without an index.
    """

    make: Callable[[bytes], bytes]
    delivered: int
    fresh: int
    kinds: tuple[str, ...] = ("damaged tar",)
    fresh_kinds: tuple[str, ...] = ("damaged tar",)


def good_members(image: Callable[..., bytes], start: int = 0) -> list[tuple[str, bytes]]:
    """20 samples of jpg and cls."""
    names = [(f"{i:03d}.jpg", f"{i:03d}.cls", i) for i in range(start, start + COUNT)]
    return [
        pair
        for jpg, cls, i in names
        for pair in ((jpg, image(i, 40, 48)), (cls, str(i % 3).encode()))
    ]


def member(raw: bytes, name: str) -> tuple[int, int, int]:
    """(byte of the header, byte of the data, size) of a member."""
    with tarfile.open(fileobj=io.BytesIO(raw)) as tar:
        info = tar.getmember(name)
        return info.offset, info.offset_data, info.size


def _cut(name: str, where: str) -> Callable[[bytes], bytes]:
    def make(raw: bytes) -> bytes:
        header, data, size = member(raw, name)
        return raw[: {"header": header + 200, "start": header, "middle": data + size // 2}[where]]

    return make


def _overwrite(
    name: str, what: Callable[[int], bytes], in_data: bool = False, size: int = 512
) -> Callable[[bytes], bytes]:
    def make(raw: bytes) -> bytes:
        header, data, _ = member(raw, name)
        at = data if in_data else header
        return raw[:at] + what(size) + raw[at + size :]

    return make


def _size_field(raw: bytes) -> bytes:
    """A size of 8 GiB with a correct checksum."""
    header, _, _ = member(raw, "010.jpg")
    block = bytearray(raw[header : header + 512])
    block[124:136] = b"\x80" + (8 << 30).to_bytes(11, "big")
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return raw[:header] + bytes(block) + raw[header + 512 :]


def _noise(size: int) -> bytes:
    return bytes((i * 73 + 11) % 251 for i in range(size))


EMPTY_TAR = bytes(10240)

# Damage to a file that was whole when it was indexed. 20 samples are promised, always.
DAMAGES = {
    "cut inside a member": TarFault(
        _cut("010.jpg", "middle"), 10, 10, ("damaged tar", "stale index", "cut off")
    ),
    "cut at a member's edge": TarFault(
        _cut("010.jpg", "start"), 10, 10, ("damaged tar", "stale index", "cut off")
    ),
    "cut inside a header": TarFault(
        _cut("010.jpg", "header"), 10, 10, ("damaged tar", "stale index", "cut off")
    ),
    "cut between jpg and cls": TarFault(
        _cut("010.cls", "start"), 11, 11, ("damaged tar", "stale index", "cut off")
    ),
    "random bytes in a header": TarFault(_overwrite("010.jpg", _noise), 20, 19),
    "zeroed kilobyte in a header": TarFault(
        _overwrite("010.jpg", bytes, size=1024), 19, 19, ("damaged tar", "changed bytes")
    ),
    "zeroed block in the data": TarFault(
        _overwrite("010.jpg", bytes, in_data=True), 19, 19, ("changed bytes",), ("no image",)
    ),
    "size field of 8 GiB": TarFault(
        _size_field, 20, 19, ("damaged tar",), ("damaged tar", "cut off")
    ),
    "zero bytes": TarFault(lambda raw: b"", 0, 0, ("damaged tar", "stale index", "cut off")),
    "valid empty tar": TarFault(
        lambda raw: EMPTY_TAR, 0, 0, ("empty tar", "stale index"), ("empty tar",)
    ),
    "HTML": TarFault(
        lambda raw: b"<!doctype html><html>404</html>" * 40, 0, 0, ("damaged tar", "stale index")
    ),
    "random bytes": TarFault(lambda raw: _noise(9000), 0, 0, ("damaged tar", "stale index")),
    "gzip named .tar": TarFault(gzip.compress, 0, 0, ("damaged tar", "stale index")),
    "truncated gzip": TarFault(
        lambda raw: gzip.compress(raw)[:3000], 0, 0, ("damaged tar", "stale index")
    ),
}


def write_damaged(path: Path, raw: bytes) -> Path:
    """Replace a tar by damaged bytes."""
    path.write_bytes(raw)
    return path
