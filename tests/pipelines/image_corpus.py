"""One small file for every format and every kind of damage in a folder of
images, with the expected outcome.
"""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
from PIL import Image

HEIGHT, WIDTH = 64, 96


def picture(mode: str = "RGB", height: int = HEIGHT, width: int = WIDTH) -> Image.Image:
    """Smooth noise: compresses like a photograph."""
    coarse = np.random.default_rng(7).integers(0, 256, (6, 6, 4), dtype=np.uint8)
    image = Image.fromarray(coarse, "RGBA").resize((width, height), Image.Resampling.BICUBIC)
    return image.convert("RGB").convert(mode) if mode not in ("RGBA", "LA") else image.convert(mode)


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    """The image as a file."""
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def png(chunks: list[bytes]) -> bytes:
    """A PNG of these chunks (kind and content), with correct checksums."""
    parts = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def ihdr(height: int, width: int, depth: int, color: int, interlace: int = 0) -> bytes:
    """A PNG's header chunk; color 0 is grey, 2 RGB."""
    return b"IHDR" + struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, interlace)


def deep_png() -> bytes:
    """16 bits per channel, RGB, which Pillow cannot write."""
    levels = np.linspace(0, 65535, HEIGHT * WIDTH * 3).reshape(HEIGHT, WIDTH, 3).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in levels)
    return png([ihdr(HEIGHT, WIDTH, 16, 2), b"IDAT" + zlib.compress(rows), b"IEND"])


def interlaced_png() -> bytes:
    """Adam7, grey, which Pillow cannot write."""
    levels = np.asarray(picture("L"))
    passes = [
        (0, 0, 8, 8),
        (0, 4, 8, 8),
        (4, 0, 8, 4),
        (0, 2, 4, 4),
        (2, 0, 4, 2),
        (0, 1, 2, 2),
        (1, 0, 2, 1),
    ]
    rows = b"".join(
        b"\0" + row.tobytes() for y, x, dy, dx in passes for row in levels[y::dy, x::dx]
    )
    return png([ihdr(HEIGHT, WIDTH, 8, 0, 1), b"IDAT" + zlib.compress(rows), b"IEND"])


def with_exif(orientation: int | bytes) -> bytes:
    """A JPEG with an EXIF orientation, or with a broken EXIF block."""
    if isinstance(orientation, bytes):
        return encode(picture(), "JPEG", exif=orientation)
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(picture(), "JPEG", exif=exif)


def resized_header(data: bytes, height: int, width: int) -> bytes:
    """A JPEG whose frame header declares another size."""
    at = data.index(b"\xff\xc0\x00\x11") + 5
    return data[:at] + struct.pack(">HH", height, width) + data[at + 4 :]


def flipped(data: bytes, at: int) -> bytes:
    """One bit flipped."""
    return data[:at] + bytes([data[at] ^ 16]) + data[at + 1 :]


def wide_webp() -> bytes:
    """A lossless WebP whose header declares 16000 x 16000 pixels."""
    data = bytearray(encode(picture(), "WEBP", lossless=True))
    data[21:25] = struct.pack("<I", 15999 | 15999 << 14)
    return bytes(data)


JPEG = encode(picture(), "JPEG")
CMYK = encode(picture("CMYK"), "JPEG")  # begins with Adobe's marker, 16 bytes
PNG = encode(picture(), "PNG")
WEBP = encode(picture(), "WEBP")
NOISE = np.random.default_rng(1).bytes(3000)
SCAN = JPEG.index(b"\xff\xda") + 14

GOOD: dict[str, bytes] = {
    "jpeg.jpg": JPEG,
    "grey.jpg": encode(picture("L"), "JPEG"),
    "cmyk.jpg": CMYK,
    "progressive.jpg": encode(picture(), "JPEG", progressive=True),
    "full_color.jpg": encode(picture(), "JPEG", subsampling=0),
    "restarts.jpg": encode(picture(), "JPEG", restart_marker_blocks=2),
    "comment.jpg": encode(picture(), "JPEG", comment=b"words " * 2000),
    "trailing.jpg": JPEG + NOISE,
    "rotated.jpg": with_exif(6),
    "bad_exif.jpg": with_exif(b"Exif\0\0II*\0\xff\xff\xff\xff"),
    "exif_value.jpg": with_exif(99),
    "one_pixel.jpg": encode(picture(height=1, width=1), "JPEG"),
    "narrow.jpg": encode(picture(height=200, width=3), "JPEG"),
    "named_png.png": JPEG,
    "png.png": PNG,
    "one_bit.png": encode(picture("1"), "PNG"),
    "grey.png": encode(picture("L"), "PNG"),
    "grey_16.png": encode(Image.fromarray(np.asarray(picture("L")).astype(np.uint16) * 257), "PNG"),
    "rgb_16.png": deep_png(),
    "palette.png": encode(picture("P"), "PNG"),
    "palette_transparent.png": encode(picture("P"), "PNG", transparency=3),
    "alpha.png": encode(picture("RGBA"), "PNG"),
    "grey_alpha.png": encode(picture("LA"), "PNG"),
    "interlaced.png": interlaced_png(),
    "trailing.png": PNG + NOISE,
    "webp.webp": WEBP,
    "lossless.webp": encode(picture(), "WEBP", lossless=True),
    "alpha.webp": encode(picture("RGBA"), "WEBP"),
}

# By the kind of fault that must be reported.
BAD: dict[str, tuple[bytes, str]] = {
    "zero_bytes.jpg": (b"", "empty"),
    "html.jpg": (b"<!doctype html><html>404</html>", "no image"),
    "text.png": (b"not an image\n" * 20, "no image"),
    "random.webp": (NOISE, "no image"),
    "zeros.jpg": (bytes(2000), "no image"),
    "svg.png": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "unsupported format"),
    "gif.jpg": (encode(picture("P"), "GIF"), "unsupported format"),
    "avif.jpg": (b"\0\0\0\x20ftypavif\0\0\0\0avifmif1miafMA1B" + NOISE, "unsupported format"),
    "bmp.jpg": (encode(picture(), "BMP"), "unsupported format"),
    "tiff.png": (encode(picture(), "TIFF"), "unsupported format"),
    "ppm.jpg": (encode(picture(), "PPM"), "unsupported format"),
    "jp2.jpg": (b"\0\0\0\x0cjP  \r\n\x87\n" + NOISE, "unsupported format"),
    "cut_header.jpg": (JPEG[:100], "damaged image"),
    "cut_half.jpg": (JPEG[: len(JPEG) // 2], "damaged image"),
    "no_end_mark.jpg": (JPEG[:-2], "damaged image"),
    "only_header.jpg": (JPEG[:SCAN], "damaged image"),
    "twelve_bits.jpg": (
        JPEG.replace(b"\xff\xc0\x00\x11\x08", b"\xff\xc0\x00\x11\x0c"),
        "damaged image",
    ),
    "arithmetic.jpg": (JPEG.replace(b"\xff\xc0\x00\x11", b"\xff\xc9\x00\x11"), "damaged image"),
    "unmarked_cmyk.jpg": (CMYK[:2] + CMYK[18:], "damaged image"),
    "no_pixels.jpg": (resized_header(JPEG, 0, WIDTH), "damaged image"),
    "cut.png": (PNG[:-30], "damaged image"),
    "no_end.png": (PNG[:-12], "damaged image"),
    "wrong_checksum.png": (flipped(PNG, len(PNG) - 13), "damaged image"),
    "flipped.png": (flipped(PNG, len(PNG) // 2), "damaged image"),
    "no_pixels.png": (png([ihdr(0, 9, 8, 2), b"IDAT", b"IEND"]), "damaged image"),
    "cut.webp": (WEBP[:-20], "damaged image"),
    "animated.webp": (
        encode(picture(), "WEBP", save_all=True, append_images=[picture().rotate(90)]),
        "animation",
    ),
}

# Decoders, Pillow among them, decode these with grey or wrong pixels in a part
# of the image, and only warn.
GARBLED: dict[str, bytes] = {
    "taller_than_its_scan.jpg": resized_header(JPEG, 8 * HEIGHT, WIDTH),
    "hole_in_the_scan.jpg": JPEG[: SCAN + 300] + JPEG[-2:],
}

BOMBS: dict[str, bytes] = {
    "forged_30000.jpg": resized_header(JPEG, 30000, 30000)[:1403],
    "forged_65500.jpg": resized_header(JPEG, 65500, 65500),
    "zeros_30000.png": png(
        [ihdr(30000, 30000, 8, 2), b"IDAT" + zlib.compress(bytes(1 << 22)) * 600, b"IEND"]
    ),
    "header_2_31.png": png(
        [ihdr(2**31 - 1, 2**31 - 1, 8, 2), b"IDAT" + zlib.compress(b""), b"IEND"]
    ),
    "forged_16000.webp": wide_webp(),
}
