"""Folders of images where shards are needed: packed once, with a progress bar."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import TYPE_CHECKING

from fastmoco.cli.data import progress_bar
from fastmoco.errors import RunError, say
from fastmoco_pipelines.text import counted, spoken

if TYPE_CHECKING:
    from fastmoco_pipelines.making.folder_cache import FolderState, PackedFolder, PackOptions

SHOWN = 5
"""Files left out that are named."""


def set_of_folder(shards: str, *, max_side: int | None = None) -> str:
    """The shards that an argument of `fastmoco data` names: itself, or for a folder of images
    without tars those that are made of it in the user's cache.

    Args:
        shards: as given by the user.
        max_side: as of `pack_folder`.

    Raises:
        ValueError: if no image can be used.
        RunError: if the set cannot be written.
    """
    from fastmoco_pipelines.files import user_cache
    from fastmoco_pipelines.making.folder_cache import PackOptions, holds_images_alone

    if not holds_images_alone(Path(shards)):
        return shards
    root = user_cache() / "packed"
    return packed(Path(shards), root, PackOptions(max_side=max_side), named="folder").pattern


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
