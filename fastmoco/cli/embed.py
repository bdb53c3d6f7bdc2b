"""`fastmoco eval embed|neighbours|outliers`: features of a set by the encoder of a run, with the
names of the files."""

from __future__ import annotations

import json as json_module
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tyro.conf import Positional

from fastmoco.cli.collection import collection_paused
from fastmoco.cli.images import of_options, set_of_folder
from fastmoco.cli.output import until_closed
from fastmoco.errors import EXIT_FINISHED, EXIT_REFUSED, one_line, say, show

if TYPE_CHECKING:
    import torch

    from fastmoco.config import Config
    from fastmoco.evaluation.embeddings import Embeddings


def embed(
    run: Positional[Path], *, shards: str, out: Path, limit: int = 0, best: bool = False
) -> int:
    """Write the features of a set, with labels and file names, to .npz or .safetensors.

    The features are the class-token features that kNN uses, float32, not of unit length, one row
    for each image that decodes, in the order of the set.

    Args:
        run: Folder of the run, as given to `fastmoco train --out`, or of one checkpoint.
        shards: The set, labelled or not, or a folder of images.
        out: A new file, .npz or .safetensors.
        limit: Only this many images, spread evenly over the set; 0: all.
        best: The checkpoint with the highest kNN accuracy, in place of the newest.
    """
    with one_line(EXIT_REFUSED, ValueError, OSError):
        _require_count("limit", limit)
        with collection_paused():
            from fastmoco.evaluation.embeddings import require_target, write_embeddings

        require_target(out)
        (found,), _ = _embed(run, {"shards": (shards, limit)}, best)
        write_embeddings(found, out)
        shape = " x ".join(map(str, found.features.shape))
        show(f"wrote features {shape} of step {found.step}, labels and file names to {out}")
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
    best: bool = False,
) -> int:
    """For each image of a set, the images of another one that the encoder finds most similar.

    The sets may be the same; an image is not its own neighbour.

    Args:
        run: Folder of the run, as given to `fastmoco train --out`, or of one checkpoint.
        train: The images among which neighbours are searched: shards, labelled or not, or a folder
            of images.
        query: The images whose neighbours are searched.
        k: Number of neighbours.
        limit: Only this many queries, spread evenly over the set; 0: all.
        out: Draw a picture too: each query and its neighbours, with cosines and file names.
        json: Print JSON instead of text.
        best: The checkpoint with the highest kNN accuracy, in place of the newest.
    """
    with one_line(EXIT_REFUSED, ValueError, OSError), until_closed():
        _require_count("limit", limit)
        _require_k(k)
        with collection_paused():
            from fastmoco.evaluation.embeddings import neighbours as search

        if train == query:
            (bank,), device = _embed(run, {"train": (train, 0)}, best)
            queries = bank.spread(limit)
        else:
            (bank, queries), device = _embed(
                run, {"train": (train, 0), "query": (query, limit)}, best
            )
        similar, index = search(bank, queries, k=k, device=device)
        rows = [
            (number, list(zip(cosines, places, strict=True)))
            for number, (cosines, places) in enumerate(
                zip(similar.tolist(), index.tolist(), strict=True)
            )
        ]
        if json:
            _print_json(
                run,
                bank.step,
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
    return EXIT_FINISHED


def outliers(
    run: Positional[Path],
    *,
    shards: str,
    k: int = 8,
    show: int = 20,
    out: Path | None = None,
    json: bool = False,
    best: bool = False,
) -> int:
    """Images of a set that are like no other: those with the lowest mean similarity to their nearest
    images.

    Args:
        run: Folder of the run, as given to `fastmoco train --out`, or of one checkpoint.
        shards: The set, labelled or not, or a folder of images.
        k: Nearest images over which the similarity is averaged.
        show: Number of images to list; 0: all.
        out: Draw a picture too: each image and the most similar one.
        json: Print JSON instead of text.
        best: The checkpoint with the highest kNN accuracy, in place of the newest.
    """
    with one_line(EXIT_REFUSED, ValueError, OSError), until_closed():
        _require_count("show", show)
        _require_k(k)
        with collection_paused():
            from fastmoco.evaluation.embeddings import outliers as search

        (images,), device = _embed(run, {"shards": (shards, 0)}, best)
        found = search(images, k=k, device=device)
        columns = (found.rows, found.similarity, found.nearest)
        rows = list(zip(*(column.tolist() for column in columns), strict=True))[: show or None]
        if json:
            _print_json(
                run,
                images.step,
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
                print(
                    f"{similarity:.4f}  {_shown(images, row)}  (nearest: {_shown(images, nearest)})"
                )
        if out is not None:
            sheet = [
                [("set", row, f"{similarity:.4f}"), ("set", nearest, "nearest")]
                for row, similarity, nearest in rows
            ]
            _draw(out, {"set": images}, sheet, quiet=json)
    return EXIT_FINISHED


def _require_count(name: str, value: int) -> None:
    if value < 0:
        raise ValueError(f"{name}={value}: must not be negative")


def _require_k(k: int) -> None:
    """Before anything is computed."""
    if k < 1:
        raise ValueError(f"k={k}: must be at least 1")


def _embed(
    run: Path, sets: Mapping[str, tuple[str, int]], best: bool
) -> tuple[list[Embeddings], torch.device]:
    """Features of some sets by the encoder of a run, and the device of the computation.

    Args:
        run: folder of the run or of a checkpoint.
        sets: as of `embed_run`, by the names of the options that give them.
        best: as of `embed_run`.
    """
    with collection_paused():
        from fastmoco.distributed.mesh import start_world, stop_world
        from fastmoco.training.embed_run import embed_run

    world = start_world("auto")
    try:
        options = {pattern: name for name, (pattern, _) in sets.items()}
        with of_options({name: pattern for name, (pattern, _) in sets.items()}):
            found = embed_run(
                run,
                list(sets.values()),
                world,
                best=best,
                locate=lambda pattern, config: _shards(options[pattern], pattern, config),
                report=say,
            )
        return found, world.device
    finally:
        stop_world()


def _shards(named: str, source: str, config: Config) -> str:
    """The shards of a set, which may be given as a folder of images; they are shrunk as those of a
    run."""
    from fastmoco.training.images import max_side_of_run

    return set_of_folder(source, max_side=max_side_of_run(config), named=named)


def _shown(found: Embeddings, row: int) -> str:
    from fastmoco_pipelines.text import escaped

    return escaped(found.paths[row])


def _image(found: Embeddings, row: int) -> dict[str, Any]:
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


def _print_json(run: Path, step: int, **content: Any) -> None:
    print(json_module.dumps({"run": str(run), "step": step, **content}, indent=1))


def _draw(
    out: Path,
    sets: dict[str, Embeddings],
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
