"""A check of an image file's structure before DALI gets it, which takes microseconds.

DALI 2.4 raises a clean error when pixels cannot be decoded, but a file whose *structure* its parser
refuses (a text file, an empty one, a PNG cut short) ends the whole process with a segmentation
fault once it is part of a batch. So the structure is walked here first. Formats other than JPEG,
PNG and WebP are refused: no packer of this project writes them, and some of DALI's other decoders
crash on damaged input.
"""

from __future__ import annotations

from struct import error as struct_error
from struct import unpack_from

from fastmoco_pipelines.errors import StructureError

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
_JPEG_FRAMES = frozenset((0xC0, 0xC1, 0xC2))  # baseline, extended, progressive; all Huffman coded
_JPEG_OTHER_FRAMES = frozenset(range(0xC3, 0xD0)) - {0xC4, 0xC8, 0xCC}
_JPEG_START_OF_SCAN = 0xDA


def image_size(data: bytes) -> tuple[int, int]:
    """(height, width) in pixels, before any EXIF rotation, that a JPEG, PNG or WebP file of sound
    structure declares.

    Its pixel data may still be damaged: that is an ordinary error of the decoder.

    Raises:
        StructureError: if the structure is broken or the format another one.
    """
    try:
        if data[:8] == _PNG_SIGNATURE:
            return _png_size(data)
        if data[:2] == b"\xff\xd8":
            return _jpeg_size(data)
        if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
            return _webp_size(data)
    except (struct_error, IndexError):
        raise StructureError("the file ends too early") from None
    raise StructureError("neither JPEG nor PNG nor WebP" if data else "the file is empty")


def _png_size(data: bytes) -> tuple[int, int]:
    length, kind, width, height, depth, color, compression, filtering, interlace = unpack_from(
        ">I4sIIBBBBB", data, 8
    )
    if (length, kind) != (13, b"IHDR"):
        raise StructureError("PNG without its header chunk")
    if not (0 < width < 1 << 31 and 0 < height < 1 << 31):
        raise StructureError(f"PNG of {width} x {height} pixels")
    if depth not in _PNG_DEPTHS.get(color, ()) or compression or filtering or interlace > 1:
        raise StructureError("PNG with an impossible header")
    position, pixels = 33, False
    while True:
        length, kind = unpack_from(">I4s", data, position)
        position += 12 + length
        if position > len(data):
            raise StructureError("PNG cut short")
        if kind == b"IEND":
            if not pixels:
                raise StructureError("PNG without pixels")
            return height, width
        pixels = pixels or kind == b"IDAT"


def _jpeg_size(data: bytes) -> tuple[int, int]:
    position = 2
    size: tuple[int, int] | None = None
    inks = False
    marked = False
    while True:
        if data[position] != 0xFF:
            raise StructureError("JPEG with a damaged header")
        while data[position] == 0xFF:
            position += 1
        marker = data[position]
        if marker == _JPEG_START_OF_SCAN:
            if size is None:
                raise StructureError("JPEG without a frame header")
            # DALI takes it for inverted and delivers black; Pillow does not
            if inks and not marked:
                raise StructureError(
                    "JPEG of four inks without Adobe's mark, which decoders read differently"
                )
            return size
        (length,) = unpack_from(">H", data, position + 1)
        if marker in _JPEG_FRAMES:
            depth, height, width, channels = unpack_from(">BHHB", data, position + 3)
            if (
                depth != 8
                or channels not in (1, 3, 4)
                or not (height and width)
                or length != 8 + 3 * channels
            ):
                raise StructureError(
                    f"JPEG of {width} x {height} pixels, {channels} channels, {depth} bits"
                )
            if size is not None:
                raise StructureError("JPEG with two frame headers")
            size = (height, width)
            inks = channels == 4
        elif marker in _JPEG_OTHER_FRAMES:
            raise StructureError("JPEG of an uncommon kind (lossless or arithmetic coding)")
        if marker < 0xC0 or length < 2:
            raise StructureError("JPEG with a damaged header")
        marked = marked or (
            marker == 0xEE and length >= 14 and data[position + 3 : position + 8] == b"Adobe"
        )
        position += 1 + length


def _webp_size(data: bytes) -> tuple[int, int]:
    (size,) = unpack_from("<I", data, 4)
    if size + 8 > len(data):
        raise StructureError("WebP cut short")
    kind = data[12:16]
    if kind not in (b"VP8 ", b"VP8L", b"VP8X"):
        raise StructureError("WebP without pixels")
    (length,) = unpack_from("<I", data, 16)
    if 20 + length > len(data):
        raise StructureError("WebP cut short")
    if kind == b"VP8X":  # the canvas; one image fills it, and animations are left out elsewhere
        low_width, high_width, low_height, high_height = unpack_from("<HBHB", data, 24)
        return (low_height | high_height << 16) + 1, (low_width | high_width << 16) + 1
    if kind == b"VP8 ":
        width, height = unpack_from("<HH", data, 26)
        if data[23:26] != b"\x9d\x01\x2a":
            raise StructureError("WebP with a damaged header")
        return height & 0x3FFF, width & 0x3FFF  # the upper two bits are a hint to scale
    (bits,) = unpack_from("<I", data, 21)
    if data[20] != 0x2F:
        raise StructureError("WebP with a damaged header")
    return (bits >> 14 & 0x3FFF) + 1, (bits & 0x3FFF) + 1
