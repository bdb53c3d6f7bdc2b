"""The pictures of a report: what a run's data and its newest checkpoint show.

Each part is made by itself. Where its data or checkpoint is missing or damaged, it says why in one
sentence, and the others stand.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from fastmoco.config import Config
from fastmoco.config.serial import from_json
from fastmoco.distributed.mesh import World
from fastmoco.evaluation.embed import encoder_function
from fastmoco.evaluation.monitor import evenly
from fastmoco.evaluation.nearest import Nearest
from fastmoco.models.precision import choose_precision
from fastmoco.planning.duration import cpu_flops_per_s
from fastmoco.run.report.charts import FeatureMap
from fastmoco.run.report.pictures import Tile, Tiles
from fastmoco.run.report.reading import ReportRun
from fastmoco.training import setup
from fastmoco.training.embed_run import batches_of_set, precision_of
from fastmoco.training.encoder_source import EncoderSource, load_source
from fastmoco.training.report_facts import tried
from fastmoco_pipelines import ShardSet
from fastmoco_pipelines.formats.images import rgb_image
from fastmoco_pipelines.sampling.order import samples_at
from fastmoco_pipelines.spec import each_view
from fastmoco_pipelines.text import escaped

SIDE = 96
"""Pixels of a small picture."""
PAIRS, QUERIES, NEIGHBOURS, ATTENDED, HEADS = 8, 8, 6, 6, 6
"""Rows and columns of the pictures."""
MOST_IMAGES = 1000
"""Images whose features are computed."""
LEAST_IMAGES = 64
SECONDS = 30.0
"""Time of a CPU for these features, by the speed that it reaches in a product."""
PERPLEXITY = 30.0
"""Of t-SNE."""
CIVIDIS = ((0, 34, 78), (59, 73, 108), (124, 123, 120), (187, 175, 113), (254, 232, 56))
"""Colors of attention, from none to the most; the color-blind see the same order."""


class Pictures(NamedTuple):
    """The parts of a report that need data or a model; as of `pictures.Extras`."""

    views: Tiles
    neighbours: Tiles
    attention: Tiles
    features: FeatureMap | None
    no_features: str


def make_pictures(
    run: ReportRun,
    *,
    shards: str = "",
    on_cpu: bool = False,
    tell: Callable[[str], None] = lambda text: None,
) -> Pictures:
    """Make the pictures of one run. No error leaves this function; the parts name them.

    Args:
        run: whose config and newest sound checkpoint are taken.
        shards: the training set, where it is not where the run had it; "": there.
        on_cpu: leave a GPU to a training.
        tell: called with a sentence about each image or checkpoint that is left out.
    """
    if not run.config:
        return _without("The configuration of the run cannot be read: it has no sound config.json.")
    config = tried(lambda: from_json(dict(run.config)))
    if isinstance(config, str):
        return _without(f"The configuration of the run cannot be read: {config}")
    pattern = shards or config.data.shards
    views = tried(lambda: view_pairs(config, pattern))
    shown = (
        Tiles(why=f"The view pairs cannot be shown: {views}") if isinstance(views, str) else views
    )

    world = World(
        device=torch.device("cuda" if torch.cuda.is_available() and not on_cpu else "cpu")
    )
    source = tried(lambda: load_source(run.folder.path, world.device))
    if isinstance(source, str):
        return _without(f"No checkpoint can be read: {source}")._replace(views=shown)
    for note in source.notes:
        tell(note)
    held_out = config.knn.test_shards or config.accuracy.test_shards
    found: _Features | str = "no image is held out"
    if held_out:
        found = tried(lambda: _features_of(config, source, held_out, world, tell))
        if isinstance(found, str):
            tell(f"the held-out images cannot be read, so training images are shown: {found}")
    if isinstance(found, str):
        found = tried(lambda: _features_of(config, source, pattern, world, tell, held_out=False))
    if isinstance(found, str):
        return _without(f"The images cannot be read: {found}")._replace(views=shown)

    near = tried(lambda: neighbours(found))
    attended = tried(lambda: attention_maps(found, source))
    flat = tried(lambda: flat_features(found))
    return Pictures(
        views=shown,
        neighbours=Tiles(why=f"No neighbours: {near}") if isinstance(near, str) else near,
        attention=Tiles(why=f"No attention maps: {attended}")
        if isinstance(attended, str)
        else attended,
        features=None if isinstance(flat, str) else flat,
        no_features=f"No map of the features: {flat}" if isinstance(flat, str) else "",
    )


def _without(why: str) -> Pictures:
    return Pictures(Tiles(why=why), Tiles(why=why), Tiles(why=why), None, why)


def view_pairs(config: Config, shards: str) -> Tiles:
    """Some images of the first epoch with the views that the run has made of them.

    Raises:
        ValueError, RuntimeError, OSError: if the set or an image cannot be read.
    """
    from fastmoco_pipelines.views.dali import ViewPipeline
    from fastmoco_pipelines.views.draws import draw_batch

    if config.data.synthetic:
        raise ValueError("the run was trained on synthetic images")
    with closing(ShardSet.open(shards, cache=config.data)) as images:
        first = np.arange(min(PAIRS, len(images)))
        ids = samples_at(first, seed=config.seed, epoch=0, count=len(images))
        encoded = images.read(ids)
        sizes = images.sizes_of(ids)
        names = images.paths_of(ids)
    views = config.data.views
    draws = draw_batch(views, seed=config.seed, epoch=0, sample_ids=ids, sizes=sizes)
    made = ViewPipeline(views, batch_size=len(ids), threads=2, device="cpu").run(encoded, draws)
    levels = [
        _levels(tensor, view.mean, view.std)
        for tensor, view in zip(made, each_view(views), strict=True)
    ]
    rows = []
    for row, name in enumerate(names):
        original = rgb_image(encoded[row].tobytes())
        tiles = [_tile(original, f"image {escaped(name)}", "image")]
        tiles += [
            _tile(Image.fromarray(view[row]), f"view {number} of {escaped(name)}", f"view {number}")
            for number, view in enumerate(levels, start=1)
        ]
        rows.append(tiles)
    return Tiles(
        rows=rows, note="Images of the first epoch, each with the views that the run made of it."
    )


def _levels(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> NDArray[np.uint8]:
    """Normalised [B, 3, H, W] back to levels, [B, H, W, 3]."""
    pixels = images.float().cpu().numpy().transpose(0, 2, 3, 1)
    scaled = pixels * np.array(std, np.float32) + np.array(mean, np.float32)
    return np.asarray(np.clip(np.rint(255 * scaled), 0, 255), np.uint8)


def _tile(image: Image.Image, alt: str, caption: str = "") -> Tile:
    """A picture of at most `SIDE` pixels as a data URI, PNG or JPEG, whichever is smaller."""
    longer = max(image.size)
    if longer <= SIDE:
        factor = SIDE // longer
        size = (image.width * factor, image.height * factor)
        shown = image.resize(size, Image.Resampling.NEAREST)
    else:
        width, height = (max(1, round(length * SIDE / longer)) for length in image.size)
        shown = image.resize((width, height), Image.Resampling.LANCZOS)
    found = []
    for kind, options in (("png", {"optimize": True}), ("jpeg", {"quality": 88})):
        file = io.BytesIO()
        shown.convert("RGB").save(file, kind, **options)
        found.append((len(file.getvalue()), kind, file.getvalue()))
    _, kind, content = min(found)
    return Tile(
        source=f"data:image/{kind};base64,{base64.b64encode(content).decode()}",
        alt=alt,
        caption=caption,
    )


@dataclass(frozen=True, kw_only=True)
class _Features:
    """Features of some images of a set.

    Attributes:
        rows: [n, E] float32 of unit length.
        labels: [n], -1 without a label.
        ids: [n] numbers in the set.
        pattern: of the shards.
        config: of the run.
        classes: names by label.
        images: the first batch, normalised, on the device of the encoder.
        encode: runs a function of images in the precision of evaluations.
        step: of the encoder.
        what: the set, for people.
    """

    rows: Tensor
    labels: NDArray[np.int64]
    ids: NDArray[np.int64]
    pattern: str
    config: Config
    classes: Sequence[str]
    images: Tensor
    device: torch.device
    precision: str
    step: int
    what: str


def _features_of(
    config: Config,
    source: EncoderSource,
    pattern: str,
    world: World,
    tell: Callable[[str], None],
    *,
    held_out: bool = True,
) -> _Features:
    """Features of images spread over a set, as many as this device computes in some seconds."""
    threads = setup.share_cores(config)
    encoder = source.encoder.eval()
    precision = precision_of(encoder, choose_precision(config.precision, world.device))
    encode = encoder_function(encoder, world.device, precision)
    count = MOST_IMAGES
    if world.device.type == "cpu":
        rate = cpu_flops_per_s(encoder.embed_dim, torch.float32)
        flops = max(1.0, encoder.forward_flops(source.image.size))
        count = int(min(MOST_IMAGES, max(LEAST_IMAGES, SECONDS * rate / flops)))
    rows, labels, ids = [], [], []
    first: Tensor | None = None
    with closing(ShardSet.open(pattern, cache=config.data)) as shards:
        batches = batches_of_set(
            config, world, pattern, shards, source.image, threads=threads, report=tell
        )
        with torch.no_grad():
            for batch in batches(evenly(len(shards), count)):
                rows.append(encode(batch.images).float().cpu())
                labels.append(batch.labels)
                ids.append(batch.sample_ids)
                first = batch.images if first is None else first
        classes = shards.classes
    if first is None:
        raise ValueError(f"{pattern} has no image that decodes")
    return _Features(
        rows=normalize(torch.cat(rows), dim=1),
        labels=np.concatenate(labels),
        ids=np.concatenate(ids),
        pattern=pattern,
        config=config,
        classes=classes,
        images=first,
        device=world.device,
        precision=precision,
        step=source.step,
        what="held-out images" if held_out else "training images",
    )


def _one_of_each(found: _Features, count: int, limit: int | None = None) -> list[int]:
    """Rows of some images, of as many classes as possible."""
    labels = found.labels[:limit]
    firsts = [int(np.flatnonzero(labels == label)[0]) for label in np.unique(labels)]
    rest = [row for row in evenly(len(labels), count).tolist() if row not in firsts]
    chosen = [firsts[place] for place in evenly(len(firsts), count).tolist()]
    return [*chosen, *rest][:count]


def _class_of(found: _Features, row: int) -> str:
    label = int(found.labels[row])
    if label < 0:
        return ""
    return escaped(found.classes[label]) if label < len(found.classes) else f"class {label}"


def neighbours(found: _Features) -> Tiles:
    """Some images, each with the most similar other ones.

    Raises:
        ValueError: if there is one image only, or features are not finite.
    """
    if not bool(found.rows.isfinite().all()):
        raise ValueError("the features are not finite")
    if len(found.rows) < 2:
        raise ValueError("the set has one image only")
    queries = _one_of_each(found, QUERIES)
    nearest = Nearest(found.rows[queries], min(NEIGHBOURS + 1, len(found.rows)))
    for start in range(0, len(found.rows), nearest.block_rows):
        nearest.offer(found.rows[start : start + nearest.block_rows], start)
    wanted: list[tuple[int, list[tuple[int, float]]]] = []
    for query, index, similar in zip(
        queries, nearest.index.tolist(), nearest.similar.tolist(), strict=True
    ):
        pairs = [(row, cosine) for row, cosine in zip(index, similar, strict=True) if row != query]
        wanted.append((query, pairs[:NEIGHBOURS]))
    pictures = _originals(found, [row for query, pairs in wanted for row in (query, *dict(pairs))])
    rows = []
    for query, pairs in wanted:
        own = _class_of(found, query)
        tiles = [_tile(pictures[query], f"query, {own or 'an image'}", own or "query")]
        for row, cosine in pairs:
            other = _class_of(found, row)
            differs = "≠" if other != own else ""
            caption = f"{differs}{other} {cosine:.2f}".strip()
            tiles.append(
                _tile(
                    pictures[row], f"neighbour, {other or 'an image'}, cosine {cosine:.2f}", caption
                )
            )
        rows.append(tiles)
    return Tiles(
        rows=rows,
        note=f"The first of each row is the query; then the most similar of {len(found.rows):,} "
        f"{found.what} with their cosines, at step {found.step:,}. ≠ marks another class.",
    )


def _originals(found: _Features, rows: Sequence[int]) -> dict[int, Image.Image]:
    """The images of some rows as they are in the set."""
    own = sorted(set(rows))
    with closing(ShardSet.open(found.pattern, cache=found.config.data)) as shards:
        data = shards.read(found.ids[own])
    return {row: rgb_image(one.tobytes()) for row, one in zip(own, data, strict=True)}


def attention_maps(found: _Features, source: EncoderSource) -> Tiles:
    """What the class token attends to, over all heads and head by head.

    Raises:
        ValueError: if the encoder has no class token.
    """
    encoder = source.encoder
    maps: Callable[[Tensor], Tensor] | None = getattr(encoder, "class_attention", None)
    if maps is None:
        raise ValueError(
            f"the encoder is a {type(encoder).__name__}, which has no class token; its feature is a "
            "mean over the image"
        )
    rows = _one_of_each(found, ATTENDED, len(found.images))
    images = found.images[rows]
    with torch.no_grad():
        shares = encoder_function(maps, found.device, found.precision)(images).float().cpu()
    side = round(shares.shape[-1] ** 0.5)
    levels = _levels(images, source.image.mean, source.image.std)
    drawn = []
    for place, row in enumerate(rows):
        image = Image.fromarray(levels[place])
        name = _class_of(found, row) or "image"
        tiles = [_tile(image, name, name)]
        heads = shares[place].view(-1, side, side).numpy()
        tiles.append(
            _heat(image, heads.mean(0), f"attention on {name}, mean of heads", "all heads")
        )
        tiles += [
            _heat(image, one, f"attention on {name}, head {number}", f"head {number}")
            for number, one in enumerate(heads[:HEADS], start=1)
        ]
        drawn.append(tiles)
    return Tiles(
        rows=drawn,
        note=f"Last block, at step {found.step:,}: yellow patches get the most attention of the class "
        "token, each picture scaled by itself.",
    )


def _heat(image: Image.Image, share: NDArray[np.float32], alt: str, caption: str) -> Tile:
    """Attention over an image, as colors."""
    low, high = float(share.min()), float(share.max())
    scaled = (share - low) / (high - low) if high > low else np.zeros_like(share)
    plane = Image.fromarray(scaled.astype(np.float32), mode="F").resize(
        (SIDE, SIDE), Image.Resampling.BICUBIC
    )
    position = np.clip(np.asarray(plane), 0, 1) * (len(CIVIDIS) - 1)
    colors = np.array(CIVIDIS, np.float32)
    at = np.arange(len(CIVIDIS))
    heat = np.stack([np.interp(position, at, colors[:, c]) for c in range(3)], axis=-1)
    grey = np.asarray(image.convert("L").resize((SIDE, SIDE)), np.float32)[..., None]
    mixed = 0.75 * heat + 0.25 * grey
    return _tile(Image.fromarray(mixed.astype(np.uint8)), alt, caption)


def flat_features(found: _Features) -> FeatureMap:
    """The features in two dimensions: by t-SNE where scikit-learn is installed, else by PCA.

    Raises:
        ValueError: if there are fewer than three images, or features are not finite.
    """
    if len(found.rows) < 3:
        raise ValueError("it needs at least three images")
    if not bool(found.rows.isfinite().all()):
        raise ValueError("the features are not finite")
    centred = (found.rows - found.rows.mean(0)).double()
    _, _, axes = torch.linalg.svd(centred, full_matrices=False)
    # The sign of an axis is arbitrary; the larger entries point upwards.
    main = axes[:2] * axes[:2].sum(1, keepdim=True).sign().where(
        axes[:2].sum(1, keepdim=True) != 0, 1
    )
    flat = (centred @ main.T).numpy()
    method = "PCA"
    if len(flat) > 3 * PERPLEXITY:
        try:
            from sklearn.manifold import TSNE

            start = flat / max(float(flat[:, 0].std()), 1e-12) * 1e-4
            reduced: Any = TSNE(perplexity=PERPLEXITY, init=start, random_state=0)
            flat, method = reduced.fit_transform(found.rows.numpy()), "t-SNE"
        except ImportError:
            pass
    return FeatureMap(
        x=flat[:, 0].astype(np.float32),
        y=flat[:, 1].astype(np.float32) if flat.shape[1] > 1 else np.zeros(len(flat), np.float32),
        labels=found.labels,
        classes=[escaped(name) for name in found.classes],
        method=method,
        step=found.step,
    )
