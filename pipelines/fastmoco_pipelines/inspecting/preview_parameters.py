"""What was drawn for each view, as text beside the picture of the views."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from fastmoco_pipelines.views.draws import ViewDraws

_LETTERS = "bcsh"  # brightness, contrast, saturation, hue: as jitter_order numbers them
_LINE = 13  # pixels
_MARGIN = 6


def describe_draws(draws: ViewDraws, i: int, size: Sequence[int]) -> str:
    """The draws of row ``i`` in one line; operations that leave the view alone are left out.

    Args:
        draws: of one view.
        i: the row.
        size: height and width of the image in pixels.
    """
    top, left, height, width = draws.crop[i].tolist()
    share = height * width / max(int(size[0]) * int(size[1]), 1)
    words = [f"crop {width}x{height} at {left},{top} = {share:.2f} of the image"]
    factors = (float(draws.brightness[i]), float(draws.contrast[i]), float(draws.saturation[i]), float(draws.hue[i]))
    if factors != (1.0, 1.0, 1.0, 0.0):
        order = "".join(_LETTERS[k] for k in draws.jitter_order[i].tolist())
        brightness, contrast, saturation, hue = factors
        words.append(f"b {brightness:.2f} c {contrast:.2f} s {saturation:.2f} h {hue:+.3f} ({order})")
    if draws.grayscale[i]:
        words.append("grey")
    if draws.blur_sigma[i] > 0:
        words.append(f"sigma {draws.blur_sigma[i]:.2f}")
    if draws.solarize[i]:
        words.append("solarize")
    if draws.flip[i]:
        words.append("flip")
    return ", ".join(words)


def height_of(lines: int) -> int:
    """Pixels of a row that shows so many lines of text; 0 for none."""
    return lines * _LINE + (2 * _MARGIN if lines else 0)


def put_beside(picture: Image.Image, texts: Sequence[Sequence[str]], row_height: int) -> Image.Image:
    """The picture with lines of text to the right of each of its rows.

    Args:
        picture: rows of ``row_height`` pixels each.
        texts: the lines of each row; what does not fit into its height is cut off.
    """
    font = ImageFont.load_default()
    widest = max((font.getlength(line) for lines in texts for line in lines), default=0.0)
    canvas = Image.new("RGB", (picture.width + 2 * _MARGIN + int(widest), picture.height), "white")
    canvas.paste(picture, (0, 0))
    pen = ImageDraw.Draw(canvas)
    for row, lines in enumerate(texts):
        for number, line in enumerate(lines[: row_height // _LINE]):
            at = (picture.width + _MARGIN, row * row_height + _MARGIN + number * _LINE)
            pen.text(at, line, fill="black", font=font)
    return canvas
