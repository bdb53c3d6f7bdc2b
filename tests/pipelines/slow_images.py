"""Files that are small and sound, and take a decoder, or the walk over their parts, very long."""

from __future__ import annotations

import struct
import zlib

from tests.pipelines.image_corpus import WEBP, encode, ihdr, picture, png
from tests.pipelines.odd_images import JPEG, PNG, chunk, riff, segment

LIMIT = 100_000
"""Parts of a file that are walked over."""


def many_scans(height: int, width: int, scans: int) -> bytes:
    """A grey progressive JPEG: one scan of the mean levels of its blocks, all zero, and further
    ones that refine nothing, in 15 bits for 32,767 blocks. A decoder goes over all
    coefficients in each."""
    blocks = -(-height // 8) * -(-width // 8)
    frame = struct.pack(">BHHB", 8, height, width, 1) + bytes([1, 0x11, 0])
    one_code = b"\1" + bytes(15)  # of one bit, 0
    skips = -(-blocks // 32767)  # 0xE0: skip 2^14 blocks and as many as the next 14 bits say
    refining = segment(0xDA, bytes([1, 1, 0, 1, 63, 0x10])) + _packed(("0" + 14 * "1") * skips)
    return b"".join(
        [
            b"\xff\xd8",
            segment(0xDB, b"\0" + b"\1" * 64),
            segment(0xC2, frame),
            segment(0xC4, b"\0" + one_code + b"\0"),
            segment(0xC4, b"\x10" + one_code + b"\xe0"),
            segment(0xDA, bytes([1, 1, 0, 0, 0, 0])) + _packed("0" * blocks),
            (scans - 1) * refining,
            b"\xff\xd9",
        ]
    )


def _packed(bits: str) -> bytes:
    padded = bits + "1" * (-len(bits) % 8)
    return int(padded, 2).to_bytes(len(padded) // 8, "big").replace(b"\xff", b"\xff\0")


def comments(count: int) -> bytes:
    """A JPEG with empty comments, between quantisation tables that decoders need."""
    pair = segment(0xFE, b"") + segment(0xDB, b"\0" + b"\1" * 64)
    return JPEG[:2] + count // 2 * pair + JPEG[2:]


def texts(count: int) -> bytes:
    """A PNG with empty texts."""
    return PNG[:33] + count * chunk(b"tEXt", b"") + PNG[33:]


def split_pixels(count: int) -> bytes:
    """A PNG whose pixels are in one chunk among many empty ones."""
    rows = b"".join(b"\0" + bytes(9) for _ in range(3))
    empty = count * chunk(b"IDAT", b"")
    head, end = png([ihdr(3, 3, 8, 2)]), png([b"IDAT" + zlib.compress(rows), b"IEND"])[8:]
    return head + empty + end


def frames(count: int) -> bytes:
    """A WebP with empty frames of an animation."""
    canvas = b"".join((side - 1).to_bytes(3, "little") for side in picture().size)
    return riff((b"VP8X", bytes([2, 0, 0, 0]) + canvas), *count * [(b"ANMF", b"")])


def extras(count: int) -> bytes:
    """A WebP with empty chunks of no meaning before its pixels."""
    canvas = b"".join((side - 1).to_bytes(3, "little") for side in picture().size)
    pixels = WEBP[20 : 20 + struct.unpack_from("<I", WEBP, 16)[0]]
    return riff((b"VP8X", bytes(4) + canvas), *count * [(b"XYZW", b"")], (b"VP8 ", pixels))


FLOODS = (comments, texts, split_pixels, frames, extras)
"""Files of so many parts."""

SLOW: dict[str, tuple[bytes, str]] = {
    "scans_22.jpg": (many_scans(7000, 7000, 22), "too large or a bomb"),
    "scans_101.jpg": (many_scans(16, 16, 101), "damaged image"),
    "texts_100000.png": (texts(LIMIT), "damaged image"),
    "interlaced_30000.png": (
        png([ihdr(30000, 30000, 16, 6, 1), b"IDAT" + bytes(2_000_000), b"IEND"]),
        "too large or a bomb",
    ),
    "animation.png": (
        encode(picture(), "PNG", save_all=True, append_images=[picture().rotate(9)]),
        "animation",
    ),
    "frames.jpg": (
        encode(picture("P"), "GIF", save_all=True, append_images=[picture("P").rotate(9)]),
        "unsupported format",
    ),
    "pages.png": (
        encode(picture(), "TIFF", save_all=True, append_images=[picture()] * 9),
        "unsupported format",
    ),
}
"""Refused by the header alone, and the kind of fault that must be reported."""
