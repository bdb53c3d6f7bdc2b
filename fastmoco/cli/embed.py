"""`fastmoco eval embed|neighbours|outliers`: features of a set by the encoder of a run, with the
names of the files."""

from __future__ import annotations

import json as json_module
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tyro.conf import Positional

from fastmoco.cli.collection import collection_paused
from fastmoco.cli.data import progress_bar
from fastmoco.cli.images import normalisation, of_options, set_of_folder
from fastmoco.cli.output import until_closed
from fastmoco.errors import EXIT_FINISHED, EXIT_REFUSED, one_line, say, show

if TYPE_CHECKING:
    import torch

    from fastmoco.distributed.mesh import World
    from fastmoco.evaluation.embeddings import Embeddings, ImageNames, Outliers
    from fastmoco.models.weights.foreign import Normalised
    from fastmoco.training.embed_run import StoredFeatures
    from fastmoco.training.encoder_source import EncoderSource


def embed(
    run: Positional[Path],
    *,
    shards: str,
    out: Path,
    tokens: Literal["class", "mean", "patch"] = "class",
    dtype: Literal["float32", "float16"] = "float32",
    limit: int = 0,
    which: Literal["base", "momentum"] | None = None,
    best: bool = False,
    heads: int | None = None,
    mean: tuple[float, ...] = (),
    std: tuple[float, ...] = (),
) -> int:
    """Write the features of a set, with labels and file names, to .safetensors, .npz, .npy or
    .parquet.

    One row for each image that decodes, in the order of the set, not of unit length. A command that
    was interrupted continues where it was; under torchrun the processes share the images.

    Args:
        run: Folder of the run, as given to `fastmoco train --out`, or of one checkpoint; or a file
            of weights.
        shards: The set, labelled or not, or a folder of images.
        out: A new file, .safetensors, .npz, .npy or .parquet.
        tokens: class: the feature of the encoder, which kNN uses; mean: the mean of the patch
            tokens; patch: all patch tokens, [n, L, E].
        dtype: Of the features in the file.
        limit: Only this many images, spread evenly over the set; 0: all.
        which: The trained encoder (base), or its moving average (default: the one that the
            method evaluates: for DINO, EsViT and ExtreMA the average, else the trained one).
        best: The checkpoint with the highest kNN accuracy, in place of the newest.
        heads: Attention heads, for a file of a ViT that does not show them.
        mean: Of red, green, blue by which images were normalised, for a file that does not say.
        std: The standard deviations.
    """
    with one_line(EXIT_REFUSED, ValueError, OSError):
        _require_count("limit", limit)
        with collection_paused():
            from fastmoco.distributed.first_rank import first_rank_does
            from fastmoco.evaluation.feature_files import require_target, write_features

        def target_is_new() -> str:
            require_target(out)
            return ""

        options = _Options(
            which, best, heads, normalisation(mean, std), tokens, out.with_name(f"{out.name}.parts")
        )
        with _embedded(run, {"shards": (shards, limit)}, options, check=target_is_new) as (
            source,
            (found,),
            world,
        ):
            names = found.names()

            def write() -> str:
                blocks = (part.features for part in found.cache.read_all())
                first = next(blocks)
                shape = (len(names), *first.shape[1:])
                write_features(names, shape, chain([first], blocks), out, dtype=dtype)
                show(
                    f"wrote features {' x '.join(map(str, shape))} of step {source.step}, labels "
                    f"and file names to {out}"
                )
                return ""

            first_rank_does(world, "written", write)
    return EXIT_FINISHED


def neighbours(
    run: Positional[Path],
    *,
    train: str,
    query: str,
    k: int = 8,
    limit: int = 16,
    out: Path | None = None,
    json: bool = False,
    which: Literal["base", "momentum"] | None = None,
    best: bool = False,
    heads: int | None = None,
    mean: tuple[float, ...] = (),
    std: tuple[float, ...] = (),
) -> int:
    """For each image of a set, the images of another one that the encoder finds most similar.

    The sets may be the same; an image is not its own neighbour.

    Args:
        run: Folder of the run, as given to `fastmoco train --out`, or of one checkpoint; or a file
            of weights.
        train: The images among which neighbours are searched: shards, labelled or not, or a folder
            of images.
        query: The images whose neighbours are searched.
        k: Number of neighbours.
        limit: Only this many queries, spread evenly over the set; 0: all.
        out: Draw a picture too: each query and its neighbours, with cosines and file names.
        json: Print JSON instead of text.
        which: The trained encoder (base), or its moving average (default: the one that the
            method evaluates: for DINO, EsViT and ExtreMA the average, else the trained one).
        best: The checkpoint with the highest kNN accuracy, in place of the newest.
        heads: Attention heads, for a file of a ViT that does not show them.
        mean: Of red, green, blue by which images were normalised, for a file that does not say.
        std: The standard deviations.
    """
    with one_line(EXIT_REFUSED, ValueError, OSError), until_closed():
        _require_count("limit", limit)
        _require_k(k)
        with collection_paused():
            from fastmoco.evaluation.embeddings import neighbours as search

        sets = {"train": (train, 0)}
        if train != query:
            sets["query"] = (query, limit)
        with _embedded(run, sets, _Options(which, best, heads, normalisation(mean, std))) as (
            source,
            stored,
            world,
        ):
            bank = stored[0].embeddings()
            queries = stored[1].embeddings() if train != query else bank.spread(limit)
            with progress_on(world, "searching") as progress:
                similar, index = search(bank, queries, k=k, device=world.device, progress=progress)
            if world.rank == 0:
                _show_neighbours(run, source, bank, queries, similar, index, out, json)
    return EXIT_FINISHED


def _show_neighbours(
    run: Path,
    source: EncoderSource,
    bank: Embeddings,
    queries: Embeddings,
    similar: torch.Tensor,
    index: torch.Tensor,
    out: Path | None,
    json: bool,
) -> None:
    """Print queries with their neighbours, and draw them if there is a file for it."""
    rows = [
        (number, list(zip(cosines, places, strict=True)))
        for number, (cosines, places) in enumerate(
            zip(similar.tolist(), index.tolist(), strict=True)
        )
    ]
    if json:
        _print_json(
            run,
            source,
            queries=[
                {
                    **_image(queries, number),
                    "neighbours": [
                        {"cosine": round(cosine, 6), **_image(bank, place)}
                        for cosine, place in found
                    ],
                }
                for number, found in rows
            ],
        )
    else:
        for number, found in rows:
            print(_shown(queries, number))
            for cosine, place in found:
                print(f"  {cosine:.4f}  {_shown(bank, place)}")
    if out is not None:
        sheet = [
            [
                ("query", number, ""),
                *(("train", place, f"{cosine:.4f}") for cosine, place in found),
            ]
            for number, found in rows
        ]
        _draw(out, {"query": queries, "train": bank}, sheet, quiet=json)


def outliers(
    run: Positional[Path],
    *,
    shards: str,
    k: int = 8,
    show: int = 20,
    out: Path | None = None,
    json: bool = False,
    which: Literal["base", "momentum"] | None = None,
    best: bool = False,
    heads: int | None = None,
    mean: tuple[float, ...] = (),
    std: tuple[float, ...] = (),
) -> int:
    """Images of a set that are like no other: those with the lowest mean similarity to their nearest
    images.

    Args:
        run: Folder of the run, as given to `fastmoco train --out`, or of one checkpoint; or a file
            of weights.
        shards: The set, labelled or not, or a folder of images.
        k: Nearest images over which the similarity is averaged.
        show: Number of images to list; 0: all.
        out: Draw a picture too: each image and the most similar one.
        json: Print JSON instead of text.
        which: The trained encoder (base), or its moving average (default: the one that the
            method evaluates: for DINO, EsViT and ExtreMA the average, else the trained one).
        best: The checkpoint with the highest kNN accuracy, in place of the newest.
        heads: Attention heads, for a file of a ViT that does not show them.
        mean: Of red, green, blue by which images were normalised, for a file that does not say.
        std: The standard deviations.
    """
    with one_line(EXIT_REFUSED, ValueError, OSError), until_closed():
        _require_count("show", show)
        _require_k(k)
        with collection_paused():
            from fastmoco.evaluation.embeddings import outliers as search

        with _embedded(
            run, {"shards": (shards, 0)}, _Options(which, best, heads, normalisation(mean, std))
        ) as (
            source,
            (stored,),
            world,
        ):
            images = stored.embeddings()
            with progress_on(world, "searching") as progress:
                found = search(images, k=k, device=world.device, progress=progress)
            if world.rank == 0:
                _show_outliers(run, source, images, found, show, out, json)
    return EXIT_FINISHED


def _show_outliers(
    run: Path,
    source: EncoderSource,
    images: Embeddings,
    found: Outliers,
    count: int,
    out: Path | None,
    json: bool,
) -> None:
    """Print the first outliers, and draw them if there is a file for it."""
    columns = (found.rows, found.similarity, found.nearest)
    rows = list(zip(*(column.tolist() for column in columns), strict=True))[: count or None]
    if json:
        _print_json(
            run,
            source,
            outliers=[
                {
                    **_image(images, row),
                    "similarity": round(similarity, 6),
                    "nearest": _image(images, nearest),
                }
                for row, similarity, nearest in rows
            ],
        )
    else:
        for row, similarity, nearest in rows:
            print(f"{similarity:.4f}  {_shown(images, row)}  (nearest: {_shown(images, nearest)})")
    if out is not None:
        sheet = [
            [("set", row, f"{similarity:.4f}"), ("set", nearest, "nearest")]
            for row, similarity, nearest in rows
        ]
        _draw(out, {"set": images}, sheet, quiet=json)


def _require_count(name: str, value: int) -> None:
    if value < 0:
        raise ValueError(f"{name}={value}: must not be negative")


def _require_k(k: int) -> None:
    """Before anything is computed."""
    if k < 1:
        raise ValueError(f"k={k}: must be at least 1")


@dataclass(frozen=True)
class _Options:
    """Which encoder, what of it, and where parts of features are kept; None: in the run."""

    which: Literal["base", "momentum"] | None
    best: bool
    heads: int | None
    normalised: Normalised | None
    tokens: Literal["class", "mean", "patch"] = "class"
    root: Path | None = None


def progress_on(world: World, what: str) -> AbstractContextManager[Callable[[int, int], None]]:
    """Progress of rank 0, on standard error; of the others none."""
    if world.rank > 0:
        return nullcontext(lambda done, total: None)
    return progress_bar(what, growing=True)


@contextmanager
def _embedded(
    run: Path,
    sets: Mapping[str, tuple[str, int]],
    options: _Options,
    *,
    check: Callable[[], str] = lambda: "",
) -> Iterator[tuple[EncoderSource, list[StoredFeatures], World]]:
    """Features of some sets by an encoder, until the context ends, and this process among its
    peers.

    Args:
        run: folder of the run or of a checkpoint, or a file.
        sets: as of `embed_run`, by the names of the options that give them.
        options: of the encoder.
        check: called on rank 0 first.
    """
    with collection_paused():
        from fastmoco.distributed.first_rank import first_rank_does
        from fastmoco.distributed.mesh import start_world, stop_world
        from fastmoco.evaluation.feature_cache import WAIT_S
        from fastmoco.faults.first_cause import first_cause
        from fastmoco.training.embed_run import embed_run

    world = start_world("auto", timeout_s=WAIT_S)
    named = {pattern: name for name, (pattern, _) in sets.items()}

    def locate(pattern: str, max_side: int) -> str:
        return set_of_folder(pattern, max_side=max_side, named=named[pattern])

    with (
        first_cause(world),
        of_options({name: pattern for name, (pattern, _) in sets.items()}),
    ):
        first_rank_does(world, "check", check)
        with embed_run(
            run,
            list(sets.values()),
            world,
            which=options.which,
            best=options.best,
            heads=options.heads,
            normalised=options.normalised,
            tokens=options.tokens,
            root=options.root,
            locate=locate,
            report=say,
            shown=lambda what: progress_bar(what, growing=True),
        ) as (source, found):
            yield source, found, world
    stop_world()


def _shown(found: ImageNames, row: int) -> str:
    from fastmoco_pipelines.text import escaped

    return escaped(found.paths[row])


def _image(found: ImageNames, row: int) -> dict[str, Any]:
    """An image as a value of JSON."""
    from fastmoco_pipelines.formats.index_json import path_to_json

    label = int(found.labels[row])
    image: dict[str, Any] = {
        "path": path_to_json(found.paths[row]),
        "sample": int(found.sample_ids[row]),
        "label": label,
    }
    if 0 <= label < len(found.classes):
        image["class"] = path_to_json(found.classes[label])
    return image


def _print_json(run: Path, source: EncoderSource, **content: Any) -> None:
    found = {"run": str(run), "step": source.step, "source": dict(source.facts), **content}
    print(json_module.dumps(found, indent=1))


def _draw(
    out: Path,
    sets: Mapping[str, ImageNames],
    sheet: Sequence[Sequence[tuple[str, int, str]]],
    *,
    quiet: bool,
) -> None:
    """Draw images, each given by its set, its row there and a line of text."""
    from contextlib import closing

    import numpy as np

    from fastmoco_pipelines import ShardSet
    from fastmoco_pipelines.inspecting.contact_sheet import save_contact_sheet

    # Read each image once, set by set.
    encoded: dict[tuple[str, int], bytes] = {}
    for name, found in sets.items():
        rows = sorted({row for line in sheet for which, row, _ in line if which == name})
        with closing(ShardSet.open(found.pattern)) as shards:
            data = shards.read(found.sample_ids[np.array(rows, dtype=np.int64)])
            encoded |= {(name, row): one.tobytes() for row, one in zip(rows, data, strict=True)}
    cells = [
        [
            (encoded[name, row], [*([text] if text else []), sets[name].paths[row]])
            for name, row, text in line
        ]
        for line in sheet
    ]
    path = save_contact_sheet(cells, out)
    if not quiet:
        show(f"wrote {path}")
