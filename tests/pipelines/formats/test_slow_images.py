"""The work that an image may cost is bounded by its header: scans times pixels, and the parts that
are walked over."""

from __future__ import annotations

import time

import pytest

from fastmoco_pipelines.errors import ImageRefusedError
from fastmoco_pipelines.formats import headers, images
from fastmoco_pipelines.formats.headers import plain_image, structure
from fastmoco_pipelines.formats.images import (
    admitted,
    decodable,
    read_header,
    refusal_kind,
    structure_fault,
)
from fastmoco_pipelines.views.decoding import decode_image
from tests.pipelines.image_corpus import GOOD
from tests.pipelines.slow_images import FLOODS, SLOW, many_scans, texts


@pytest.mark.parametrize("name", SLOW)
def test_training_and_packing_refuse_it_by_one_rule(name):
    data, kind = SLOW[name]
    start = time.thread_time()
    fault = structure_fault(data)
    assert fault
    assert refusal_kind(data) == kind
    with pytest.raises(ImageRefusedError) as raised:
        read_header(data)
    assert time.thread_time() - start < 2
    # Of other formats the packer has more words, and a cure.
    assert kind == "unsupported format" or str(raised.value) == fault


def test_scans_cost_as_much_as_they_have_pixels(monkeypatch):
    monkeypatch.setattr(images, "MAX_SCANNED_PIXELS", 12 * 64 * 64)
    assert admitted(many_scans(64, 64, 12)).scans == 12
    assert decode_image(many_scans(64, 64, 12)).shape == (64, 64, 3)
    assert "64x64 pixels in 13 scans" in str(structure_fault(many_scans(64, 64, 13)))
    assert structure_fault(many_scans(32, 32, 48)) is None  # smaller ones may have more
    # One that is written smaller may cost more.
    monkeypatch.setattr(images, "MAX_SOURCE_SCANNED_PIXELS", 20 * 64 * 64)
    assert read_header(many_scans(64, 64, 20), shrunk=True).height == 64
    with pytest.raises(ImageRefusedError, match="in 21 scans"):
        read_header(many_scans(64, 64, 21), shrunk=True)


def test_what_encoders_write_is_far_from_the_limits():
    """A dozen scans of the largest image; a chunk for each row of the tallest one."""
    assert 12 * images.MAX_PIXELS < images.MAX_SCANNED_PIXELS
    assert 2 * images.MAX_SIDE < headers._MAX_PARTS
    assert max(structure(data).scans for name, data in GOOD.items() if name.endswith(".jpg")) == 10


@pytest.mark.parametrize("flood", FLOODS)
def test_a_file_of_too_many_parts_is_refused(flood, monkeypatch):
    monkeypatch.setattr(headers, "_MAX_PARTS", 400)
    assert "more than 400" in str(structure_fault(flood(402)))
    assert "more than" not in str(structure_fault(flood(300)))


def test_parts_that_are_let_in_leave_a_plain_image():
    data = texts(20_000)
    assert len(plain_image(data)) < 20_000


@pytest.mark.parametrize("name", GOOD)
def test_what_a_decoder_takes_is_known_from_the_header(name):
    """At least the pixels that it delivers; more where all of a picture is there in another form."""
    data, found = decodable(GOOD[name])
    assert data == plain_image(GOOD[name])
    levels = decode_image(data)
    assert found.decoder_bytes >= levels.nbytes
    whole = name in ("progressive.jpg", "rgb_16.png", "grey_16.png", "interlaced.png")
    assert (found.pixel_bytes > 3) == (whole or name.endswith(".webp"))


@pytest.mark.parametrize("name", ["png.png", "jpeg.jpg", "webp.webp"])
def test_bytes_that_no_pixel_needs_are_limited(name, monkeypatch):
    """64 images of one pixel and 64 MiB would be 4 GB a batch."""
    data = GOOD[name]
    found = structure(data)
    monkeypatch.setattr(images, "SPARE_BYTES", 5000)
    most = 5000 + 8 * found.pixels
    padded = data + bytes(most - len(data))
    assert structure_fault(padded) is None
    fault = str(structure_fault(padded + b"\0"))
    assert fault.startswith(f"{most + 1} bytes for {found.width}x{found.height} pixels are above")
    assert refusal_kind(padded + b"\0") == "too large or a bomb"
    # The cure that it names: written again, even if no side is too long.
    again = images.shrink(padded + b"\0", max_side=4096, quality=95)
    assert structure_fault(again) is None
    assert len(again) < most
