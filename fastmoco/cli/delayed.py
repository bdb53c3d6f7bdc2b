"""Commands whose code imports torch: their arguments are here, so that a help page need not."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from fastmoco.cli.collection import collection_paused
from fastmoco.cli.opening import say_first
from fastmoco.cli.output import run_logged
from fastmoco.errors import EXIT_REFUSED, one_line
from fastmoco.errors.log import Style
from fastmoco_pipelines.text import redact


def eval_knn(
    run: Positional[Path],
    *,
    train: str,
    test: str,
    k: tuple[int, ...] = (20,),
    temperature: tuple[float, ...] = (0.07,),
    which: Literal["base", "momentum"] | None = None,
    best: bool = False,
    heads: int | None = None,
    mean: tuple[float, ...] = (),
    std: tuple[float, ...] = (),
    out: Path | None = None,
    json: bool = False,
) -> int:
    """kNN accuracy of an encoder (k = 20, temperature 0.07, cosine) on labelled shards.

    With an interval of 95 % (Wilson) about each accuracy. A command that was interrupted continues
    where it was; under torchrun the processes share the images.

    Args:
        run: Folder of the run, as given to `fastmoco train --out`, or of one checkpoint; or a file
            of weights.
        train: Labelled shards for the neighbours, or a folder with one folder of images per class.
        test: Labelled shards to classify, or a folder with one folder of images per class.
        k: Numbers of neighbours; each is combined with each temperature, in one search.
        temperature: The weight of a neighbour is exp(cosine / temperature).
        which: The trained encoder (base), or its moving average (default: the one that the
            method evaluates: for DINO, EsViT and ExtreMA the average, else the trained one).
        best: The checkpoint with the highest kNN accuracy, in place of the newest.
        heads: Attention heads, for a file of a ViT that does not show them.
        mean: Of red, green, blue by which images were normalised, for a file that does not say.
        std: The standard deviations.
        out: A file for the JSON too.
        json: Print JSON instead of text.
    """
    say_first(f"kNN of {run}: importing torch, then opening {redact(train)} and {redact(test)}")
    with collection_paused():
        from fastmoco.cli.images import normalisation
        from fastmoco.cli.knn import eval_knn as measure

    with one_line(EXIT_REFUSED, ValueError):
        normalised = normalisation(mean, std)
    return measure(
        run,
        train,
        test,
        ks=k,
        temperatures=temperature,
        which=which,
        best=best,
        heads=heads,
        normalised=normalised,
        out=out,
        as_json=json,
    )


def quickstart(out: Path = Path("quickstart"), *, log: Style = "auto") -> int:
    """Pack handwritten digits, train a tiny ViT on them for a few minutes, and report its kNN
    accuracy.

    Args:
        out: Folder for shards, run and pictures.
        log: How progress is shown; json is for programs.
    """
    with collection_paused():
        from fastmoco.cli.quickstart import quickstart as run

    def call() -> int:
        with one_line(EXIT_REFUSED, ValueError, OSError):
            return run(out)

    return run_logged(log, call)
