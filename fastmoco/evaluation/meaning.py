"""What a kNN accuracy can mean, from the labels of both sets alone, before anything is measured.

An accuracy without a comparison is easily taken for success: 10 % of 10 classes is nothing, and
100 % of one class too.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from fastmoco_pipelines.text import escaped

FEW = 100
"""Test images below which the size of a step of the accuracy is reported."""
NAMES_SHOWN = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Meaning:
    """What the labels of two sets say about an accuracy between them.

    Attributes:
        chance: accuracy of always answering the most frequent class of the test images.
        says_nothing: every encoder gets the same accuracy.
        notes: what a reader of the accuracy must know, one sentence each.
    """

    chance: float
    says_nothing: bool
    notes: tuple[str, ...]


def meaning(
    bank: NDArray[np.int64],
    queries: NDArray[np.int64],
    *,
    k: int,
    shared: int = 0,
    classes: tuple[str, ...] = (),
) -> Meaning:
    """Judge two sets by their labels.

    Args:
        bank: labels of the images that vote, at least one.
        queries: labels of the test images, at least one.
        k: neighbours that vote.
        shared: test images whose bytes are in the bank too.
        classes: names of the classes by label, if they are known.
    """
    known, counts = np.unique(queries, return_counts=True)
    in_bank = np.unique(bank)
    chance = float(counts.max() / len(queries))
    notes = []
    if len(in_bank) == 1:
        return Meaning(
            chance=chance,
            says_nothing=True,
            notes=(
                f"all {len(bank)} images of the bank have one class "
                f"({_names(in_bank, classes)}): every encoder gets the same accuracy, so none is "
                "reported; pack a folder for each class",
            ),
        )
    if len(known) == 1:
        notes.append(
            f"all {len(queries)} test images have one class ({_names(known, classes)}): always "
            "answering it gives 100 %"
        )
    absent = ~np.isin(queries, in_bank)
    if absent.any():
        missing = _names(np.unique(queries[absent]), classes)
        notes.append(
            f"{int(absent.sum())} of {len(queries)} test images ({absent.mean():.0%}) have a class "
            f"that the bank lacks ({missing}) and cannot be right"
        )
    if shared:
        notes.append(
            f"{shared} of {len(queries)} test images ({shared / len(queries):.0%}) are in the bank "
            "too, with the same bytes: they find themselves, so the accuracy says little about "
            "other images"
        )
    if k > len(bank):
        notes.append(f"k={k}, but the bank has {len(bank)} images: all of them vote")
    if len(bank) < 2 * len(in_bank):
        notes.append(
            f"the bank has {len(bank)} images of {len(in_bank)} classes, fewer than two of a class"
        )
    if len(queries) < FEW:
        notes.append(
            f"{len(queries)} test {'image' if len(queries) == 1 else 'images'}: one is "
            f"{1 / len(queries):.0%} of the accuracy"
        )
    return Meaning(chance=chance, says_nothing=False, notes=tuple(notes))


def _names(labels: NDArray[np.int64], classes: tuple[str, ...]) -> str:
    """The first few classes, for people."""
    shown = [
        escaped(classes[label]) if 0 <= label < len(classes) else f"class {label}"
        for label in islice(labels.tolist(), NAMES_SHOWN)
    ]
    return ", ".join(shown) + (", ..." if len(labels) > NAMES_SHOWN else "")
