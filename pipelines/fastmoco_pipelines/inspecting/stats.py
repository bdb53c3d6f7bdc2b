"""`measure_shards`: what a set of shards holds, from its indexes alone; and a picture of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fastmoco_pipelines.errors import ShardError
from fastmoco_pipelines.files.settings import without_settings_here
from fastmoco_pipelines.formats.index import read_index
from fastmoco_pipelines.formats.index_file import ShardIndex
from fastmoco_pipelines.formats.manifest import read_sets
from fastmoco_pipelines.sets.cached_files import open_cache
from fastmoco_pipelines.sets.patterns import is_remote
from fastmoco_pipelines.sets.remote_set import open_remote
from fastmoco_pipelines.sets.whole_tars import LocalTars, whole_names
from fastmoco_pipelines.spec import CacheSpec
from fastmoco_pipelines.stores.retries import Limits
from fastmoco_pipelines.text import redact

if TYPE_CHECKING:
    from matplotlib.axes import Axes

QUANTILES = {"smallest": 0.0, "5 %": 0.05, "median": 0.5, "95 %": 0.95, "largest": 1.0}
_KINDS = {"jpg": "JPEG", "jpeg": "JPEG", "png": "PNG", "webp": "WebP"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardStats:
    """Sizes, formats and classes of a set.

    Attributes:
        pattern: which shards; `shards`: how many; `tar_bytes`: their size.
        heights, widths: [n] int64, pixels, as in the header.
        sizes: [n] int64, bytes of each encoded image.
        kinds: images by format, "JPEG", "PNG" or "WebP", by the name in the tar.
        labels: [n] int64, -1 = none; `classes`: their names, empty where they have none.
        skipped: members that no sample uses.
    """

    pattern: str
    shards: int
    tar_bytes: int
    heights: NDArray[np.int64]
    widths: NDArray[np.int64]
    sizes: NDArray[np.int64]
    kinds: dict[str, int]
    labels: NDArray[np.int64]
    classes: tuple[str, ...]
    skipped: int

    def __len__(self) -> int:
        return len(self.sizes)

    @property
    def columns(self) -> dict[str, NDArray[Any]]:
        """What the table describes by quantiles, by name with unit."""
        return {
            "width (pixels)": self.widths,
            "height (pixels)": self.heights,
            "width / height": self.widths / self.heights,
            "megapixels": self.widths * self.heights / 1e6,
            "kilobytes": self.sizes / 1e3,
            "bits per pixel": 8 * self.sizes / (self.widths * self.heights),
        }

    def quantiles(self) -> dict[str, dict[str, float]]:
        """Quantiles and mean of every column."""
        return {
            name: {word: float(np.quantile(values, q)) for word, q in QUANTILES.items()}
            | {"mean": float(values.mean())}
            for name, values in self.columns.items()
        }

    def class_counts(self) -> list[tuple[str, int]]:
        """(class name or number, images), most frequent first; images without a label are left
        out."""
        counts = Counter(self.labels[self.labels >= 0].tolist())
        for label in range(len(self.classes)):
            counts.setdefault(label, 0)
        named = [
            (self.classes[i] if i < len(self.classes) else str(i), count)
            for i, count in counts.items()
        ]
        return sorted(named, key=lambda pair: (-pair[1], pair[0]))


def measure_shards(
    pattern: str, *, cache: CacheSpec | None = None, transfers: Limits | None = None
) -> ShardStats:
    """Read the indexes of the shards that `pattern` names.

    Args:
        pattern: as for `ShardSet.open`.
        cache: where indexes of shards of a server are kept; None: the default folder and size.
        transfers: times and tries of each transfer.

    Raises:
        ValueError: if the pattern names no shard.
        ShardError: if an index is missing, broken or stale; tars of a server are not compared with
            it. RemoteError, which is one, if a server fails.
    """
    if is_remote(pattern):
        remote = open_remote(pattern, open_cache(cache or CacheSpec()), transfers or Limits())
        indexes = [remote.load(shard).whole() for shard in range(len(remote.remotes))]
        classes = remote.classes
    else:
        tars = LocalTars(pattern)
        names = whole_names(tars)
        classes = _classes(tars.paths)
        indexes = [_index(path, names.get(path, path.name)) for path in tars.paths]

    def column(name: str) -> NDArray[np.int64]:
        return np.concatenate([np.array(index.columns[name], dtype=np.int64) for index in indexes])

    extensions = [
        extension.rpartition(".")[2].lower() for index in indexes for extension in index.extensions
    ]
    return ShardStats(
        pattern=redact(pattern),
        shards=len(indexes),
        tar_bytes=sum(index.tar_bytes for index in indexes),
        heights=np.maximum(column("height"), 1),
        widths=np.maximum(column("width"), 1),
        sizes=column("size"),
        kinds=dict(
            Counter(_KINDS.get(extension, extension) for extension in extensions).most_common()
        ),
        labels=column("label"),
        classes=classes,
        skipped=sum(len(index.skipped) for index in indexes),
    )


def draw_stats(stats: ShardStats, out: Path) -> Path:
    """Draw sizes, bytes, aspect ratios, formats and classes as one picture; the suffix of `out`
    chooses the format.

    Raises:
        ModuleNotFoundError: if matplotlib is not installed.
    """
    with without_settings_here():
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 7.5), layout="constrained")
    FigureCanvasAgg(figure)  # without a display
    axes: Any = figure.subplots(2, 3)
    _draw_sizes(axes[0, 0], stats)
    _draw_histogram(axes[0, 1], stats.sizes / 1e3, "kilobytes an image")
    _draw_histogram(axes[0, 2], stats.widths / stats.heights, "width / height")
    _draw_histogram(axes[1, 0], stats.columns["bits per pixel"], "bits per pixel")
    axes[1, 1].barh(list(stats.kinds), list(stats.kinds.values()), color="tab:blue")
    axes[1, 1].set_xlabel("images by format")
    _draw_classes(axes[1, 2], stats)
    figure.suptitle(
        f"{len(stats):,} images in {stats.shards} shards, {stats.tar_bytes / 1e9:.2f} GB"
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)
    return out


def _index(path: Path, name: str) -> ShardIndex:
    """The index beside a tar, which errors call `name`."""
    try:
        return read_index(path)
    except ShardError as error:
        raise ShardError(str(error).replace(path.name, name, 1)) from error


def _classes(paths: Sequence[Path]) -> tuple[str, ...]:
    names = {path.name for path in paths}
    for folder in sorted({path.parent for path in paths}):
        for entry in read_sets(folder).values():
            if names & {shard["name"] for shard in entry["shards"]}:
                return tuple(entry["classes"])
    return ()


def _draw_sizes(axes: Axes, stats: ShardStats) -> None:
    few = np.random.default_rng(0).permutation(len(stats))[:20_000]
    axes.scatter(
        stats.widths[few], stats.heights[few], s=4, alpha=0.3, color="tab:blue", linewidths=0
    )
    axes.set_xlabel("width (pixels)")
    axes.set_ylabel("height (pixels)")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)


def _draw_histogram(axes: Axes, values: NDArray[Any], label: str) -> None:
    """Over more than a decade, equal steps of the logarithm."""
    low, high = float(values.min()) * 0.99, float(values.max()) * 1.01
    wide = high > 10 * low
    axes.hist(
        values, bins=list((np.geomspace if wide else np.linspace)(low, high, 41)), color="tab:blue"
    )
    if wide:
        axes.set_xscale("log")
    axes.set_xlabel(label)
    axes.set_ylabel("images")


def _draw_classes(axes: Axes, stats: ShardStats) -> None:
    counts = [count for _, count in stats.class_counts()]
    if counts:
        axes.fill_between(range(len(counts)), counts, step="mid", color="tab:blue")
        axes.set_ylim(bottom=0)
    axes.set_xlabel(f"{len(counts)} classes, most frequent first" if counts else "no labels")
    axes.set_ylabel("images")
