"""`fastmoco data ...`: make, index and inspect shards. Thin wrappers with a progress bar."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import Positional

from fastmoco.cli.mistakes import Wording, parse, worded
from fastmoco.cli.options import describe
from fastmoco.cli.pages import HELP, of_config, show_page
from fastmoco.config.limits import require_limits
from fastmoco.errors import EXIT_REFUSED, one_line, say, show
from fastmoco.recipes.suggest import Suggestion, suggest
from fastmoco_pipelines.spec import CacheSpec, ViewSpec, moco_v3_views
from fastmoco_pipelines.text import counted, escaped

CACHE = CacheSpec()
"""The default cache of shards from a server."""
PROGRESS_SECONDS = 60.0
"""Between two lines about progress in a log."""
FIRST_SECONDS = 20.0
"""Until the first of such lines, where their intervals grow."""
LONGEST_SECONDS = 600.0
"""To which they grow, each one being twice the last."""


@dataclass(frozen=True, kw_only=True)
class ViewsArguments:
    """Draw a grid of images and their views, made by the pipeline that training uses."""

    shards: Positional[str]
    """A path, glob, brace pattern or folder; or a folder of images, which is packed in the user's
    cache first."""
    out: Path = Path("views.png")
    """The picture."""
    rows: int = 8
    """Rows of the picture; each shows two images, or one where there are more than three views."""
    seed: int = 0
    """Seed of the choice of images and of the draws."""
    parameters: bool = True
    """Print the files and the drawn parameters next to each row: crop, jitter
    and its order, grayscale, blur, solarize, flip."""
    recipe: str | None = None
    """Show this recipe's views instead of MoCo v3's pair at 224 pixels."""
    view1: ViewSpec
    """The first view; its fields override the recipe's."""
    view2: ViewSpec
    """The second view."""
    more_views: tuple[ViewSpec, ...] = ()
    """Further groups of views of the recipe."""

    def __post_init__(self) -> None:
        require_limits(self)


def pack(
    src: Positional[Path],
    out: Positional[Path],
    *,
    prefix: str = "train",
    max_side: int | None = None,
    quality: int = 92,
    shard_size: int = 256,
    seed: int = 0,
    follow_links: bool = False,
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
        follow_links: Read the files and folders that symbolic links point to; otherwise links are
            left out and counted.
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
                follow_links=follow_links,
                overwrite=overwrite,
                progress=advance,
                tell=say,
            )
        for name, reason in report.skipped[:20]:
            show(f"skipped {name}: {reason}")
        if len(report.skipped) > 20:
            print(f"... and {counted(len(report.skipped) - 20, 'more skipped file')}")
        classes = counted(len(report.classes), "class") if report.classes else "no labels"
        size = report.total_bytes / 1e6
        print(
            f"{counted(report.samples, 'image')}, {classes}, "
            f"{counted(len(report.shards), 'shard')}, {size:.1f} MB, "
            f"{len(report.skipped)} skipped"
        )
        show(f"shards: {report.pattern}")
        if prefix == "train":
            show(f"next: {next_command(report.pattern)}")
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
                tell=say,
                keys=keys,
            )

        # Summary.
        print(
            f"{counted(report.samples, 'image')} in {counted(report.shards, 'shard')} indexed, "
            f"{counted(len(report.skipped), 'member')} skipped"
        )
        named = f", {counted(len(report.classes), 'class name')}" if report.classes else ""
        folders = report.labels == "folder"
        labelled = str(report.labelled)
        if report.labelled < report.samples:
            labelled += f" of {report.samples}"
        found = (
            f"labels of {labelled} from {'folders' if folders else f'.{report.labels}'}{named}"
            if report.labels
            else "no labels"
        )
        show(found + (f" ({report.note})" if report.note else ""))
        for warning in report.warnings:
            show(f"warning: {warning}")

        # What is missing.
        for tar, member, reason in report.skipped[:20]:
            show(f"skipped {tar}: {member}: {reason}")
        if len(report.skipped) > 20:
            more = counted(len(report.skipped) - 20, "more skipped member")
            print(f"... and {more}, listed in the indexes")
        for part in report.lost:
            cut = f", in {part.member}" if part.member else ""
            show(
                f"lost {part.shard}: {counted(part.size, 'byte')} from byte {part.offset} on{cut}: "
                f"{part.reason}"
            )
        if report.lost:
            print("the indexes record the lost bytes, and training skips them")
        for tar, count in report.gone:
            show(
                f"lost {tar}: {counted(count, 'sample')} of an older index or the manifest "
                f"{'is' if count == 1 else 'are'} not found any more"
            )
        for folder, url in report.uploads.items():
            show(f"copy the files in {folder} to {url}")
    return 0


def views(args: list[str]) -> int:
    """Draw pairs of augmented views, made by the real pipeline."""
    from fastmoco.cli.images import set_of_folder
    from fastmoco.recipes import get_recipe
    from fastmoco_pipelines.inspecting.preview import save_view_grid
    from fastmoco_pipelines.making.folder_cache import max_side_of

    view1, view2 = moco_v3_views()
    more: tuple[ViewSpec, ...] = ()
    words = [part for word in args for part in word.split("=", 1)]
    if "--recipe" in words[:-1]:
        with one_line(EXIT_REFUSED, ValueError):
            data = get_recipe(words[words.index("--recipe") + 1]).data
        view1, view2, *rest = data.views
        more = tuple(rest)
    missing: Any = tyro.MISSING
    default = ViewsArguments(shards=missing, view1=view1, view2=view2, more_views=more)
    if set(args) & set(HELP):
        whole = "--help-all" in args
        show_page(of_config("data views", describe(ViewsArguments, default), whole=whole))
        return 0
    options = parse(ViewsArguments, "data views", args, default=default)
    wording = Wording(describe(ViewsArguments, default), args)
    with worded(wording), one_line(EXIT_REFUSED, ValueError, OSError):
        tell_of_decoder()
        drawn = (options.view1, options.view2, *options.more_views)
        path = save_view_grid(
            set_of_folder(options.shards, max_side=max_side_of(options.view1.size)),
            drawn,
            options.out,
            rows=options.rows,
            seed=options.seed,
            parameters=options.parameters,
            tell=print,
        )
        show(f"wrote {path}")
    return 0


def sample(name: Positional[Literal["digits"]], out: Positional[Path], *, seed: int = 0) -> int:
    """Write a small real data set that a library contains: the 8x8 handwritten digits of
    scikit-learn.

    Args:
        name: Name of the set: digits.
        out: Folder for the shards train-*.tar and test-*.tar.
        seed: Seed of the split and of the shuffle.
    """
    del name  # there is one
    from fastmoco_pipelines import pack_digits

    with one_line(EXIT_REFUSED, ValueError, OSError):
        train, test = pack_digits(out, seed=seed)
        show(f"train: {train}")
        show(f"test:  {test}")
    return 0


def next_command(pattern: str) -> str:
    """The command that trains on shards, with the recipe that fits this machine and them."""
    from fastmoco_pipelines.inspecting.stats import measure_shards

    stats = measure_shards(pattern)
    rows = stats.quantiles()
    side = max(rows["width (pixels)"]["median"], rows["height (pixels)"]["median"])
    return suggested(len(stats), side).command("--data.shards", pattern)


def suggested(images: int, side: float | None) -> Suggestion:
    """The recipe for this machine and a set (`suggest`)."""
    gpus = visible_gpus()
    device: Literal["cpu", "gpu"] = "gpu" if gpus else "cpu"
    return suggest(device, images=images, side=side, gpus=max(gpus, 1))


def visible_gpus() -> int:
    """NVIDIA GPUs that this process may use, without the import of torch."""
    present = len(list(Path("/proc/driver/nvidia/gpus").glob("*")))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return present
    return min(
        present, len([name for name in visible.split(",") if name.strip() not in ("", "-1")])
    )


def tell_of_decoder() -> None:
    """Say it if Pillow decodes, because DALI is not installed."""
    from fastmoco_pipelines.views.runtime import WITHOUT_DALI, has_dali

    if not has_dali():
        say(WITHOUT_DALI)


@contextmanager
def progress_bar(
    what: str, unit: str = "", *, growing: bool = False
) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on a terminal, a line a minute elsewhere, or lines at growing intervals.
    `unit="bytes"` shows amounts in bytes and the speed. The bar of work that turned out to be done
    already is removed at the end."""
    from rich.markup import escape
    from rich.progress import (
        DownloadColumn,
        Progress,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    from fastmoco.errors.terminal import Terminal

    console = Terminal(sys.stderr)
    if not console.is_terminal:
        yield ProgressLines(what, growing=growing)
        return
    columns = (
        *Progress.get_default_columns()[:2],
        DownloadColumn(),
        TransferSpeedColumn(),
    )
    shown = (*columns, TimeRemainingColumn()) if unit == "bytes" else Progress.get_default_columns()
    with Progress(*shown, console=console) as bar:
        task = bar.add_task(escape(escaped(what)), total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
        bar.live.transient = bar.tasks[0].total is None


class ProgressLines:
    """Progress for a log: every minute, or at growing intervals, how much is done, and the time that
    is left at the speed so far. Called with (done, total), by one thread at a time."""

    def __init__(self, what: str, *, growing: bool = False) -> None:
        self._what = what
        self._interval = FIRST_SECONDS if growing else PROGRESS_SECONDS
        self._growing = growing
        self._began: tuple[float, int] | None = None
        self._next = 0.0

    def __call__(self, done: int, total: int) -> None:
        """Print a line if it is time for one."""
        now = time.monotonic()
        if self._began is None:  # what came before, an earlier check did
            self._began = (now, done)
            self._next = now + self._interval
        if now < self._next or done >= total:
            return
        if self._growing:
            self._interval = min(2 * self._interval, LONGEST_SECONDS)
        self._next = now + self._interval
        start, before = self._began
        seconds = (now - start) * (total - done) / max(1, done - before)
        left = timedelta(seconds=round(seconds)) if done > before else "unknown time"
        say(f"{self._what}: {100 * done / total:.1f} % done, {left} left")
