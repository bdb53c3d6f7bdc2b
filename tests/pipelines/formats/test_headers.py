"""The structure check: passes what the packer writes, names what would end the process inside
DALI."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from fastmoco_pipelines.formats.headers import image_size
from fastmoco_pipelines.formats.images import structure_fault

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8))


def encode(image: Image.Image, kind: str, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def fault(data: bytes) -> str | None:
    return structure_fault(data)


def empty_png(height: int, width: int) -> bytes:
    """A PNG of 57 bytes that declares a size and is well formed."""
    chunks = [b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), b"IDAT", b"IEND"]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
        for chunk in chunks
    )


FRAME = encode(PICTURE, "JPEG")[
    (START := encode(PICTURE, "JPEG").index(b"\xff\xc0\x00\x11")) : START + 19
]
TWO_FRAMES = encode(PICTURE, "JPEG").replace(
    FRAME, FRAME + FRAME.replace(b"\x00\x0c\x00\x10", b"\x75\x30\x75\x30")
)


def many_scans(count: int, *, progressive: bool = True) -> bytes:
    """A JPEG whose last scan, of a few bytes, is there so many times."""
    flat = Image.new("L" if progressive else "RGB", (16, 12), 128 if progressive else "red")
    data = encode(flat, "JPEG", progressive=progressive)
    at = data.rindex(b"\xff\xda")
    scan = data[at:-2]
    if not progressive:  # of one color alone, so that it is no copy of the whole
        scan = b"\xff\xda\x00\x08\x01\x01\x00\x00\x3f\x00" + scan[14:]
    return data[:at] + count * scan + data[-2:]


def segments(count: int) -> bytes:
    """Comments between two scans."""
    return count * b"\xff\xfe\x00\x05abc"


@pytest.mark.parametrize(
    "data",
    [encode(PICTURE.convert(mode), "PNG") for mode in ("1", "L", "LA", "P", "RGB", "RGBA")]
    + [encode(PICTURE.convert(mode), "JPEG") for mode in ("L", "RGB", "CMYK")]
    + [
        encode(PICTURE, "JPEG", progressive=True),
        encode(PICTURE, "JPEG", comment=b"words" * 99, subsampling=0),
        many_scans(90),
        many_scans(90)[:-2] + segments(500) + b"\xff\xd9" + many_scans(90),
        encode(PICTURE, "WEBP"),
        encode(PICTURE, "WEBP", lossless=True),
        encode(PICTURE.convert("RGBA").rotate(20), "WEBP"),
        encode(PICTURE, "PNG") + b"trailing",
        encode(PICTURE, "JPEG") + b"trailing",
    ],
)
def test_ordinary_files_pass_and_tell_their_size(data: bytes) -> None:
    assert fault(data) is None
    assert image_size(data) == (12, 16)


@pytest.mark.parametrize(
    "options", [{}, {"lossless": True}, {"lossless": True, "exif": b"Exif\0\0II*\0" + bytes(8)}]
)
def test_sizes_of_webp_beyond_a_byte(options) -> None:
    assert image_size(encode(PICTURE.resize((1025, 300)), "WEBP", **options)) == (300, 1025)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_file_cut_in_its_structure_is_named(kind: str) -> None:
    data = encode(PICTURE, kind)
    # Entropy-coded JPEG data has no structure: there only the header is looked at, the decoder
    # reports the rest.
    end = data.index(b"\xff\xda") if kind == "JPEG" else len(data)
    for cut in range(end):
        assert fault(data[:cut]), cut


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "empty"),
        (b"<html>not an image</html>", "neither JPEG nor PNG nor WebP"),
        (bytes(100), "neither JPEG nor PNG nor WebP"),
        (encode(PICTURE, "GIF"), "neither JPEG nor PNG nor WebP"),
        (encode(PICTURE, "PNG")[:33] + encode(PICTURE, "PNG")[-12:], "without pixels"),
        (encode(PICTURE, "PNG").replace((16).to_bytes(4, "big"), bytes(4), 1), "0 x 12"),
        (
            encode(PICTURE, "JPEG").replace(
                b"\xff\xc0\x00\x11\x08\x00\x0c", b"\xff\xc0\x00\x11\x08\x00\x00"
            ),
            "16 x 0",
        ),
        (
            encode(PICTURE, "JPEG").replace(b"\xff\xc0\x00\x11\x08", b"\xff\xc0\x00\x11\x0c"),
            "12 bits",
        ),
        (encode(PICTURE, "JPEG").replace(b"\xff\xc0\x00\x11", b"\xff\xc9\x00\x11"), "arithmetic"),
        (many_scans(101), "more than 100 scans"),
        (many_scans(101, progressive=False), "more than 100 scans"),
        (many_scans(90)[:-2] + segments(1001) + b"\xff\xd9", "more than 100 scans"),
        (TWO_FRAMES, "two frame headers"),
        (empty_png(30_000, 30_000), "above the limit"),
        (empty_png(7_000, 7_000), "bomb"),
        (encode(PICTURE, "WEBP").replace(b"VP8 ", b"ABCD"), "without pixels"),
    ],
)
def test_faults_are_named(data: bytes, says: str) -> None:
    assert says in str(fault(data))
