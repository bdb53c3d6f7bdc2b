"""What may enter a shard: which image formats, how large, and whether they decode. By content,
never by name alone.

The limits keep decompression bombs away from the decoders: a file of 1,403 bytes can declare 30000
x 30000 pixels and cost half a minute and 5 GB. They are checked on the header, before any pixel is
decoded. Images above them, up to Pillow's own limit, can still be shrunk.

Every decoder gets `plain_image`: what is no pixel neither makes it refuse an image nor print.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from fastmoco_pipelines.errors import ImageRefusedError, StructureError
from fastmoco_pipelines.formats.headers import (
    SLOW_SCANS,
    Structure,
    pixel_fault,
    plain_image,
    structure,
)

EXTENSIONS = ("jpg", "jpeg", "png", "webp", "jpe", "jfif", "mpo", "jps")
"""File name extensions of images, in lower case; the last two are of JPEGs with a second picture,
which is not used."""
MAX_BYTES = 64 << 20
"""Largest compressed image in a shard."""
SPARE_BYTES = 16 << 20
"""Compressed bytes that an image in a shard may have beside those of its pixels: metadata, a short
film, padding. Without this limit a batch of tiny images could have gigabytes."""
MAX_BYTES_PER_PIXEL = 8
"""A PNG of four channels of 16 bits, not compressed at all, has so many."""
MAX_SIDE = 16384
"""Largest height or width in pixels in a shard."""
MAX_PIXELS = 50_000_000
"""Largest height * width in a shard."""
MAX_PIXELS_PER_BYTE = 2000
"""Above this an image is emptier than any photograph, and from `BOMB_PIXELS` on it is treated as a
bomb."""
BOMB_PIXELS = 1 << 24
"""Smaller images cost little, however few bytes they have."""
MAX_SCANNED_PIXELS = 1 << 30
"""Largest height * width * scans of a JPEG in a shard: two CPU-seconds. Encoders write up to a
dozen scans of each pixel; this allows 21 of the largest image, 100 of one of ten million pixels."""
MAX_SOURCE_BYTES = 1 << 30
"""Largest file that is shrunk."""
MAX_SOURCE_PIXELS = 178_956_970
"""Largest height * width that is shrunk: where Pillow sees a bomb."""
MAX_SOURCE_SCANNED_PIXELS = 4 * MAX_SCANNED_PIXELS
"""Largest height * width * scans of a JPEG that is shrunk."""
_SHRINKS = "`fastmoco data pack --max-side` writes it smaller"

_FOREIGN = (
    (b"GIF8", "GIF"),
    (b"BM", "BMP"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"\0\0\0\x0cjP  ", "JPEG 2000"),
    (b"\xff\x4f\xff\x51", "JPEG 2000"),
    (b"\xff\x0a", "JPEG XL"),
    (b"\0\0\0\x0cJXL ", "JPEG XL"),
    (b"P5\n", "PGM"),
    (b"P6\n", "PPM"),
    (b"<svg", "SVG"),
)
_BOXES = {b"avif": "AVIF", b"avis": "AVIF", b"heic": "HEIC", b"heix": "HEIC", b"mif1": "HEIF"}
_FORMATS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}
# Opened by these and not by `Image.open`, which has limits of its own, prints warnings, and takes a
# JPEG with a second picture for another format.
_READERS: dict[str, Callable[[io.BytesIO], Image.Image]] = {
    "jpg": JpegImageFile,
    "png": PngImageFile,
    "webp": WebPImageFile,
}


@dataclass(frozen=True, slots=True)
class ImageHeader:
    """What the header contains: `kind` is "jpg", "png" or "webp"; sizes in pixels, before any EXIF
    rotation."""

    kind: str
    height: int
    width: int


def image_kind(data: bytes) -> str | None:
    """The kind, "jpg", "png" or "webp", by the magic bytes; None for anything else."""
    if data[:3] == b"\xff\xd8\xff":
        return "jpg"
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return "png"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    return None


def foreign_kind(data: bytes) -> str | None:
    """The name of a format that is not read, by the magic bytes; None for what is no common
    image."""
    if data[4:8] == b"ftyp":
        return _BOXES.get(data[8:12], "an ISO media file")
    return next((name for magic, name in _FOREIGN if data.startswith(magic)), None)


def refusal_kind(data: bytes) -> str:
    """Why `read_header` refuses these bytes, in two or three words, for counting."""
    if not data:
        return "empty"
    if image_kind(data) is None:
        return "unsupported format" if foreign_kind(data) else "no image"
    if _png_size_problem(data):
        return "too large or a bomb"
    try:
        found = structure(data)
    except StructureError:
        return "damaged image"
    if _limit_problem(found, len(data)):
        return "too large or a bomb"
    return "animation" if found.animated else "damaged image"


def bytes_problem(size: int, *, shrunk: bool = False) -> str | None:
    """Why a file of `size` bytes is refused, or None; `shrunk`: it is to be written smaller."""
    limit = MAX_SOURCE_BYTES if shrunk else MAX_BYTES
    if size <= limit:
        return None
    cure = "" if shrunk or size > MAX_SOURCE_BYTES else f": {_SHRINKS}"
    return f"{size} bytes are above the limit of {limit}{cure}"


def size_problem(*, height: int, width: int, size: int, shrunk: bool = False) -> str | None:
    """Why an image of `height` x `width` pixels in `size` bytes is refused, or None; `shrunk`: it
    is to be written smaller."""
    pixels = height * width
    if height < 1 or width < 1:
        return f"it declares {width}x{height} pixels"
    if problem := bytes_problem(size, shrunk=shrunk):
        return problem
    if not shrunk and size > SPARE_BYTES + MAX_BYTES_PER_PIXEL * pixels:
        return (
            f"{size} bytes for {width}x{height} pixels are above the limit of {MAX_BYTES_PER_PIXEL} "
            f"a pixel and {SPARE_BYTES} more: {_SHRINKS}"
        )
    if pixels > MAX_SOURCE_PIXELS:
        return f"{width}x{height} pixels are above the limit of {MAX_SOURCE_PIXELS} in all"
    if is_bomb(pixels, size):
        return (
            f"{width}x{height} pixels in {size} bytes: a decompression bomb (above "
            f"{MAX_PIXELS_PER_BYTE} pixels a byte)"
        )
    if not shrunk and (max(height, width) > MAX_SIDE or pixels > MAX_PIXELS):
        return (
            f"{width}x{height} pixels are above the limit of {MAX_SIDE} a side and {MAX_PIXELS} in "
            f"all: {_SHRINKS}"
        )
    return None


def _limit_problem(found: Structure, size: int, *, shrunk: bool = False) -> str | None:
    """Why an image of `size` bytes is refused by what its header declares, or None."""
    problem = size_problem(height=found.height, width=found.width, size=size, shrunk=shrunk)
    if problem is None and found.scans > 1:
        limit = MAX_SOURCE_SCANNED_PIXELS if shrunk else MAX_SCANNED_PIXELS
        if found.scans * found.pixels > limit:
            what = f"JPEG of {found.width}x{found.height} pixels in {found.scans} scans"
            problem = f"{what}, {SLOW_SCANS}"
    return problem


def is_bomb(pixels: int, size: int) -> bool:
    """Whether `pixels` in `size` bytes are too many for any photograph."""
    return pixels > BOMB_PIXELS and pixels > MAX_PIXELS_PER_BYTE * size


def admitted(data: bytes, *, shrunk: bool = False) -> Structure:
    """The structure of an image that is let in: the one rule of packing, indexing, checking and
    training. Only the header is looked at.

    Args:
        data: the file.
        shrunk: the image is to be written smaller, so that higher limits apply.

    Raises:
        StructureError: if the file must not go to a decoder: it is of another format, its structure
            is broken, it is an animation, or its header goes beyond the limits.
    """
    if problem := bytes_problem(len(data), shrunk=shrunk):
        raise StructureError(problem)
    try:
        found = structure(data)
    except StructureError as fault:
        # A bomb of a PNG is reported as one even if its structure is broken.
        raise StructureError(_png_size_problem(data, shrunk) or str(fault)) from None
    problem = _limit_problem(found, len(data), shrunk=shrunk)
    if problem is not None:
        raise StructureError(problem)
    if found.animated:
        raise StructureError("it is an animation: save the frames that you want as images")
    return found


def structure_fault(data: bytes) -> str | None:
    """Why a file must not go to a decoder, or None (`admitted`)."""
    try:
        admitted(data)
    except StructureError as fault:
        return str(fault)
    return None


def decodable(data: bytes) -> tuple[bytes, Structure]:
    """What a decoder gets for a file, its first picture without what is no pixel; and the structure
    of the file.

    Raises:
        StructureError: as `admitted`.
    """
    found = admitted(data)
    return plain_image(data, found), found


def read_header(data: bytes, *, shrunk: bool = False) -> ImageHeader:
    """Kind and size of an encoded image, without decoding it.

    Args:
        data: the file.
        shrunk: the image is to be written smaller, so that higher limits apply.

    Raises:
        ImageRefusedError: for other formats, unreadable headers, animations and images beyond the
            limits.
    """
    return _opened(data, shrunk)[0]


def check_decodes(data: bytes) -> None:
    """Decode every pixel once, as strictly as DALI does: Pillow alone passes a PNG without its end
    or with a wrong checksum.

    Raises:
        ImageRefusedError: if a decoder would fail (truncated data, broken chunks).
    """
    _, image = _opened(data, shrunk=False)
    _decode(data, image)


def rgb_image(data: bytes) -> Image.Image:
    """The image as Pillow decodes it, RGB of 8 bits.

    Raises:
        ImageRefusedError: if it cannot be decoded.
    """
    _, image = _opened(data, shrunk=False)
    _decode(data, image)
    return _plain_mode(image).convert("RGB")


def shrink(data: bytes, *, max_side: int, quality: int) -> bytes:
    """The image with its longer side at most `max_side` pixels, in its own format, without
    metadata; the very bytes if it already is, unless they are too many for a shard.

    Args:
        data: an encoded JPEG, PNG or WebP, of at most `MAX_SOURCE_PIXELS`.
        max_side: largest length of the longer side, height or width, in pixels.
        quality: of a JPEG or WebP that is written again, 1 to 100. PNG stays lossless.

    Raises:
        ImageRefusedError: if the image cannot be decoded.
    """
    header, image = _opened(data, shrunk=True)
    scale = min(1.0, max_side / max(header.height, header.width))
    problem = size_problem(height=header.height, width=header.width, size=len(data))
    if scale == 1 and problem is None:
        return data
    size = (max(1, round(header.width * scale)), max(1, round(header.height * scale)))
    if problem is not None:
        # A JPEG is decoded at an eighth to a half of its size: a fraction of the memory.
        image.draft(None, (2 * size[0], 2 * size[1]))
    _decode(data, image)
    resized = _plain_mode(image).resize(size, Image.Resampling.LANCZOS)
    out = io.BytesIO()
    resized.save(
        out, _FORMATS[header.kind], **({} if header.kind == "png" else {"quality": quality})
    )
    return out.getvalue()


def _opened(data: bytes, shrunk: bool) -> tuple[ImageHeader, Image.Image]:
    """Header and Pillow's image, of which no pixel is decoded yet."""
    kind = image_kind(data)
    if kind is None:
        other = foreign_kind(data)
        what = "its content is no JPEG, PNG or WebP"
        cure = f" but {other}: convert it to JPEG or PNG" if other else ""
        raise ImageRefusedError(what + cure if data else "it is empty")
    # Checked before Pillow opens it, so that a bomb costs nothing. Pillow also reads files that
    # DALI does not, e.g. of arithmetic coding.
    try:
        found = admitted(data, shrunk=shrunk)
    except StructureError as fault:
        raise ImageRefusedError(str(fault)) from None
    height, width = found.height, found.width

    # Hostile bytes make a decoder raise nearly anything; whatever it is, the image is not used.
    try:
        image = _READERS[kind](io.BytesIO(plain_image(data, found)))
    except Exception as error:
        raise ImageRefusedError(
            f"its header cannot be read ({type(error).__name__}: {error})"
        ) from error
    if (image.height, image.width) != (height, width):
        raise ImageRefusedError(
            f"its header declares {width}x{height} pixels and {image.width}x{image.height} as well"
        )
    return ImageHeader(kind, height, width), image


def _decode(data: bytes, image: Image.Image) -> None:
    """Decode every pixel of an opened image."""
    if fault := pixel_fault(data):
        raise ImageRefusedError(f"it cannot be decoded: {fault}")
    _call(image.load)


def _png_size_problem(data: bytes, shrunk: bool = False) -> str | None:
    """The limits by the first chunk of a PNG alone."""
    if image_kind(data) != "png" or data[12:16] != b"IHDR" or len(data) < 24:
        return None
    width, height = (int.from_bytes(data[at : at + 4], "big") for at in (16, 20))
    if not (width and height):
        return None
    return size_problem(height=height, width=width, size=len(data), shrunk=shrunk)


def _plain_mode(image: Image.Image) -> Image.Image:
    """Grey or RGB of 8 bits: palettes and 16-bit levels cannot be averaged as they are."""
    if image.mode in ("L", "RGB"):
        return image
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")


def _call(decode: Callable[[], object]) -> None:
    try:
        decode()
    except Exception as error:  # as above
        raise ImageRefusedError(
            f"it cannot be decoded ({type(error).__name__}: {error})"
        ) from error
