"""Runs of the trainer that evaluate an encoder by labels: the official linear protocol and
fine-tuning."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from fastmoco.cli.collection import collection_paused
from fastmoco.cli.images import knn_sets
from fastmoco.cli.output import is_first, training_beside_result
from fastmoco.errors import EXIT_FINISHED, say, show

if TYPE_CHECKING:
    from fastmoco.config import Config
    from fastmoco.models.weights.foreign import Normalised
    from fastmoco.training.encoder_source import EncoderSource


class Labelled(NamedTuple):
    """An encoder, and the shards of two labelled sets."""

    source: EncoderSource
    train: str
    test: str


def read_labelled(
    run: Path,
    train: str,
    test: str,
    *,
    which: Literal["base", "momentum"] | None,
    best: bool,
    heads: int | None,
    normalised: Normalised | None,
    needed_by: str,
) -> Labelled:
    """Read the encoder and find both sets, before the run has its process group: every process reads
    the encoder and packs folders of images, in turn.

    Args:
        run: as of `load_source`.
        train: labelled shards, or a folder of images.
        test: labelled shards, or a folder of images.
        which: the encoder of a run.
        best: the checkpoint with the highest kNN accuracy.
        heads: attention heads, for a file of a ViT that does not show them.
        normalised: how images were normalised, for a file that does not say it.
        needed_by: the evaluation, for errors.

    Raises:
        RunError, ValueError: as of `load_source` and `knn_sets`.
    """
    with collection_paused():
        from fastmoco.training.encoder_source import load_source
        from fastmoco.training.images import max_side_for

    source = load_source(run, "cpu", which=which, best=best, heads=heads, normalised=normalised)
    if is_first():
        for note in source.notes:
            say(note)
    side = max_side_for(source.image.size, source.config)
    return Labelled(source, *knn_sets(train, test, max_side=side, needed_by=needed_by))


def run_to_result(config: Config, out: Path) -> tuple[int, bool]:
    """Train, with what the training shows on standard error.

    Returns:
        The exit code, and whether this process reports the result.
    """
    with collection_paused():
        from fastmoco.cli.train import train

    with training_beside_result():
        code = train(config, out, hints=False)
    return code, code == EXIT_FINISHED and is_first()


def show_accuracies(found: dict[str, Any], what: str) -> None:
    """Print both accuracies of a classifier."""
    parts = []
    for name in ("top1", "top5"):
        low, high = found[f"{name}_interval"]
        parts.append(f"{name} {found[name]:.2%} ({low:.2%} to {high:.2%})")
    show(f"{'  '.join(parts)}  {what}")
