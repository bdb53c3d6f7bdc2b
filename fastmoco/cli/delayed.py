"""Commands whose code imports torch: their arguments are here, so that a help page need not."""

from __future__ import annotations

from pathlib import Path

from tyro.conf import Positional

from fastmoco.cli.collection import collection_paused
from fastmoco.errors import EXIT_REFUSED, one_line, say
from fastmoco_pipelines.text import redact


def eval_knn(
    run: Positional[Path],
    *,
    train: str,
    test: str,
    k: int = 20,
    temperature: float = 0.07,
    best: bool = False,
) -> int:
    """kNN accuracy of a run's encoder (k = 20, temperature 0.07, cosine) on labelled shards.

    Args:
        run: Folder of the run, as given to `fastmoco train --out`, or of one checkpoint.
        train: Labelled shards for the neighbours, or a folder with one folder of images per class.
        test: Labelled shards to classify, or a folder with one folder of images per class.
        k: Number of neighbours.
        temperature: The weight of a neighbour is exp(cosine / temperature).
        best: The checkpoint with the highest kNN accuracy, in place of the newest.
    """
    say(f"kNN of {run}: importing torch, then opening {redact(train)} and {redact(test)}")
    with collection_paused():
        from fastmoco.cli.train import eval_knn as measure

    return measure(run, train, test, k=k, temperature=temperature, best=best)


def quickstart(out: Path = Path("quickstart")) -> int:
    """Pack handwritten digits, train a tiny ViT on them for a few minutes, and report its kNN
    accuracy.

    Args:
        out: Folder for shards, run and pictures.
    """
    with collection_paused():
        from fastmoco.cli.quickstart import quickstart as run

    with one_line(EXIT_REFUSED, ValueError, OSError):
        return run(out)
