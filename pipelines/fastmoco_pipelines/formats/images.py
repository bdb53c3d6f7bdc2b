"""What may enter a shard: which image formats, how large, and whether they decode. By content,
never by name alone.

The limits keep decompression bombs away from the decoders: a file of 1,403 bytes can declare 30000
x 30000 pixels and cost half a minute and 5 GB. They are checked on the header, before any pixel is
decoded.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, UnidentifiedImageError

from fastmoco_pipelines.errors import ImageRefusedError, StructureError
from fastmoco_pipelines.formats.headers import image_size

EXTENSIONS = ("jpg", "jpeg", "png", "webp")
"""File name extensions of images, in lower case."""
MAX_BYTES = 64 << 20
"""Largest compressed image."""
MAX_SIDE = 16384
"""Largest height or width in pixels."""
MAX_PIXELS = 50_000_000
"""Largest height * width."""
MAX_PIXELS_PER_BYTE = 2000
"""Above this an image is emptier than any photograph and is treated as a bomb."""

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
        height, width = image_size(data)
    except StructureError:
        return "damaged image"
    return (
        "too large or a bomb"
        if size_problem(height=height, width=width, size=len(data))
        else "damaged image"
    )


def size_problem(*, height: int, width: int, size: int) -> str | None:
    """Why an image of `height` x `width` pixels in `size` bytes is refused, or None."""
    if height < 1 or width < 1:
        return f"it declares {width}x{height} pixels"
    if size > MAX_BYTES:
        return f"{size} bytes are above the limit of {MAX_BYTES}"
    if max(height, width) > MAX_SIDE or height * width > MAX_PIXELS:
        return (
            f"{width}x{height} pixels are above the limit of {MAX_SIDE} a side and {MAX_PIXELS} in "
            "all"
        )
    if height * width > MAX_PIXELS_PER_BYTE * size:
        return f"{width}x{height} pixels in {size} bytes: a decompression bomb"
    return None


def structure_fault(data: bytes) -> str | None:
    """Why a file must not go to a decoder, or None: its structure is broken, or its header goes
    beyond the limits."""
    try:
        height, width = image_size(data)
    except StructureError as fault:
        return str(fault)
    return size_problem(height=height, width=width, size=len(data))


def read_header(data: bytes) -> ImageHeader:
    """Kind and size of an encoded image, without decoding it.

    Raises:
        ImageRefusedError: for other formats, unreadable headers, animations and images beyond the
            limits.
    """
    kind = image_kind(data)
    if kind is None:
        other = foreign_kind(data)
        what = "its content is no JPEG, PNG or WebP" + (f" but {other}" if other else "")
        raise ImageRefusedError(what if data else "it is empty")
    if len(data) > MAX_BYTES:
        raise ImageRefusedError(f"{len(data)} bytes are above the limit of {MAX_BYTES}")
    # Checked before Pillow opens it, so that a bomb costs nothing. Pillow also reads files that
    # DALI does not, e.g. of arithmetic coding.
    problem = _png_size_problem(data) or structure_fault(data)
    if problem is not None:
        raise ImageRefusedError(problem)
    image = _open(data, kind)
    height, width = image_size(data)
    if (image.height, image.width) != (height, width):
        raise ImageRefusedError(
            f"its header declares {width}x{height} pixels and {image.width}x{image.height} as well"
        )
    if getattr(image, "is_animated", False):
        raise ImageRefusedError("it is an animation")
    return ImageHeader(kind, height, width)


def check_decodes(data: bytes) -> None:
    """Decode every pixel once, as strictly as DALI does: Pillow alone passes a PNG without its end
    or with a wrong CRC.

    Raises:
        ImageRefusedError: if a decoder would fail (truncated data, broken chunks).
    """
    kind = read_header(data).kind
    if kind == "png":
        _call(_open(data, kind).verify)
    _call(_open(data, kind).load)


def shrink(data: bytes, *, max_side: int, quality: int) -> bytes:
    """The image with its longer side at most `max_side` pixels, in its own format; the very bytes
    if it already is.

    Args:
        data: an encoded JPEG, PNG or WebP.
        max_side: largest length of the longer side, height or width, in pixels.
        quality: of a JPEG or WebP that is written again, 1 to 100. PNG stays lossless.

    Raises:
        ImageRefusedError: if the image cannot be decoded.
    """
    header = read_header(data)
    scale = max_side / max(header.height, header.width)
    if scale >= 1:
        return data
    image = _open(data, header.kind)
    _call(image.load)
    size = (max(1, round(header.width * scale)), max(1, round(header.height * scale)))
    resized = _plain_mode(image).resize(size, Image.Resampling.LANCZOS)
    out = io.BytesIO()
    resized.save(
        out, _FORMATS[header.kind], **({} if header.kind == "png" else {"quality": quality})
    )
    return out.getvalue()


def _png_size_problem(data: bytes) -> str | None:
    """The limits by the header alone: a bomb is reported as one even if its structure is broken."""
    if image_kind(data) != "png" or data[12:16] != b"IHDR" or len(data) < 24:
        return None
    width, height = (int.from_bytes(data[at : at + 4], "big") for at in (16, 20))
    return size_problem(height=height, width=width, size=len(data)) if width and height else None


def _plain_mode(image: Image.Image) -> Image.Image:
    """Grey or RGB of 8 bits: palettes and 16-bit levels cannot be averaged as they are."""
    if image.mode in ("L", "RGB"):
        return image
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")


def _open(data: bytes, kind: str) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data), formats=(_FORMATS[kind],))
    except UnidentifiedImageError as error:  # its text names a Python object, which helps no user
        raise ImageRefusedError(f"its header is no valid {_FORMATS[kind]}") from error
    # Hostile bytes make a decoder raise nearly anything; whatever it is, the image is not used.
    except Exception as error:
        raise ImageRefusedError(
            f"its header cannot be read ({type(error).__name__}: {error})"
        ) from error


def _call(decode: Callable[[], object]) -> None:
    try:
        decode()
    except Exception as error:  # as above
        raise ImageRefusedError(
            f"it cannot be decoded ({type(error).__name__}: {error})"
        ) from error
