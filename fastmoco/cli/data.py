"""`fastmoco data ...`: make, index and inspect shards. Thin wrappers with a progress bar."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import Positional

from fastmoco.errors import EXIT_REFUSED, one_line, say
from fastmoco_pipelines.spec import CacheSpec, ViewSpec, moco_v3_views

CACHE = CacheSpec()
"""The default cache of shards from a server."""
PROGRESS_SECONDS = 60.0
"""Between two lines about progress in a log."""


@dataclass(frozen=True, kw_only=True)
class ViewsArguments:
    """Draw a grid of images and their views, made by the pipeline that training uses."""

    shards: Positional[str]
    """A path, glob, brace pattern or folder."""
    out: Path = Path("views.png")
    """The picture."""
    rows: int = 8
    """Rows of the picture; each shows two images, or one where there are more than three views."""
    seed: int = 0
    """Seed of the choice of images and of the draws."""
    parameters: bool = True
    """Print the drawn parameters next to each row: crop, jitter and its order,
    grayscale, blur, solarize, flip."""
    recipe: str | None = None
    """Show this recipe's views instead of MoCo v3's pair at 224 pixels."""
    view1: ViewSpec
    """The first view; its fields override the recipe's."""
    view2: ViewSpec
    """The second view."""
    more_views: tuple[ViewSpec, ...] = ()
    """Further groups of views of the recipe."""


def pack(
    src: Positional[Path],
    out: Positional[Path],
    *,
    prefix: str = "train",
    max_side: int | None = None,
    quality: int = 92,
    shard_size: int = 256,
    seed: int = 0,
    overwrite: bool = False,
) -> int:
    """Pack a folder of images into shuffled WebDataset shards, each with an index, and a manifest.

    Args:
        src: Folder of class folders, whose names become the labels, or of images without labels.
        out: Folder for the shards.
        prefix: Shards are named PREFIX-000000.tar and so on.
        max_side: Shrink images whose longer side exceeds this many pixels. Decoding takes most of
            the time of loading; 512 is a good value for photographs and views of 224 pixels.
        quality: JPEG quality of images that are shrunk.
        shard_size: Largest size of a shard, in MB.
        seed: Seed of the shuffle.
        overwrite: Replace shards of the same prefix.
    """
    from fastmoco_pipelines import pack_folder

    with one_line(EXIT_REFUSED, ValueError, OSError):
        with progress_bar("packing") as advance:
            report = pack_folder(
                src,
                out,
                prefix=prefix,
                max_side=max_side,
                quality=quality,
                shard_size_mb=shard_size,
                seed=seed,
                overwrite=overwrite,
                progress=advance,
            )
        for name, reason in report.skipped[:20]:
            print(f"skipped {name}: {reason}")
        if len(report.skipped) > 20:
            print(f"... and {len(report.skipped) - 20} more skipped files")
        classes = f"{len(report.classes)} classes" if report.classes else "no labels"
        size = report.total_bytes / 1e6
        print(
            f"{report.samples} images, {classes}, {len(report.shards)} shards, {size:.1f} MB, "
            f"{len(report.skipped)} skipped"
        )
        print(f"shards: {report.pattern}")
    return 0


def index(
    shards: Positional[str],
    *,
    labels: Literal["auto", "cls", "json", "txt", "folder", "none"] = "auto",
    label_field: str | None = None,
    keys: Literal["first-dot", "last-dot"] = "first-dot",
    salvage: bool = False,
    json: bool = False,
    out: Path | None = None,
    cache: Annotated[CacheSpec, tyro.conf.arg(name="")] = CACHE,
) -> int:
    """Write the index next to existing shards of any origin.

    Their members are KEY.jpg, .jpeg, .png or .webp and KEY.cls, .json or .txt. Class names are
    numbered in sorted order over all given shards and stored in manifest.json.

    Args:
        shards: A path, glob, brace pattern or folder; or URLs, with --out.
        labels: Members that contain the labels, numbers or class names; auto: the first of cls,
            json and txt that the set has; folder: names of the folders inside the tars.
        label_field: Field of the .json that contains the label (default: label); selects json.
        keys: Where the key of a member ends: at the first dot of its file name, or at the last one,
            for names with dots of their own, such as dates.
        salvage: Index the readable samples of damaged tars, and list every lost range of bytes.
        json: Also write every index as JSON (x.tar.index.json), for other programs.
        out: For shards on a server: folder for the indexes, which you then copy next to the shards.
        cache: Where shards of a server are kept.
    """
    from fastmoco_pipelines import index_shards
    from fastmoco_pipelines.formats.labels import LabelRule

    with one_line(EXIT_REFUSED, ValueError, OSError):
        if label_field is not None and labels not in ("auto", "json"):
            raise ValueError(
                f"labels={labels!r}: label_field={label_field!r} is a field of .json members"
            )
        source = labels if label_field is None else "json"
        with progress_bar("indexing") as advance:
            rule = LabelRule(source=source, field=label_field or "label")
            report = index_shards(
                shards,
                progress=advance,
                rule=rule,
                salvage=salvage,
                json=json,
                out=out,
                cache=cache,
                keys=keys,
            )

        # Summary.
        print(
            f"{report.samples} images in {report.shards} shards indexed, "
            f"{len(report.skipped)} members skipped"
        )
        named = f", {len(report.classes)} class names" if report.classes else ""
        folders = report.labels == "folder"
        labelled = str(report.labelled)
        if report.labelled < report.samples:
            labelled += f" of {report.samples}"
        found = (
            f"labels of {labelled} from {'folders' if folders else f'.{report.labels}'}{named}"
            if report.labels
            else "no labels"
        )
        print(found + (f" ({report.note})" if report.note else ""))
        for warning in report.warnings:
            print(f"warning: {warning}")

        # What is missing.
        for tar, member, reason in report.skipped[:20]:
            print(f"skipped {tar}: {member}: {reason}")
        if len(report.skipped) > 20:
            print(f"... and {len(report.skipped) - 20} more skipped members, listed in the indexes")
        for part in report.lost:
            cut = f", in {part.member}" if part.member else ""
            print(
                f"lost {part.shard}: {part.size} bytes from byte {part.offset} on{cut}: "
                f"{part.reason}"
            )
        if report.lost:
            print("the indexes record the lost bytes, and training skips them")
        for tar, count in report.gone:
            print(
                f"lost {tar}: {count} samples of an older index or the manifest "
                "are not found any more"
            )
        for folder, url in report.uploads.items():
            print(f"copy the files in {folder} to {url}")
    return 0


def views(args: list[str]) -> int:
    """Draw pairs of augmented views, made by the real pipeline."""
    from fastmoco.recipes import get_recipe
    from fastmoco_pipelines.inspecting.preview import save_view_grid

    with one_line(EXIT_REFUSED, ValueError, OSError):
        view1, view2 = moco_v3_views()
        more: tuple[ViewSpec, ...] = ()
        words = [part for word in args for part in word.split("=", 1)]
        if "--recipe" in words[:-1]:
            data = get_recipe(words[words.index("--recipe") + 1]).data
            view1, view2, *rest = data.views
            more = tuple(rest)
        missing: Any = tyro.MISSING
        default = ViewsArguments(shards=missing, view1=view1, view2=view2, more_views=more)
        options = tyro.cli(ViewsArguments, prog="fastmoco data views", args=args, default=default)
        path = save_view_grid(
            options.shards,
            (options.view1, options.view2, *options.more_views),
            options.out,
            rows=options.rows,
            seed=options.seed,
            parameters=options.parameters,
        )
        print(f"wrote {path}")
    return 0


def sample(name: Positional[Literal["digits"]], out: Positional[Path], *, seed: int = 0) -> int:
    """Write a small real data set that a library contains: the 8x8 handwritten digits of
    scikit-learn.

    Args:
        name: Name of the set.
        out: Folder for the shards train-*.tar and test-*.tar.
        seed: Seed of the split and of the shuffle.
    """
    del name  # there is one
    from fastmoco_pipelines import pack_digits

    with one_line(EXIT_REFUSED, ValueError, OSError):
        train, test = pack_digits(out, seed=seed)
        print(f"train: {train}\ntest:  {test}")
    return 0


@contextmanager
def progress_bar(what: str, unit: str = "") -> Iterator[Callable[[int, int], None]]:
    """A progress bar on a terminal, a line a minute elsewhere. `unit="bytes"` shows amounts in bytes
    and the speed."""
    from rich.console import Console
    from rich.progress import (
        DownloadColumn,
        Progress,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    console = Console(stderr=True)
    if not console.is_terminal:
        yield ProgressLines(what)
        return
    columns = (
        *Progress.get_default_columns()[:2],
        DownloadColumn(),
        TransferSpeedColumn(),
    )
    shown = (*columns, TimeRemainingColumn()) if unit == "bytes" else Progress.get_default_columns()
    with Progress(*shown, console=console) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


class ProgressLines:
    """Progress for a log: every minute how much is done, and the time that is left at the speed so
    far. Called with (done, total), by one thread at a time."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._began: tuple[float, int] | None = None
        self._next = 0.0

    def __call__(self, done: int, total: int) -> None:
        """Print a line if it is time for one."""
        now = time.monotonic()
        if self._began is None:  # what came before, an earlier check did
            self._began = (now, done)
            self._next = now + PROGRESS_SECONDS
        if now < self._next or done >= total:
            return
        self._next = now + PROGRESS_SECONDS
        start, before = self._began
        seconds = (now - start) * (total - done) / max(1, done - before)
        left = timedelta(seconds=round(seconds)) if done > before else "unknown time"
        say(f"{self._what}: {100 * done / total:.1f} % done, {left} left")
