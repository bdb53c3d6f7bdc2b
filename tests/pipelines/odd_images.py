"""Image files with odd or damaged surroundings of sound pixels, and files whose pixels are damaged:
what a careful trainer lets in, and what it leaves out.
"""

from __future__ import annotations

import random
import struct
import zlib

from PIL import Image, ImageCms, PngImagePlugin

from tests.pipelines.image_corpus import encode, ihdr, picture, png


def chunk(kind: bytes, body: bytes, checksum: int | None = None) -> bytes:
    """A chunk of a PNG, with the right checksum or another one."""
    crc = zlib.crc32(kind + body) if checksum is None else checksum
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", crc)


def png_with(extra: bytes, image: Image.Image | None = None) -> bytes:
    """A PNG with further chunks after its header."""
    data = encode(image or picture(), "PNG")
    return data[:33] + extra + data[33:]


def segment(marker: int, body: bytes) -> bytes:
    """A segment of a JPEG's header."""
    return bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body


def jpeg_with(extra: bytes, at: int = 2) -> bytes:
    """A JPEG with further bytes in its header."""
    return JPEG[:at] + extra + JPEG[at:]


def riff(*chunks: tuple[bytes, bytes]) -> bytes:
    """A WebP of these chunks."""
    body = b"".join(k + struct.pack("<I", len(b)) + b + b"\0" * (len(b) & 1) for k, b in chunks)
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


def webp_with(
    flags: int, *after: tuple[bytes, bytes], before: tuple[bytes, bytes] | None = None
) -> bytes:
    """A WebP in the extended form."""
    canvas = b"".join((side - 1).to_bytes(3, "little") for side in picture().size)
    first = (b"VP8X", bytes([flags, 0, 0, 0]) + canvas)
    pixels = WEBP[20 : 20 + struct.unpack_from("<I", WEBP, 16)[0]]
    return riff(first, *([before] if before else []), (b"VP8 ", pixels), *after)


def text(body: str, *, packed: bool) -> PngImagePlugin.PngInfo:
    """A text beside the pixels of a PNG."""
    info = PngImagePlugin.PngInfo()
    info.add_text("text", body, zip=packed)
    return info


def pictures(*more: Image.Image) -> bytes:
    """A JPEG with further pictures in it (Multi-Picture Format)."""
    return encode(picture(), "MPO", save_all=True, append_images=list(more))


def exif(orientation: int, entry: int = 3) -> bytes:
    """EXIF of one entry, the orientation."""
    return b"II*\0\x08\0\0\0\x01\0\x12\x01" + struct.pack("<HIII", entry, 1, orientation, 0)


JPEG = encode(picture(), "JPEG")
PNG = encode(picture(), "PNG")
WEBP = encode(picture(), "WEBP")
ICC = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
NOISE = random.Random(0).randbytes(3000)
HEADER_END = 4 + struct.unpack_from(">H", JPEG, 4)[0]  # of the first segment of the JPEG
ANCILLARY = {
    b"cHRM": bytes(32),
    b"gAMA": struct.pack(">I", 45455),
    b"iCCP": b"x\0\0" + zlib.compress(ICC),
    b"sRGB": b"\0",
    b"cICP": bytes([9, 16, 0, 1]),
    b"tEXt": b"Title\0words",
    b"zTXt": b"Title\0\0" + zlib.compress(b"words"),
    b"iTXt": b"Title\0\0\0\0\0words",
    b"bKGD": struct.pack(">HHH", 255, 0, 0),
    b"pHYs": struct.pack(">IIB", 2835, 2835, 1),
    b"eXIf": exif(6),
    b"tIME": struct.pack(">H5B", 2024, 1, 2, 3, 4, 5),
    b"caBX": NOISE,
    b"prVt": b"of a program",
}
ONE_FRAME = chunk(b"acTL", struct.pack(">II", 1, 0))
TWO_FRAMES = chunk(b"acTL", struct.pack(">II", 2, 0))

# By the plain file that has the same pixels.
SAME_AS: dict[str, tuple[bytes, bytes]] = {
    name: (data, base)
    for base, files in (
        (
            PNG,
            {
                **{
                    f"{kind.decode()}_{what}.png": png_with(chunk(kind, *body))
                    for kind, content in ANCILLARY.items()
                    for what, body in {
                        "wrong_checksum": (content, 1),
                        "empty": (b"",),
                        "noise": (NOISE[:50],),
                    }.items()
                },
                "text_3_mb_packed.png": encode(
                    picture(), "PNG", pnginfo=text("a prompt, " * 300_000, packed=True)
                ),
                "text_70_mb_packed.png": png_with(
                    chunk(b"zTXt", b"a\0\0" + zlib.compress(b"a" * 10**6)) * 70
                ),
                "text_2_mb.png": encode(
                    picture(), "PNG", pnginfo=text("a" * 2_000_000, packed=False)
                ),
                "texts_2000.png": png_with(chunk(b"tEXt", b"a\0b") * 2000),
                "chunk_9_mb.png": png_with(chunk(b"caBX", bytes(9_000_000))),
                "profile_3_mb.png": png_with(
                    chunk(b"iCCP", b"x\0\0" + zlib.compress(ICC + bytes(3_000_000)))
                ),
                "text_after_pixels.png": PNG[:-12] + chunk(b"zTXt", NOISE, 1) + PNG[-12:],
                "reserved_bit.png": png_with(chunk(b"abcd", b"")),
                "transparent_color_of_wrong_length.png": png_with(chunk(b"tRNS", b"\0")),
                "suggested_palette_damaged.png": png_with(chunk(b"PLTE", bytes(7), 1)),
                "frames_that_are_not_there.png": png_with(TWO_FRAMES),
                "one_frame_damaged.png": png_with(ONE_FRAME[:-1] + b"?"),
                "end_with_wrong_checksum.png": PNG[:-4] + bytes(4),
            },
        ),
        (
            JPEG,
            {
                "two_pictures.jpg": pictures(picture(height=20, width=30)),
                "four_pictures.jpg": pictures(*[picture("L", 20, 30)] * 3),
                "pictures_of_a_damaged_list.jpg": jpeg_with(segment(0xE2, b"MPF\0" + NOISE[:80])),
                "motion_photo.jpg": JPEG + b"\0\0\0\x18ftypmp42" + NOISE,
                "depth_behind_it.jpg": JPEG + encode(picture("L"), "PNG"),
                "stereo.jps": jpeg_with(segment(0xE3, b"_JPSJPS_\0\x10" + bytes(16))),
                "exif_noise.jpg": jpeg_with(segment(0xE1, b"Exif\0\0" + NOISE)),
                "exif_cut.jpg": jpeg_with(segment(0xE1, b"Exif\0\0" + exif(6)[:9])),
                "exif_of_wrong_type.jpg": jpeg_with(segment(0xE1, b"Exif\0\0" + exif(6, 12))),
                "exif_twice.jpg": jpeg_with(2 * segment(0xE1, b"Exif\0\0" + exif(8))),
                "xmp_extended.jpg": jpeg_with(segment(0xE1, b"http:" + bytes(65000)) * 40),
                "profile_header_alone.jpg": jpeg_with(segment(0xE2, b"ICC_PROFILE\0")),
                "profile_of_missing_parts.jpg": jpeg_with(
                    segment(0xE2, b"ICC_PROFILE\0\x07\x02" + ICC)
                ),
                "profile_in_40_parts.jpg": encode(
                    picture(), "JPEG", icc_profile=ICC + bytes(2_500_000)
                ),
                "photoshop_noise.jpg": jpeg_with(
                    segment(0xED, b"Photoshop 3.0\x008BIM\x03\xed\0\0\0\0\0\xff")
                ),
                "comments.jpg": jpeg_with(segment(0xFE, bytes(range(256))) * 30),
                "zeros_between_segments.jpg": jpeg_with(bytes(8), HEADER_END),
                "fill_bytes_between_segments.jpg": jpeg_with(b"\xff" * 511, HEADER_END),
            },
        ),
        (
            WEBP,
            {
                "exif.webp": webp_with(8, (b"EXIF", exif(6))),
                "exif_promised.webp": webp_with(8),
                "exif_noise.webp": webp_with(8, (b"EXIF", NOISE)),
                "flags_of_an_animation.webp": webp_with(2),
                "alpha_promised.webp": webp_with(16),
                "profile_of_one_byte.webp": webp_with(
                    0x28, (b"EXIF", exif(6)), before=(b"ICCP", b"\xff")
                ),
                "xmp_noise.webp": webp_with(4, (b"XMP ", NOISE)),
                # DALI's parser forgets the byte that pads an odd length
                "exif_after_odd_chunk.webp": webp_with(
                    8, (b"EXIF", exif(6)), before=(b"ABCD", NOISE[:11])
                ),
                "chunk_after_a_simple_file.webp": riff(
                    (b"VP8 ", WEBP[20 : 20 + struct.unpack_from("<I", WEBP, 16)[0]]),
                    (b"EXIF", exif(6)),
                ),
            },
        ),
    )
    for name, data in files.items()
}

PALETTE = encode(picture("P"), "PNG")
_PLTE = PALETTE.index(b"PLTE") - 4
_PLTE_END = _PLTE + 12 + struct.unpack_from(">I", PALETTE, _PLTE)[0]
_PIXELS = PNG.index(b"IDAT") - 4
_PACKED = PNG[_PIXELS + 8 : -16]


def repacked(body: bytes) -> bytes:
    """The PNG with other bytes for its pixels, and right checksums."""
    return PNG[:_PIXELS] + chunk(b"IDAT", body) + PNG[-12:]


# By the words of the reason.
REFUSED: dict[str, tuple[bytes, str]] = {
    "header_checksum.png": (PNG[:29] + bytes(4) + PNG[33:], "header (chunk IHDR)"),
    "palette_checksum.png": (
        PALETTE[: _PLTE_END - 4] + bytes(4) + PALETTE[_PLTE_END:],
        "checksum of its palette (chunk PLTE)",
    ),
    "no_palette.png": (PALETTE[:_PLTE] + PALETTE[_PLTE_END:], "without its palette"),
    "pixels_checksum.png": (
        PNG[:-16] + bytes(4) + PNG[-12:],
        "checksum of its pixels (chunk IDAT)",
    ),
    "pixels_without_end.png": (repacked(_PACKED[:-4]), "end too early (chunk IDAT)"),
    "pixels_damaged.png": (repacked(_PACKED[:400] + NOISE[:99] + _PACKED[400:]), "chunk IDAT: "),
    "pixels_of_a_larger_window.png": (
        repacked(b"\x18\x19" + _PACKED[2:]),
        "chunk IDAT: invalid distance",
    ),
    "unknown_critical.png": (png_with(chunk(b"ABCD", b"")), "no decoder knows (ABCD)"),
    "of_an_iphone.png": (PNG[:8] + chunk(b"CgBI", bytes(4)) + PNG[8:], "iPhones"),
    "no_chunk.png": (png_with(chunk(b"1234", b"")), "damaged chunk (1234 at byte 33)"),
    "animation.png": (
        encode(picture(), "PNG", save_all=True, append_images=[picture().rotate(9)]),
        "animation",
    ),
    "noise_between_segments.jpg": (jpeg_with(b"\x12" * 5, HEADER_END), "damaged header (byte 20)"),
    "unknown_segment.jpg": (jpeg_with(segment(0xF3, b"")), "no decoder knows (0xFFF3)"),
    "other_canvas.webp": (
        webp_with(0)[:24] + bytes(6) + webp_with(0)[30:],
        "another size than its canvas",
    ),
    "metadata_alone.webp": (riff((b"VP8X", bytes(10)), (b"EXIF", exif(6))), "without pixels"),
    "large.png": (
        png([ihdr(8000, 8000, 8, 2), b"IDAT" + bytes(40_000), b"IEND"]),
        "--max-side` writes it smaller",
    ),
    "bomb.png": (png([ihdr(6000, 6000, 8, 2), b"IDAT", b"IEND"]), "a decompression bomb"),
}
