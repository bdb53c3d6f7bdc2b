"""The committed results as a page and as images: docs/performance.md and docs/images/performance/.

The page is made from the lines of `benchmarks/results/` alone, and is never edited by hand. Images
need matplotlib; the page does not.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import shown
from benchmarks.chips import CHIPS
from benchmarks.gpu import page as gpu
from benchmarks.registry import CASES
from benchmarks.shown import Bars, Chart, markdown, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "performance.md"
IMAGES = ROOT / "docs" / "images" / "performance"
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")
"""Okabe and Ito's colors, which people with color blindness can distinguish."""
MARKERS = "osv^DPX*"
HEAD = """# Performance

`python -m benchmarks plot` writes this page and its images from the lines of
[benchmarks/results/](../benchmarks/results/README.md). Do not edit it: a test compares it with the
lines. [benchmarks/README.md](../benchmarks/README.md) describes the cases.

Every case checks its results before it measures. A contender that failed its check, or that cannot
run on the machine, is in the table with the reason and has no figure. A speed-up is a ratio of times
that were measured in turn in one run: 2 means that the subject takes half of the time. It is a
median; the range beside it holds three of five ratios (q20 to q80), in older lines all of them.
Ratios of a CPU hold for its machine. Absolute times are only given for a GPU."""
CURE = "run `python -m benchmarks plot` and commit docs/performance.md with its images"


def lines_of(results: Path = RESULTS) -> dict[str, list[dict[str, Any]]]:
    """The committed lines of each case, in the order of the registry; without those of GPUs."""
    found = {
        path.stem: [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
        for path in sorted(results.glob("*.jsonl"))
        if not path.stem.startswith("gpu-")
    }
    order = [*CASES, *found]
    return {name: found[name] for name in dict.fromkeys(order) if found.get(name)}


def page(results: Path = RESULTS) -> str:
    """The whole page."""
    parts = [HEAD, _chips()]
    parts += [gpu.section(name, lines) for name, lines in gpu.cards(results).items()]
    for name, lines in lines_of(results).items():
        case = CASES.get(name)
        parts.append(f"## {name}\n\n{case.summary if case else 'A case of an earlier tree.'}")
        if (case and case.draw) or any(_charts(line) for line in lines):
            parts.append(f"![{name}](images/performance/{name}.svg)")
        for line in lines:
            parts += [_about(line), (case.shown if case else shown.table)(line["result"])]
    return "\n\n".join(parts) + "\n"


def _chips() -> str:
    head = ("chip", "bf16, TFLOP/s", "TF32, TFLOP/s", "float32, TFLOP/s", "TB/s", "source")
    rows = [
        (
            name,
            *(number(chip.flops_per_s[dtype] / 1e12) for dtype in ("bf16", "tf32", "fp32")),
            number(chip.bytes_per_s / 1e12),
            chip.source,
        )
        for name, chip in CHIPS.items()
    ]
    return (
        "## Chips\n\nShares of the roofline are relative to these rates of dense products and of "
        "memory. A CPU measures\nits own in each run.\n\n" + markdown(head, rows)
    )


def _about(line: Mapping[str, Any]) -> str:
    """Machine, commit, date and options of a line."""
    machine = line["machine"]
    where = f"{machine['gpu']}, " if "gpu" in machine else ""
    where += f"{machine['cores']} cores of {machine['cpu']}, torch {machine['torch']}"
    options = " ".join(f"{name}={value}" for name, value in line["options"].items() if value != "")
    return (
        f"{line['time'][:10]}, commit {machine['commit'].replace('+', ' and uncommitted changes')}, "
        f"{where}. Options: `{options}`."
    )


def _differences(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """Of each line of a case the options that other lines have otherwise, for titles."""
    options = [{**line["options"]} for line in lines]
    names = [n for n in dict.fromkeys(n for o in options for n in o) if len(lines) > 1]
    differ = [n for n in names if len({str(o.get(n)) for o in options}) > 1]
    shown_ = [", ".join(f"{n}={o[n]}" for n in differ if n in o) for o in options]
    return [f" ({text})" if text else "" for text in shown_]


def _charts(line: Mapping[str, Any]) -> list[Chart]:
    case = CASES.get(line["case"])
    return (case.charts if case else shown.charts)(line["result"])


def write(*, check: bool) -> int:
    """Write the page and the images; or only check that the page is that of the lines.

    Returns:
        The exit code: 1 if the page is not that of the lines.
    """
    text = page()
    if check:
        same = PAGE.exists() and PAGE.read_text() == text
        print(
            "docs/performance.md is that of the lines" if same else f"docs/performance.md: {CURE}"
        )
        return int(not same)
    PAGE.write_text(text)
    try:
        import matplotlib
    except ModuleNotFoundError:
        print("wrote docs/performance.md; images need matplotlib: pip install matplotlib")
        return 0
    matplotlib.use("svg")
    IMAGES.mkdir(parents=True, exist_ok=True)
    for name, lines in lines_of().items():
        case = CASES.get(name)
        if case and case.draw:  # the newest line
            case.draw(lines[-1]["result"], IMAGES / f"{name}.svg")
            continue
        drawn = [
            replace(chart, title=chart.title + what)
            for line, what in zip(lines, _differences(lines), strict=True)
            for chart in _charts(line)
        ]
        if drawn:
            draw(drawn, IMAGES / f"{name}.svg")
    for name, lines in gpu.cards(RESULTS).items():
        if charts := gpu.charts(lines):
            draw(charts, IMAGES / gpu.image(name))
    print("wrote docs/performance.md and docs/images/performance/")
    return 0


def draw(charts: Sequence[Chart], path: Path) -> None:
    """Draw charts one below the other."""
    import matplotlib as mpl
    from matplotlib import pyplot as plt

    heights = [0.9 + 0.34 * len(c.bars) if isinstance(c, Bars) else 3.6 for c in charts]
    style: Any = {"svg.hashsalt": path.stem, "font.size": 9, "axes.titlesize": 10}
    with mpl.rc_context(style):
        figure, axes = plt.subplots(
            len(charts),
            1,
            figsize=(7.5, sum(heights)),
            height_ratios=heights,
            squeeze=False,
            layout="constrained",
        )
        for chart, axis in zip(charts, axes[:, 0], strict=True):
            axis.set_title(chart.title, loc="left")
            axis.spines[["top", "right"]].set_visible(False)
            (_bars if isinstance(chart, Bars) else _lines)(chart, axis)
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)


def _bars(chart: Any, axis: Axes) -> None:
    names = list(chart.bars)
    values = [chart.bars[name] for name in names]
    middles = [value[0] for value in values]
    errors = [
        [max(0.0, v[0] - v[1]) for v in values],
        [max(0.0, v[2] - v[0]) for v in values],
    ]
    axis.barh(names, middles, xerr=errors, color=COLORS[0], ecolor="#555555", capsize=2)
    axis.invert_yaxis()
    axis.set_xlabel(chart.unit)
    axis.set_xlim(0, 1.15 * max(value[2] for value in values))
    if chart.equal is not None:
        axis.axvline(chart.equal, color=COLORS[5], linewidth=1)


def _lines(chart: Any, axis: Axes) -> None:
    for number_, (name, points) in enumerate(chart.lines.items()):
        axis.plot(
            *zip(*points, strict=True),
            label=name,
            color=COLORS[number_ % len(COLORS)],
            marker=MARKERS[number_ % len(MARKERS)],
            linestyle="-" if number_ < len(COLORS) else "--",
            markersize=4,
        )
    if chart.log:
        axis.set_xscale("log")
        axis.set_yscale("log")
    axis.set_xlabel(chart.x)
    axis.set_ylabel(chart.y)
    axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
