"""A check of an image file's structure before a decoder gets it, which takes microseconds, and the
same image without what is no pixel.

DALI 2.4 raises a clean error when pixels cannot be decoded, but a file whose *structure* its parser
refuses (a text file, an empty one, a PNG cut short) ends the whole process with a segmentation
fault once it is part of a batch. So the structure is walked here first. Formats other than JPEG,
PNG and WebP are refused: no packer of this project writes them, and some of DALI's other decoders
crash on damaged input.

What surrounds the pixels (EXIF, color profiles, texts, previews, further pictures, padding) changes
none of them, but decoders stumble over it: Pillow refuses a PNG with a long text or a wrong
checksum of such a chunk, DALI a WebP with a chunk of odd length before its EXIF, and both print
warnings. So `plain_image` removes it, and every decoder here gets its result.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from struct import error as struct_error
from struct import pack, unpack_from
from zlib import crc32, decompressobj
from zlib import error as ZlibError

from fastmoco_pipelines.errors import StructureError

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
_PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
_PNG_PALETTE = 3  # the color type whose pixels are numbers of colors in PLTE
_STEP = 1 << 16  # bytes that are unpacked at a time
_PNG_END = b"\0\0\0\0IEND\xaeB`\x82"
_JPEG_FRAMES = frozenset((0xC0, 0xC1, 0xC2))  # baseline, extended, progressive; all Huffman coded
_JPEG_OTHER_FRAMES = frozenset(range(0xC3, 0xD0)) - {0xC4, 0xC8, 0xCC}
# reserved, or for hierarchical JPEG: libjpeg refuses them
_JPEG_UNKNOWN = frozenset((0xC8, 0xDE, 0xDF, *range(0xF0, 0xFE)))
_JPEG_START_OF_SCAN = 0xDA
_JPEG_COMMENT = 0xFE
_JPEG_PADDING = re.compile(rb"[\0\xff]*")
_JPEG_MARKER = re.compile(rb"\xff[\xc0-\xcf\xd8-\xfe]")  # one with a segment, or the end
_JPEG_END = 0xD9
_PROGRESSIVE = 0xC2
_MAX_SCANS = 100
_MAX_PARTS = 100_000
"""Segments of a JPEG's header, or chunks of a PNG or WebP: to walk over so many takes 0.1 s, and a
PNG of the largest size that has one for each row has a sixth."""
_WEBP_ANIMATION = 0x02  # bits of the flags in VP8X
_WEBP_ALPHA = 0x10
_WEBP_PIXEL_BYTES = 7  # decoded to four channels first
_WEBP_CANVAS_BYTES = 4  # a frame of an animation is put onto a canvas besides
SLOW_SCANS = "which take long to decode: save it again as an ordinary JPEG"
"""The end of a sentence about a JPEG with many scans."""


@dataclass(frozen=True, slots=True)
class Structure:
    """An image file by its parts.

    Attributes:
        height, width: in pixels, before any EXIF rotation.
        animated: it contains further pictures that are shown one after another.
        parts: what a decoder needs for the first picture, in order: ranges of bytes of the file, or
            bytes.
        pixel_bytes: what a decoder takes for each pixel of the picture: three of the result, and
            those of the whole picture in another form where it needs that before.
        scans: times that a decoder goes over the pixels.
    """

    height: int
    width: int
    animated: bool
    parts: tuple[tuple[int, int] | bytes, ...]
    pixel_bytes: int = 3
    scans: int = 1

    @property
    def pixels(self) -> int:
        """Height * width."""
        return self.height * self.width

    @property
    def decoder_bytes(self) -> int:
        """What a decoder takes for the picture, in bytes."""
        return self.pixels * self.pixel_bytes


def structure(data: bytes) -> Structure:
    """The structure of a JPEG, PNG or WebP file. Its pixel data may still be damaged: that is an
    ordinary error of the decoder.

    Raises:
        StructureError: if the structure is broken or the format another one.
    """
    try:
        if data[:8] == _PNG_SIGNATURE:
            return _png(data)
        if data[:3] == b"\xff\xd8\xff":
            return _jpeg(data)
        if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
            return _webp(data)
    except (struct_error, IndexError):
        raise StructureError("the file ends too early") from None
    raise StructureError("neither JPEG nor PNG nor WebP" if data else "the file is empty")


def image_size(data: bytes) -> tuple[int, int]:
    """(height, width) in pixels, before any EXIF rotation, that a JPEG, PNG or WebP file of sound
    structure declares.

    Raises:
        StructureError: as `structure`.
    """
    found = structure(data)
    return found.height, found.width


def plain_image(data: bytes, known: Structure | None = None) -> bytes:
    """The image without what is no pixel; `data` itself where there is nothing else in it.

    A decoder makes the same pixels of it: what is left out is metadata, alpha of a PNG that is
    dropped anyway, padding, and pictures after the first.

    Args:
        data: the file.
        known: its structure, if the caller has it.

    Raises:
        StructureError: as `structure`.
    """
    parts = (known or structure(data)).parts
    if parts == ((0, len(data)),):
        return data
    return b"".join(p if isinstance(p, bytes) else data[p[0] : p[1]] for p in parts)


def pixel_fault(data: bytes) -> str | None:
    """What is wrong with the packed pixels of a PNG of sound structure, or None. Reads all of them:
    DALI wants every checksum and the end of the stream, Pillow neither."""
    if data[:8] != _PNG_SIGNATURE:
        return None
    width, height, depth, color = unpack_from(">IIBB", data, 16)
    row = 1 + (width * depth * _PNG_CHANNELS[color] + 7) // 8
    left = (
        2 * row * height + 4096
    )  # interlaced pixels take somewhat more than one row after another
    stream = decompressobj(0)  # of the window that the stream's own header declares
    step = 0
    position = 33
    while True:
        length, kind = unpack_from(">I4s", data, position)
        start, position = position + 8, position + 12 + length
        if kind == b"IEND":
            return (
                None if stream.eof or left <= 0 else "PNG whose pixels end too early (chunk IDAT)"
            )
        if kind != b"IDAT":
            continue
        if not _sums_up(data, start - 8, length):
            return "PNG with a wrong checksum of its pixels (chunk IDAT)"
        if length and not step:
            # A window that is declared too small shows in steps of a row, which libpng takes.
            step = row if data[start] < 0x78 else _STEP
        for at in range(start, start + length, _STEP):
            packed = data[at : min(at + _STEP, start + length)]
            while packed and not stream.eof and left > 0:
                try:
                    left -= len(stream.decompress(packed, step))
                except ZlibError as error:
                    reason = str(error).rpartition(": ")[2]
                    return f"PNG with damaged pixels (chunk IDAT: {reason})"
                packed = stream.unconsumed_tail


def _png(data: bytes) -> Structure:
    length, kind, width, height, depth, color, compression, filtering, interlace = unpack_from(
        ">I4sIIBBBBB", data, 8
    )
    if kind == b"CgBI":
        raise StructureError(
            "PNG in Apple's own form for iPhones (chunk CgBI): save it again as an ordinary PNG"
        )
    if (length, kind) != (13, b"IHDR"):
        raise StructureError("PNG without its header chunk (IHDR)")
    if not (0 < width < 1 << 31 and 0 < height < 1 << 31):
        raise StructureError(f"PNG of {width} x {height} pixels")
    if depth not in _PNG_DEPTHS.get(color, ()) or compression or filtering or interlace > 1:
        raise StructureError("PNG with an impossible header (chunk IHDR)")
    if not _sums_up(data, 8, 13):
        raise StructureError("PNG with a wrong checksum of its header (chunk IHDR)")

    position = 33
    parts: list[tuple[int, int] | bytes] = [(0, 33)]
    palette = False
    pixels = ended = False
    frames = 1
    more_frames = False
    for _ in range(_MAX_PARTS):
        length, kind = unpack_from(">I4s", data, position)
        start = position
        position += 12 + length
        if position > len(data):
            raise StructureError("PNG cut short")
        if kind == b"IDAT":
            # What comes after the first run of pixel chunks is not read.
            if not ended:
                pixels = True
                _add(parts, start, position)
            continue
        ended = pixels
        if kind == b"IEND":
            break
        if kind == b"PLTE" and color == _PNG_PALETTE and not pixels:
            if palette or length % 3 or not 0 < length <= 768:
                raise StructureError("PNG with an impossible palette (chunk PLTE)")
            if not _sums_up(data, start, length):
                raise StructureError("PNG with a wrong checksum of its palette (chunk PLTE)")
            palette = True
            _add(parts, start, position)
        elif kind == b"acTL" and length == 8:
            frames = max(frames, int.from_bytes(data[start + 8 : start + 12], "big"))
        elif kind == b"fdAT":
            more_frames = True
        elif not kind.isalpha() or kind == b"IHDR":
            raise StructureError(f"PNG with a damaged chunk ({ascii(kind)[2:-1]} at byte {start})")
        # A lower-case first letter marks what a decoder may skip.
        elif kind[0] < ord("a") and kind != b"PLTE":
            raise StructureError(
                f"PNG with a chunk that no decoder knows ({kind.decode()}): save it again as an "
                "ordinary PNG"
            )
    else:
        raise _too_many("PNG", "chunks")
    if not pixels:
        raise StructureError("PNG without pixels (chunk IDAT)")
    if color == _PNG_PALETTE and not palette:
        raise StructureError("PNG without its palette (chunk PLTE)")
    if data[start:position] == _PNG_END:
        _add(parts, start, position)
    else:
        parts.append(_PNG_END)
    # Pixels of 16 bits and those of several passes are there as a whole before they are bytes of RGB.
    whole = _PNG_CHANNELS[color] * depth // 8 if interlace or depth == 16 else 0
    animated = more_frames and frames > 1
    return Structure(height, width, animated, tuple(parts), 3 + whole)


def _too_many(kind: str, parts: str) -> StructureError:
    return StructureError(
        f"{kind} of more than {_MAX_PARTS} {parts}: save it again as an ordinary {kind}"
    )


def _sums_up(data: bytes, start: int, length: int) -> bool:
    """Whether the checksum of the chunk that starts here is right."""
    end = start + 8 + length
    return crc32(memoryview(data)[start + 4 : end]) == int.from_bytes(data[end : end + 4], "big")


def _add(parts: list[tuple[int, int] | bytes], start: int, end: int) -> None:
    """Add a range of bytes; one that continues the last part becomes part of it."""
    last = parts[-1]
    if isinstance(last, tuple) and last[1] == start:
        parts[-1] = (last[0], end)
    else:
        parts.append((start, end))


def _jpeg(data: bytes) -> Structure:
    position = 2
    parts: list[tuple[int, int] | bytes] = [(0, 2)]
    size: tuple[int, int] | None = None
    channels = 0
    progressive = False
    inks = False
    marked = False
    for _ in range(_MAX_PARTS):
        # Cameras leave zeros, and the format allows 0xFF, between two segments.
        start = position
        padding = _JPEG_PADDING.match(data, position)
        position = start if padding is None else padding.end()
        marker = data[position]
        if position == start or data[position - 1] != 0xFF:
            raise StructureError(f"JPEG with a damaged header (byte {position})")
        start = position - 1
        if marker == _JPEG_START_OF_SCAN:
            if size is None:
                raise StructureError("JPEG without a frame header")
            # DALI takes it for inverted and delivers black; Pillow does not
            if inks and not marked:
                raise StructureError(
                    "JPEG of four inks without Adobe's mark, which decoders read differently: save "
                    "it again as RGB"
                )
            _add(parts, start, len(data))
            if not progressive and data[position + 3] >= channels:
                return Structure(*size, False, tuple(parts))
            scans = _count_scans(data, start)
            if scans > _MAX_SCANS:
                raise StructureError(f"JPEG of more than {_MAX_SCANS} scans, {SLOW_SCANS}")
            # All coefficients, of two bytes, are there before the first pixel is.
            return Structure(*size, False, tuple(parts), 3 + 2 * channels, scans)
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
            progressive = marker == _PROGRESSIVE
        elif marker in _JPEG_OTHER_FRAMES:
            raise StructureError(
                "JPEG of an uncommon kind (lossless or arithmetic coding): save it again as an "
                "ordinary JPEG"
            )
        elif marker in _JPEG_UNKNOWN:
            raise StructureError(f"JPEG with a marker that no decoder knows (0xFF{marker:02X})")
        if marker < 0xC0 or 0xD0 <= marker <= 0xD9 or length < 2:
            raise StructureError(f"JPEG with a damaged header (byte {start})")
        adobe = marker == 0xEE and length >= 14 and data[position + 3 : position + 8] == b"Adobe"
        marked = marked or adobe
        position += 1 + length
        # Of the application's segments, these two decide which colors are meant.
        jfif = marker == 0xE0 and data[start + 4 : start + 9] == b"JFIF\0"
        if adobe or jfif or not (0xE0 <= marker <= 0xEF or marker == _JPEG_COMMENT):
            _add(parts, start, position)
    raise _too_many("JPEG", "segments before its pixels")


def _count_scans(data: bytes, position: int) -> int:
    """How often a decoder goes over the pixels; more than `_MAX_SCANS` where it is more often than
    any photograph needs: a scan of a few bytes costs as much as one of megabytes. `position`: of
    the first scan."""
    scans = 0
    for _ in range(10 * _MAX_SCANS):
        found = _JPEG_MARKER.search(data, position)
        if found is None:
            return scans
        marker = data[found.end() - 1]
        if marker == _JPEG_END:
            return scans
        scans += marker == _JPEG_START_OF_SCAN
        if scans > _MAX_SCANS:
            return scans
        position = found.end() + int.from_bytes(data[found.end() : found.end() + 2], "big")
    return _MAX_SCANS + 1


def _webp(data: bytes) -> Structure:
    (size,) = unpack_from("<I", data, 4)
    end = size + 8
    if end > len(data):
        raise StructureError("WebP cut short")
    kind, length = unpack_from("<4sI", data, 12)
    if kind != b"VP8X":
        height, width = _webp_picture(data, 12, end)
        return _webp_still(data, 12, height, width, None, end)

    # The extended form: the canvas, and one picture or several, with anything between them.
    low_width, high_width, low_height, high_height = unpack_from("<HBHB", data, 24)
    width, height = (low_width | high_width << 16) + 1, (low_height | high_height << 16) + 1
    alpha: tuple[int, int] | None = None
    control: tuple[int, int] | None = None
    frames: list[tuple[int, int]] = []
    position = 20 + length + (length & 1)
    for _ in range(_MAX_PARTS):
        if position + 8 > end:
            break
        kind, length = unpack_from("<4sI", data, position)
        part = (position, position + 8 + length + (length & 1))
        if kind in (b"VP8 ", b"VP8L") and not frames:
            if _webp_picture(data, position, end) != (height, width):
                raise StructureError("WebP whose picture has another size than its canvas")
            return _webp_still(
                data, position, height, width, alpha if kind == b"VP8 " else None, end
            )
        if part[1] <= end and kind == b"ALPH":
            alpha = part
        elif part[1] <= end and kind == b"ANIM":
            control = part
        elif part[1] <= end and kind == b"ANMF":
            frames.append(part)
        position = part[1]
    else:
        raise _too_many("WebP", "chunks")
    if not frames or control is None:
        raise StructureError("WebP without pixels")
    flags = data[20] & _WEBP_ALPHA | _WEBP_ANIMATION
    length = sum(b - a for a, b in (control, frames[0]))
    parts = (_webp_head(length, flags, height, width), control, frames[0])
    taken = _WEBP_PIXEL_BYTES + _WEBP_CANVAS_BYTES
    return Structure(height, width, len(frames) > 1, parts, taken)


def _webp_picture(data: bytes, position: int, end: int) -> tuple[int, int]:
    """(height, width) of the pixels that begin here."""
    kind, length = unpack_from("<4sI", data, position)
    if kind not in (b"VP8 ", b"VP8L"):
        raise StructureError("WebP without pixels")
    if position + 8 + length > end:
        raise StructureError("WebP cut short")
    if kind == b"VP8 ":
        width, height = unpack_from("<HH", data, position + 14)
        if data[position + 11 : position + 14] != b"\x9d\x01\x2a":
            raise StructureError("WebP with a damaged header")
        return height & 0x3FFF, width & 0x3FFF  # the upper two bits are a hint to scale
    (bits,) = unpack_from("<I", data, position + 9)
    if data[position + 8] != 0x2F:
        raise StructureError("WebP with a damaged header")
    return (bits >> 14 & 0x3FFF) + 1, (bits & 0x3FFF) + 1


def _webp_still(
    data: bytes, position: int, height: int, width: int, alpha: tuple[int, int] | None, end: int
) -> Structure:
    """A file of one picture, whose chunk begins at `position`."""
    (length,) = unpack_from("<I", data, position + 4)
    stop = position + 8 + length
    padded = stop + (length & 1)
    if position == 12 and padded == end == len(data):
        return Structure(height, width, False, ((0, end),), _WEBP_PIXEL_BYTES)
    pixels = ((position, stop), b"\0" * (length & 1))
    if alpha is None:
        head = b"RIFF" + pack("<I", 4 + padded - position) + b"WEBP"
        return Structure(height, width, False, (head, *pixels), _WEBP_PIXEL_BYTES)
    head = _webp_head(alpha[1] - alpha[0] + padded - position, _WEBP_ALPHA, height, width)
    return Structure(height, width, False, (head, alpha, *pixels), _WEBP_PIXEL_BYTES)


def _webp_head(content: int, flags: int, height: int, width: int) -> bytes:
    """The beginning of a file in the extended form, with `content` bytes after it."""
    canvas = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    size = pack("<I", 22 + content)
    return b"RIFF" + size + b"WEBPVP8X" + pack("<IB3x", 10, flags) + canvas
