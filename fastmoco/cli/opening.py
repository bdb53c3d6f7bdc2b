"""What is printed before the slow imports of a run, and the command that fits given images. Imports
neither torch nor DALI."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

from fastmoco.config import Config
from fastmoco.errors import LAUNCHER, say
from fastmoco_pipelines.text import redact

LOOKED_AT = 64
"""Images whose size is read."""


def announce(config: Config) -> None:
    """Print which images a run opens, at once: the imports take seconds. No worker of `--gpus`
    prints it: its launcher has."""
    if LAUNCHER in os.environ:
        return
    data = config.data
    what = "synthetic images" if data.synthetic else redact(data.images or data.shards or "no data")
    say_first(f"{config.recipe}: importing torch, then opening {what}")


def say_first(text: str) -> None:
    """Print a line on standard error, of rank 0 alone, before the processes know each other."""
    variables = ("RANK", "SLURM_PROCID") if "SLURM_STEP_ID" in os.environ else ("RANK",)
    rank = next(filter(None, map(os.environ.get, variables)), "0")
    if rank.strip() == "0":  # one that is no number is refused later
        say(text)


def suggestion(args: Sequence[str]) -> str | None:
    """The whole command for arguments that name images but no recipe; None if they name none, or
    the images cannot be read."""
    given: dict[str, str] = {}
    for name, value in zip(args, [*args[1:], ""], strict=False):
        key, equals, inline = name.partition("=")
        given[key.replace("_", "-")] = inline if equals else value
    for option in ("--data.images", "--data.shards"):
        source = given.get(option)
        if source:
            with contextlib.suppress(ValueError, OSError, RuntimeError):
                if option == "--data.images" or _is_folder_of_images(source):
                    return _for_folder(source)
                from fastmoco.cli.data import next_command

                return next_command(source)
    return None


def _is_folder_of_images(source: str) -> bool:
    from fastmoco_pipelines.making.folder_cache import holds_images_alone

    return holds_images_alone(Path(source))


def _for_folder(folder: str) -> str:
    """The command for a folder of images, by their number and the sizes of some of them."""
    from fastmoco.cli.data import suggested
    from fastmoco_pipelines.files.small import read_small
    from fastmoco_pipelines.formats.images import read_header
    from fastmoco_pipelines.making.sources import find_sources

    found = find_sources(Path(folder), follow_links=False)
    sources, classes = found.images, found.classes
    sides = []
    for source in sources[:: max(1, len(sources) // LOOKED_AT)]:
        with contextlib.suppress(ValueError, OSError):
            header = read_header(read_small(source.path))
            sides.append(max(header.height, header.width))
    side = sorted(sides)[len(sides) // 2] if sides else None
    words = ["--data.images", folder, *(["--knn.holdout", "10%"] if classes else [])]
    return suggested(len(sources), side).command(*words)
