"""What is let into a shard: formats by content, limits by the header, decodability by decoding."""

from __future__ import annotations

import io
import struct
import time
import zlib

import numpy as np
import pytest
from PIL import Image

from fastmoco_pipelines.errors import ImageRefusedError
from fastmoco_pipelines.formats import images
from fastmoco_pipelines.formats.images import (
    MAX_BYTES,
    MAX_SOURCE_BYTES,
    bytes_problem,
    check_decodes,
    image_kind,
    read_header,
    shrink,
    size_problem,
)
from tests.pipelines.image_corpus import encode, picture


def png_header(height: int, width: int, body: int) -> bytes:
    """A PNG that declares a size and holds ``body`` zero bytes for its pixels."""
    chunks = [
        b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0),
        b"IDAT" + bytes(body),
    ]
    written = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(written)


@pytest.mark.parametrize(("format", "kind"), [("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp")])
def test_header_gives_kind_and_size(noise_image, format, kind):
    data = noise_image(0, 30, 50, format)
    header = read_header(data)
    assert (header.kind, header.height, header.width) == (kind, 30, 50)
    assert image_kind(data) == kind
    check_decodes(data)


def test_size_is_that_before_rotation(noise_image):
    image = Image.open(io.BytesIO(noise_image(0, 30, 50)))
    exif = image.getexif()
    exif[0x0112] = 6  # rotate by 90 degrees
    out = io.BytesIO()
    image.save(out, "JPEG", exif=exif)
    assert (read_header(out.getvalue()).height, read_header(out.getvalue()).width) == (30, 50)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "empty"),
        (b"GIF89a" + bytes(50), "no JPEG, PNG or WebP"),
        (b"<svg></svg>", "no JPEG, PNG or WebP"),
        (b"\xff\xd8\xff" + bytes(50), "JPEG with a damaged header|ends too early"),
        (png_header(30000, 30000, 2_600_000), "above the limit"),
        (png_header(20000, 100, 10_000), "above the limit"),
        (png_header(6000, 6000, 1_403), "decompression bomb"),
    ],
)
def test_bad_headers_are_refused_at_once(data, words):
    start = time.thread_time()  # of this thread alone
    with pytest.raises(ImageRefusedError, match=words):
        read_header(data)
    assert time.thread_time() - start < 0.5


def test_limits_hold_at_their_edges():
    assert size_problem(height=1, width=1, size=1) is None
    assert size_problem(height=0, width=5, size=100)
    assert size_problem(height=4096, width=4096, size=1) is None  # of one color: it costs little
    assert size_problem(height=4096, width=4100, size=8397) is None
    assert "bomb" in str(size_problem(height=4096, width=4100, size=8396))
    assert size_problem(height=10, width=10, size=MAX_BYTES + 1)


def test_what_dali_must_not_see_is_refused_though_pillow_reads_it(noise_image):
    arithmetic = noise_image(0).replace(b"\xff\xc0\x00\x11\x08", b"\xff\xc9\x00\x11\x08")
    assert Image.open(io.BytesIO(arithmetic)).size == (32, 24)
    with pytest.raises(ImageRefusedError, match="arithmetic"):
        read_header(arithmetic)


def test_animations_are_refused(noise_image):
    frames = [Image.open(io.BytesIO(noise_image(i))) for i in range(2)]
    out = io.BytesIO()
    frames[0].save(out, "WEBP", save_all=True, append_images=frames[1:])
    with pytest.raises(ImageRefusedError, match="animation"):
        read_header(out.getvalue())


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_truncated_images_are_refused(noise_image, format):
    data = noise_image(0, 64, 64, format)
    with pytest.raises(ImageRefusedError):
        check_decodes(data[: len(data) // 2])


@pytest.mark.parametrize(
    ("format", "mode"),
    [("JPEG", "RGB"), ("JPEG", "CMYK"), ("PNG", "P"), ("PNG", "L"), ("WEBP", "RGB")],
)
def test_shrink_keeps_the_format_and_the_look(noise_image, format, mode):
    data = noise_image(3, 60, 120, format, mode)
    small = shrink(data, max_side=40, quality=95)
    assert (read_header(small).kind, read_header(small).height, read_header(small).width) == (
        image_kind(data),
        20,
        40,
    )
    wanted = Image.open(io.BytesIO(data)).convert("RGB").resize((40, 20), Image.Resampling.LANCZOS)
    got = Image.open(io.BytesIO(small)).convert("RGB")
    assert np.abs(np.asarray(wanted, float) - np.asarray(got, float)).mean() < 6


def test_shrink_returns_small_images_untouched(noise_image):
    data = noise_image(0, 24, 32)
    assert shrink(data, max_side=32, quality=1) is data


@pytest.mark.parametrize(
    ("format", "mode"),
    [("JPEG", "RGB"), ("JPEG", "L"), ("JPEG", "CMYK"), ("MPO", "RGB"), ("PNG", "P")]
    + [("PNG", "RGBA"), ("WEBP", "RGB")],
)
def test_images_above_the_limits_of_shards_can_be_shrunk(monkeypatch, format, mode):
    """Here of more than 20,000 pixels or 100,000 bytes."""
    monkeypatch.setattr(images, "MAX_PIXELS", 20_000)
    data = encode(picture(mode, 200, 300), format)
    with pytest.raises(
        ImageRefusedError, match=r"300x200 .*`fastmoco data pack --max-side` writes"
    ):
        check_decodes(data)
    small = shrink(data, max_side=60, quality=95)
    check_decodes(small)
    with Image.open(io.BytesIO(small)) as got:
        assert got.size == (60, 40)
        wanted = picture(mode, 200, 300).convert("RGB").resize(got.size, Image.Resampling.LANCZOS)
        assert np.abs(np.asarray(wanted, float) - np.asarray(got.convert("RGB"), float)).mean() < 6

    # A file of too many bytes for a shard is written again even if its sides are short.
    monkeypatch.setattr(images, "MAX_PIXELS", 10**6)
    monkeypatch.setattr(images, "MAX_BYTES", 100_000)
    padded = data + bytes(100_000 - len(data) + 1)
    with pytest.raises(ImageRefusedError, match=r"100001 bytes .*--max-side` writes"):
        check_decodes(padded)
    again = shrink(padded, max_side=300, quality=95)
    check_decodes(again)
    assert (read_header(again).height, read_header(again).width) == (200, 300)


def test_what_is_too_large_to_be_shrunk_names_no_cure():
    for shrunk in (False, True):
        problem = str(size_problem(height=13_400, width=13_400, size=10**7, shrunk=shrunk))
        assert problem.endswith("13400x13400 pixels are above the limit of 178956970 in all")
        assert str(bytes_problem(MAX_SOURCE_BYTES + 1, shrunk=shrunk)).partition(":")[1:] == (
            "",
            "",
        )
        bomb = str(size_problem(height=5000, width=5000, size=100, shrunk=shrunk))
        assert "bomb" in bomb
        assert "--max-side" not in bomb
    assert size_problem(height=13_000, width=13_000, size=10**7, shrunk=True) is None


def test_shrink_scales_sixteen_bits_instead_of_clipping():
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    out = io.BytesIO()
    Image.fromarray(ramp).save(out, "PNG")
    small = np.asarray(Image.open(io.BytesIO(shrink(out.getvalue(), max_side=32, quality=90))))
    assert small.dtype == np.uint8
    assert abs(small.mean() - 127.5) < 2


def test_verdicts_agree_with_dali(noise_image):
    """What packing lets through must not stop the training, nor may it refuse what would have been
    fine."""
    from fastmoco_pipelines.spec import EvalSpec
    from fastmoco_pipelines.views.dali import DecodeError, EvalPipeline

    jpeg, png, webp = (noise_image(5, 90, 120, format) for format in ("JPEG", "PNG", "WEBP"))
    flipped = bytearray(png)
    flipped[len(png) // 2] ^= 1
    cases = {
        "whole": [jpeg, png, webp],
        "trailing bytes": [jpeg + b"x" * 99, png + b"x" * 99, webp + b"x" * 100],
        "end marker missing": [jpeg[:-2], png[:-12], webp[:-1]],
        "cut": [jpeg[:-20], png[:-20], webp[:-20]],
        "wrong checksum": [png[:-13] + bytes([png[-13] ^ 1]) + png[-12:], bytes(flipped)],
    }
    for name, files in cases.items():
        for data in files:
            pipeline = EvalPipeline(EvalSpec(size=8, resize=8), batch_size=1, threads=1)
            good = name in ("whole", "trailing bytes")
            if good:
                check_decodes(data)
                pipeline.run([np.frombuffer(data, np.uint8)])
            else:
                with pytest.raises(ImageRefusedError):
                    check_decodes(data)
                with pytest.raises(DecodeError):
                    pipeline.run([np.frombuffer(data, np.uint8)])
