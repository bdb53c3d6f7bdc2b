"""`fastmoco eval knn`: the accuracy for every pair of k and temperature, as text or
JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import torch

from fastmoco.cli.data import progress_bar
from fastmoco.cli.embed import progress_on
from fastmoco.cli.images import knn_sets_of_ranks, of_options
from fastmoco.distributed.gather import gather_rows
from fastmoco.distributed.mesh import World, start_world, stop_world
from fastmoco.errors import EXIT_FINISHED, EXIT_REFUSED, one_line, say, show
from fastmoco.evaluation.confidence import wilson
from fastmoco.evaluation.feature_cache import WAIT_S
from fastmoco.evaluation.knn import KnnCount, require_votes, shared_knn_sweep
from fastmoco.evaluation.monitor import judge, open_comparable
from fastmoco.faults.first_cause import first_cause
from fastmoco.models.weights.foreign import Normalised
from fastmoco.training import setup
from fastmoco.training.embed_run import Embedder, StoredFeatures, parts_folder
from fastmoco.training.encoder_source import EncoderSource, load_source
from fastmoco_pipelines.files.whole import write_file


def eval_knn(
    run: Path,
    train_shards: str,
    test_shards: str,
    *,
    ks: Sequence[int],
    temperatures: Sequence[float],
    which: Literal["base", "momentum"] | None = None,
    best: bool = False,
    heads: int | None = None,
    normalised: Normalised | None = None,
    out: Path | None = None,
    as_json: bool = False,
) -> int:
    """Print the kNN accuracy of an encoder; returns 0.

    Args:
        run: folder of a run, for its newest checkpoint, or of one checkpoint, or a file of weights.
        train_shards: labelled shards for the neighbours, or a folder of images.
        test_shards: labelled shards to classify, or a folder of images.
        ks: numbers of neighbours that vote.
        temperatures: of their votes.
        which: the encoder of a run.
        best: the checkpoint of the run with the highest accuracy, in place of the newest.
        heads: attention heads, for a file of a ViT that does not show them.
        normalised: how images were normalised, for a file that does not say it.
        out: a file for the JSON too; one of this name is replaced.
        as_json: print one line of JSON instead of text.

    Raises:
        SystemExit: with 2 if the encoder or the shards cannot be used, after a message on standard
            error.
    """
    with one_line(EXIT_REFUSED, ValueError, OSError):
        require_votes(ks, temperatures)
        world = start_world("auto", timeout_s=WAIT_S)
        with first_cause(world), of_options({"train": train_shards, "test": test_shards}):
            source = load_source(
                run, world.device, which=which, best=best, heads=heads, normalised=normalised
            )
            found = _measure(run, source, (train_shards, test_shards), world, ks, temperatures)
            if world.rank == 0:
                line = json.dumps(found)
                if out is not None:
                    out.parent.mkdir(parents=True, exist_ok=True)
                    write_file(out, f"{line}\n".encode())
                if as_json:
                    print(line)
                else:
                    _show(found)
                    if out is not None:
                        show(f"wrote {out}")
    stop_world()
    return EXIT_FINISHED


def _measure(
    run: Path,
    source: EncoderSource,
    given: tuple[str, str],
    world: World,
    ks: Sequence[int],
    temperatures: Sequence[float],
) -> dict[str, Any]:
    """The content of the JSON."""
    tell = say if world.rank == 0 else _drop
    for note in source.notes:
        tell(note)
    embedder = Embedder(source, world, report=lambda text: say(f"warning: {text}"))
    if (decoder := setup.decoder_note(embedder.config)) is not None:
        tell(decoder)

    # The sets, and what an accuracy between them can mean.
    patterns = knn_sets_of_ranks(world, *given, max_side=embedder.max_side)
    bank, queries = open_comparable(patterns[0], patterns[1], embedder.config.data)
    with ExitStack() as stack:
        for opened in (bank, queries):
            stack.callback(opened.shards.close)
        meaning = judge(bank.shards, queries.shards, k=max(ks))
        for note in meaning.notes if meaning is not None else ():
            tell(f"warning: kNN: {note}")
        sets = [(opened.pattern, opened.shards, 0) for opened in (bank, queries)]
        images = [len(opened.shards) for opened in (bank, queries)]
        counts: list[KnnCount] = []
        if meaning is None or not meaning.says_nothing:
            stored = stack.enter_context(
                embedder.features(
                    sets,
                    parts_folder(run, source),
                    shown=lambda what: progress_bar(what, growing=True),
                )
            )
            counts, images = _count(stored, world, ks, temperatures)

    chance = None if meaning is None or meaning.says_nothing else round(meaning.chance, 6)
    results = [_as_json(count) for count in counts] or [
        {"knn": None, "k": k, "temperature": temperature, "interval": None}
        for k in ks
        for temperature in temperatures
    ]
    return {
        "run": str(run),
        "step": source.step,
        **(results[0] if len(results) == 1 else {"results": results}),
        "chance": chance,
        "images": {"train": images[0], "test": images[1]},
        "classes": len(queries.shards.classes) or None,
        "source": source.facts,
    }


def _show(found: dict[str, Any]) -> None:
    """Print the accuracies for a person."""
    for one in found.get("results", [found]):
        what = f"(k = {one['k']}, temperature {one['temperature']:g})"
        if one["knn"] is None:
            show(f"kNN not measured {what}: see the warning above")
            continue
        low, high = one["interval"]
        show(f"kNN {one['knn']:.2%} ({low:.2%} to {high:.2%})  {what}")
    chance = f", chance {found['chance']:.1%}" if found["chance"] is not None else ""
    images = found["images"]
    classes = f", {found['classes']} classes" if found["classes"] else ""
    show(
        f"{images['test']:,} test images among {images['train']:,}{classes}{chance}, "
        f"step {found['step']} of {found['run']}"
    )


def _drop(text: str) -> None:
    """The other ranks have the same to say."""


def _count(
    stored: Sequence[StoredFeatures],
    world: World,
    ks: Sequence[int],
    temperatures: Sequence[float],
) -> tuple[list[KnnCount], list[int]]:
    """The outcome of every pair, and the images of both sets that decode."""
    with ExitStack() as stack:
        parts = []
        for one in stored:
            parts.append(one.rows(memory_bytes=setup.half_of_free_memory()))
            stack.callback(parts[-1].rows.close)
        sizes = torch.tensor([[len(part.rows) for part in parts]])
        images = gather_rows(sizes, world.device).sum(0).tolist()
        with progress_on(world, "searching") as progress:
            counts = shared_knn_sweep(
                *parts,
                device=world.device,
                ks=ks,
                temperatures=temperatures,
                progress=progress,
            )
        return counts, images


def _as_json(count: KnnCount) -> dict[str, Any]:
    """An accuracy with its interval of 95 %."""
    interval = wilson(count.right, count.queries)
    return {
        "knn": round(count.accuracy, 6),
        "k": count.k,
        "temperature": count.temperature,
        "interval": [round(bound, 6) for bound in interval],
    }
