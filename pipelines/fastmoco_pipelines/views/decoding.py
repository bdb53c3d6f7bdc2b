"""One image decoded by Pillow to the levels that DALI decodes. No torch."""

from __future__ import annotations

import io
import warnings

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fastmoco_pipelines.errors import DecodeError
from fastmoco_pipelines.formats.images import image_kind

# Of EXIF and palettes, which no pixel depends on; the text names no file.
warnings.filterwarnings("ignore", module=r"PIL(\.|$)")

_FORMATS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}


def decode_image(data: bytes) -> NDArray[np.uint8]:
    """Decode one image of sound structure to [height, width, 3] uint8 RGB, as DALI does.

    EXIF orientation is not applied. Of several pictures in a file the first one is taken.

    Raises:
        DecodeError: if Pillow cannot decode it, or a checksum of a PNG is wrong.
    """
    kind = image_kind(data)
    try:
        formats = None if kind is None else (_FORMATS[kind],)
        if kind == "png":  # Pillow decodes a PNG with a wrong checksum; DALI does not
            Image.open(io.BytesIO(data), formats=formats).verify()
        image = Image.open(io.BytesIO(data), formats=formats)
        image.load()
        if image.mode.startswith("I"):  # a grey PNG of 16 bits, rounded as DALI does
            grey = (np.asarray(image).astype(np.uint32) + 128) // 257
            return np.repeat(grey.astype(np.uint8)[:, :, None], 3, axis=2)
        return np.array(image if image.mode == "RGB" else image.convert("RGB"))
    # Damaged bytes make a decoder raise nearly anything; whatever it is, the image is not used.
    except Exception as error:
        raise DecodeError(f"{type(error).__name__}: {error}") from error
