"""A picture of rows of images with a caption below each."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from fastmoco_pipelines.files.whole import whole_file
from fastmoco_pipelines.inspecting.preview import fit_into
from fastmoco_pipelines.text import escaped, in_ascii

MOST_IMAGES = 5000
"""Of one picture: about 80 megapixels."""
_CELL = 112  # pixels
_GAP = 6
_LINE = 13


def save_contact_sheet(
    rows: Sequence[Sequence[tuple[bytes, Sequence[str]]]], out_png: Path | str
) -> Path:
    """Draw rows of images and save them as a PNG; the first of each row is apart from the others.

    Args:
        rows: for each image its encoded bytes, and the lines of its caption, of which the ends are
            shown if they are too long.
        out_png: where to write; its folder is made if need be.

    Raises:
        ValueError: for no image, or too many.
    """
    count = sum(map(len, rows))
    if not 0 < count <= MOST_IMAGES:
        raise ValueError(f"{count} images: a picture shows 1 to {MOST_IMAGES}: ask for fewer")
    lines = max(len(caption) for row in rows for _, caption in row)
    width, height = _CELL + _GAP, _CELL + lines * _LINE + 2 * _GAP
    canvas = Image.new(
        "RGB", (max(map(len, rows)) * width + 3 * _GAP, len(rows) * height + _GAP), "white"
    )
    pen = ImageDraw.Draw(canvas)
    font = ImageFont.load_default()
    for number, row in enumerate(rows):
        for column, (data, caption) in enumerate(row):
            left = _GAP + column * width + (2 * _GAP if column else 0)
            top = _GAP + number * height
            with Image.open(io.BytesIO(data)) as image:
                shown = fit_into(image.convert("RGB"), _CELL)
            canvas.paste(shown, (left + (_CELL - shown.width) // 2, top + _CELL - shown.height))
            for line, text in enumerate(caption):
                at = (left, top + _CELL + 2 + line * _LINE)
                pen.text(at, _end_of(in_ascii(escaped(text)), font), fill="black", font=font)

    out = Path(out_png)
    out.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(out) as fresh:
        canvas.save(fresh, "PNG")
    return out


def _end_of(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> str:
    """As much of the end of a text as fits below an image."""
    if font.getlength(text) <= _CELL:
        return text
    while len(text) > 1 and font.getlength(f"...{text}") > _CELL:
        text = text[1:]
    return f"...{text}"
