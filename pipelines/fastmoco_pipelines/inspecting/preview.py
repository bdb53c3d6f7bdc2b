"""A picture of what the encoder sees: images beside their views, made by the pipeline of
training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from fastmoco_pipelines.errors import DecodeError
from fastmoco_pipelines.files.whole import whole_file
from fastmoco_pipelines.formats.images import rgb_image
from fastmoco_pipelines.healing.culprit import raise_bad_image
from fastmoco_pipelines.sampling.order import samples_at
from fastmoco_pipelines.sets.shard_set import ShardSet
from fastmoco_pipelines.spec import Device, ViewSpec, each_view, require
from fastmoco_pipelines.text import escaped, in_ascii
from fastmoco_pipelines.views.draws import ViewDraws, draw_batch

_CELL = 96  # pixels; smaller views are enlarged to about this, larger ones shown as they are
_GAP = 4
_CELLS = 8  # of a row at most, for more than one image a row
_LETTERS = "bcsh"  # brightness, contrast, saturation, hue: as jitter_order numbers them
_LINE = 13  # pixels
_MARGIN = 6


def save_view_grid(
    shards: str,
    views: Sequence[ViewSpec],
    out_png: Path | str,
    *,
    rows: int = 8,
    seed: int = 0,
    epoch: int = 0,
    threads: int = 2,
    device: Device = "cpu",
    device_id: int | None = None,
    parameters: bool = False,
    tell: Callable[[str], None] = lambda text: None,
) -> Path:
    """Draw a grid of original | view 1 | view 2 | ... and save it as a PNG.

    The images are the first of the order of `epoch`, with the draws they get there: this is what a
    run with the same seed is fed. Tiny images are enlarged without smoothing, so that every pixel
    stays visible.

    Args:
        shards: shard pattern, as for the loader.
        views: what is made of each image, as for the loader.
        out_png: where to write; its folder is made if need be.
        rows: rows of the grid. Each shows two images, or one where there are more than three views;
            fewer rows where the shards hold fewer images.
        seed: seed of order and draws.
        epoch: which epoch's order and draws to show.
        threads: DALI worker threads.
        device: where to make the views.
        device_id: ordinal of the GPU.
        parameters: write beside each row its files, and what was drawn for its views.
        tell: called with a line for each image: its row, its place in the row, and its file.

    Returns:
        `out_png` as a path.

    Raises:
        ValueError: if `rows` is below 1, there is no view, or the shards hold no image.
        BadImageError: naming tar and member, if an image cannot be decoded.
        ShardError: if the shards or an index are damaged.
    """
    from fastmoco_pipelines.views.dali import ViewPipeline

    require(rows >= 1, "rows", rows, "needs at least one row")
    each = each_view(views)
    images_a_row = max(1, min(2, _CELLS // (1 + len(each))))
    shard_set = ShardSet.open(shards)
    try:
        require(len(shard_set) > 0, "shards", shards, "holds no image")
        first = np.arange(min(rows * images_a_row, len(shard_set)))
        sample_ids = samples_at(first, seed=seed, epoch=epoch, count=len(shard_set))
        encoded = shard_set.read(sample_ids)
        sizes = shard_set.sizes_of(sample_ids)
        names = [escaped(path) for path in shard_set.paths_of(sample_ids)]
    finally:
        shard_set.close()
    draws = draw_batch(views, seed=seed, epoch=epoch, sample_ids=sample_ids, sizes=sizes)
    pipeline = ViewPipeline(
        views,
        batch_size=len(sample_ids),
        threads=threads,
        device=device,
        device_id=device_id,
    )
    try:
        made = pipeline.run(encoded, draws)
    except DecodeError as error:
        raise_bad_image(
            error,
            shards=shard_set,
            sample_ids=sample_ids,
            encoded=encoded,
            device=device,
            device_id=device_id,
        )
    originals = [rgb_image(image.tobytes()) for image in encoded]
    shown = [denormalise(tensor, view) for tensor, view in zip(made, each, strict=True)]
    cells = [
        [original, *map(Image.fromarray, levels)]
        for original, *levels in zip(originals, *shown, strict=True)
    ]
    out = Path(out_png)
    out.parent.mkdir(parents=True, exist_ok=True)
    side = max(_CELL, *(view.size for view in each))
    texts = _texts(draws, sizes, names, images_a_row) if parameters else []
    row_height = max([side + _GAP, *(len(lines) * _LINE + 2 * _MARGIN for lines in texts)])
    picture = _grid(cells, images_a_row, side, row_height)
    if parameters:
        picture = put_beside(picture, texts, row_height)
    with whole_file(out) as fresh:
        picture.save(fresh, "PNG")
    for number, name in enumerate(names):
        row, place = divmod(number, images_a_row)
        tell(f"row {row + 1}, image {place + 1}: {name}")
    return out


def denormalise(images: Tensor, spec: ViewSpec) -> NDArray[np.uint8]:
    """Normalised [B, 3, H, W] float32 back to levels: [B, H, W, 3] uint8, rounded and clipped."""
    mean, std = (np.array(values, dtype=np.float32) for values in (spec.mean, spec.std))
    levels = (images.cpu().numpy().transpose(0, 2, 3, 1) * std + mean) * 255
    return np.asarray(np.clip(np.rint(levels), 0, 255), dtype=np.uint8)


def _grid(
    cells: list[list[Image.Image]],
    images_a_row: int,
    side: int,
    row_height: int,
) -> Image.Image:
    """Rows of groups of square cells on white, a group for each image."""
    groups = min(images_a_row, len(cells))
    rows = -(-len(cells) // groups)
    group_width = len(cells[0]) * (side + _GAP) + 2 * _GAP
    canvas = Image.new("RGB", (groups * group_width - _GAP, rows * row_height + _GAP), "white")
    for index, images in enumerate(cells):
        row, group = divmod(index, groups)
        for column, image in enumerate(images):
            fitted = fit_into(image, side)
            left = group * group_width + _GAP + column * (side + _GAP) + (side - fitted.width) // 2
            canvas.paste(fitted, (left, _GAP + row * row_height + (side - fitted.height) // 2))
    return canvas


def fit_into(image: Image.Image, side: int) -> Image.Image:
    """The image inside a square: enlarged by a whole factor without smoothing, or shrunk
    smoothly."""
    longer = max(image.size)
    if longer <= side:
        factor = side // longer
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    width, height = (max(1, round(length * side / longer)) for length in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def describe_draws(draws: ViewDraws, i: int, size: Sequence[int]) -> str:
    """The draws of row `i` in one line; operations that leave the view alone are left out.

    Args:
        draws: of one view.
        i: the row.
        size: height and width of the image in pixels.
    """
    top, left, height, width = draws.crop[i].tolist()
    share = height * width / max(int(size[0]) * int(size[1]), 1)
    words = [f"crop {width}x{height} at {left},{top} = {share:.2f} of the image"]
    if draws.corner[i].any():
        words.append("view at {1},{0} of the resized crop".format(*draws.corner[i].tolist()))
    factors = (
        float(draws.brightness[i]),
        float(draws.contrast[i]),
        float(draws.saturation[i]),
        float(draws.hue[i]),
    )
    if factors != (1.0, 1.0, 1.0, 0.0):
        order = "".join(_LETTERS[k] for k in draws.jitter_order[i].tolist())
        brightness, contrast, saturation, hue = factors
        words.append(
            f"b {brightness:.2f} c {contrast:.2f} s {saturation:.2f} h {hue:+.3f} ({order})"
        )
    if draws.grayscale[i]:
        words.append("grey")
    if draws.blur_sigma[i] > 0:
        words.append(f"sigma {draws.blur_sigma[i]:.2f}")
    if draws.solarize[i]:
        words.append("solarize")
    if draws.flip[i]:
        words.append("flip")
    return ", ".join(words)


def _texts(
    draws: Sequence[ViewDraws],
    sizes: NDArray[np.int32],
    names: Sequence[str],
    images_a_row: int,
) -> list[list[str]]:
    """Of each row of the grid, for each of its images a line for its file and for each view."""
    lines = []
    for i, name in enumerate(names):
        which = i % images_a_row + 1
        lines.append(f"{which} {shortened(name)}")
        lines += [
            f"{which} view {number}: {describe_draws(some, i, sizes[i])}"
            for number, some in enumerate(draws, start=1)
        ]
    lines_a_row = images_a_row * (1 + len(draws))
    return [lines[at : at + lines_a_row] for at in range(0, len(lines), lines_a_row)]


def shortened(name: str, length: int = 60) -> str:
    """The end of a long name, for a picture."""
    return name if len(name) <= length else f"...{name[3 - length :]}"


def put_beside(
    picture: Image.Image, texts: Sequence[Sequence[str]], row_height: int
) -> Image.Image:
    """The picture with lines of text to the right of each of its rows.

    Args:
        picture: rows of `row_height` pixels each.
        texts: the lines of each row; what does not fit into its height is cut off.
    """
    texts = [[in_ascii(line) for line in lines] for lines in texts]
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
