"""What surrounds the pixels is left out before any decoder sees the file; damaged pixels stay a
reason to refuse it."""

from __future__ import annotations

import io
import warnings

import numpy as np
import pytest
from PIL import Image

from fastmoco_pipelines.errors import ImageRefusedError
from fastmoco_pipelines.formats.headers import plain_image, structure
from fastmoco_pipelines.formats.images import check_decodes, read_header
from tests.pipelines.image_corpus import GOOD
from tests.pipelines.odd_images import REFUSED, SAME_AS


@pytest.mark.parametrize("name", SAME_AS)
def test_odd_surroundings_leave_the_plain_file(name):
    data, base = SAME_AS[name]
    expected = structure(base)
    found = structure(data)
    assert (found.height, found.width, found.animated) == (expected.height, expected.width, False)
    kept = plain_image(data)
    # After the pixels of a JPEG, trailing bytes stay: every decoder stops at the end mark.
    assert kept[: len(plain_image(base))] == plain_image(base)
    assert kept == plain_image(base) or name.endswith(".jpg")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_decodes(data)


@pytest.mark.parametrize("name", REFUSED)
def test_damaged_pixels_are_refused_by_a_reason_that_names_them(name):
    data, words = REFUSED[name]
    with pytest.raises(ImageRefusedError) as raised:
        check_decodes(data)
    assert words in str(raised.value)


def test_an_ordinary_file_is_passed_on_as_it_is():
    for name in ("png.png", "webp.webp", "lossless.webp", "interlaced.png", "jpeg.jpg"):
        assert plain_image(GOOD[name]) is GOOD[name], name


@pytest.mark.parametrize("name", GOOD)
def test_a_plain_file_has_the_same_pixels(name):
    """Pillow reads the file itself here, with all that is around the pixels."""
    plain = plain_image(GOOD[name])
    assert plain_image(plain) == plain
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pixels = [
            np.asarray(Image.open(io.BytesIO(data)).convert("RGBA"))[..., :3]
            for data in (GOOD[name], plain)
        ]
    assert np.array_equal(*pixels)


def test_an_animation_is_no_image_and_a_single_frame_is_one():
    for kind in ("WEBP", "PNG"):
        frames = [Image.new("RGB", (8, 8), color) for color in ("red", "green")]
        out = io.BytesIO()
        frames[0].save(out, kind, save_all=True, append_images=frames[1:])
        assert structure(out.getvalue()).animated
        with pytest.raises(ImageRefusedError, match="animation"):
            read_header(out.getvalue())
        out = io.BytesIO()
        frames[0].save(out, kind, save_all=True)
        check_decodes(out.getvalue())
