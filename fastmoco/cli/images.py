"""Folders of images where shards are needed: packed once, with a progress bar."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from fastmoco.cli.data import progress_bar
from fastmoco.errors import RunError, say
from fastmoco_pipelines.text import counted, spoken

if TYPE_CHECKING:
    from fastmoco.distributed.mesh import World
    from fastmoco.models.weights.foreign import Normalised
    from fastmoco_pipelines.making.folder_cache import FolderState, PackedFolder, PackOptions

SHOWN = 5
"""Files left out that are named."""


def set_of_folder(shards: str, *, max_side: int | None = None, named: str = "shards") -> str:
    """The shards that an argument of a command names: itself, or for a folder of images
    without tars those that are made of it in the user's cache.

    Args:
        shards: as given by the user.
        max_side: as of `pack_folder`.
        named: the field that errors name.

    Raises:
        ValueError: if no image can be used.
        RunError: if the set cannot be written.
    """
    from fastmoco_pipelines.files.whole import user_cache
    from fastmoco_pipelines.making.folder_cache import PackOptions, holds_images_alone

    if not shards:  # as a path it would be the current folder
        raise ValueError(f"{named}='': is empty; give shards or a folder of images")
    if not holds_images_alone(Path(shards)):
        return shards
    root = user_cache() / "packed"
    return packed(Path(shards), root, PackOptions(max_side=max_side), named=named).pattern


def knn_sets(
    train: str, test: str, *, max_side: int | None, needed_by: str = "kNN"
) -> tuple[str, str]:
    """The shards of a kNN bank and of the images to classify, as of `set_of_folder`. The labels of a
    folder of images to classify are those of the bank. Errors name the evaluation that needs
    classes.

    Raises:
        ValueError: if no image can be used, or a class folder is none of the bank.
        RunError: if a set cannot be written.
    """
    from fastmoco_pipelines import ShardSet
    from fastmoco_pipelines.files.whole import user_cache
    from fastmoco_pipelines.making.folder_cache import (
        PackOptions,
        folder_state,
        holds_images_alone,
        of_field,
    )

    states = {}
    for name, given in (("train", train), ("test", test)):
        if given and holds_images_alone(Path(given)):
            try:
                states[name] = folder_state(Path(given))
            except ValueError as error:
                raise of_field(error, name) from error
            if not states[name].classes:
                raise ValueError(
                    f"{name}={given!r}: has no class folders, which {needed_by} needs: one folder of "
                    "images per class"
                )
    if not test:
        raise ValueError("test='': is empty; give labelled shards or a folder of images")
    if test == train or "test" not in states:
        bank = set_of_folder(train, max_side=max_side, named="train")
        return bank, bank if test == train else test

    # The classes of the bank, before anything is packed.
    if "train" in states:
        classes = states["train"].classes
    else:
        with closing(ShardSet.open(train)) as opened:
            classes = opened.classes
    state = states["test"]
    unknown = sorted(set(state.classes) - set(classes)) if classes else []
    if unknown:
        raise ValueError(
            f"test={test!r}: has classes that train={train!r} has not: {', '.join(unknown[:5])}; "
            "give it the same class folders"
        )
    options = PackOptions(max_side=max_side, classes=() if state.classes == classes else classes)
    root = user_cache() / "packed"
    bank = set_of_folder(train, max_side=max_side, named="train")
    return bank, packed(Path(test), root, options, named="test", state=state).pattern


def knn_sets_of_ranks(
    world: World, train: str, test: str, *, max_side: int | None, needed_by: str = "kNN"
) -> list[str]:
    """`knn_sets` on several ranks: rank 0 packs folders of images, and all get the shards."""
    from fastmoco.distributed.first_rank import first_rank_does

    def pack() -> str:
        return json.dumps(knn_sets(train, test, max_side=max_side, needed_by=needed_by))

    found: list[str] = json.loads(first_rank_does(world, "packed", pack))
    return found


@contextmanager
def of_options(given: Mapping[str, str]) -> Iterator[None]:
    """Name the option that the user gave in an error about `shards`.

    Args:
        given: shards by the names of the options that give them.
    """
    try:
        yield
    except ValueError as error:
        for name, shards in given.items():
            if str(error).startswith(f"shards={shards!r}"):
                raise ValueError(name + str(error).removeprefix("shards")) from error
        raise


def packed(
    images: Path,
    root: Path,
    options: PackOptions,
    *,
    named: str,
    state: FolderState | None = None,
) -> PackedFolder:
    """Pack a folder unless it is packed, and report both.

    Raises:
        ValueError: if no image can be used.
        RunError: if the set cannot be written.
    """
    from fastmoco_pipelines.making.folder_cache import of_field, pack_once

    def begin(found: FolderState, out: Path) -> None:
        shrunk = (
            f"; longer sides are shrunk to {options.max_side} pixels" if options.max_side else ""
        )
        say(
            f"packing {counted(found.images, 'image')} of {images} "
            f"({_size(found.total_bytes)}) into {out}, once{shrunk}"
        )

    def wait(out: Path) -> None:
        say(f"waiting for another process, which packs {images} into {out}")

    try:
        with progress_bar(f"packing {images}") as advance:
            done = pack_once(
                images,
                root,
                options,
                state=state,
                begin=begin,
                wait=wait,
                progress=advance,
                tell=say,
            )
    except OSError as error:
        cure = "free space, or choose another place" if error.errno == errno.ENOSPC else "fix it"
        raise RunError(
            f"{named}={str(images)!r} cannot be packed into {root}: {error.strerror} "
            f"({error.filename or root}); {cure}"
        ) from error
    except ValueError as error:
        raise of_field(error, named) from error
    _report(done, images)
    return done


def _report(packed: PackedFolder, images: Path) -> None:
    """Print what was packed, or where it is."""
    held_out = f" and {packed.held_out} held out for kNN" if packed.held_out else ""
    if not packed.seconds:
        say(f"images of {images}: {packed.samples}{held_out} in {packed.folder}, packed before")
        return
    count = len(packed.skipped)
    files = f"; {counted(count, 'file')} left out" if count else ""
    say(
        f"packed {counted(packed.samples, 'image')}{held_out}, {_size(packed.total_bytes)} in "
        f"{spoken(packed.seconds)}{files}"
    )
    for name, reason in packed.skipped[:SHOWN]:
        say(f"left out {name}: {reason}")
    if len(packed.skipped) > SHOWN:
        say(f"... and {len(packed.skipped) - SHOWN} more, in {packed.folder / 'manifest.json'}")


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def normalisation(mean: Sequence[float], std: Sequence[float]) -> Normalised | None:
    """How images were normalised, by the options; None if they do not say it.

    Raises:
        ValueError: unless both have three numbers, those of `std` positive.
    """
    if not mean and not std:
        return None
    for name, given in (("mean", mean), ("std", std)):
        if len(given) != 3 or not all(value > 0 or name == "mean" for value in given):
            more = " above 0" if name == "std" else ""
            words = " ".join(f"{value:g}" for value in given)
            raise ValueError(
                f"{name}={words!r}: must be three numbers{more}; give --mean and --std"
            )
    return (mean[0], mean[1], mean[2]), (std[0], std[1], std[2])
