"""The instability of MoCo v3 on small images: a trained patch projection against a frozen one, with
their gradient norms, events and kNN.

Runs of `unstable_digits`: the learning rate rises through the whole run, so that each one passes
the rate at which its training becomes unstable. The sides differ in the patch projection alone:
weights, images and views of a seed are equal. Nothing is timed.

kNN is measured on 360 images: two figures of 85 % differ by 2.7 points (a standard deviation) by
chance alone, so the detector of a run, which tells of 2 points, also tells of noise. A fall counts
here from 8 points below the best on.
"""

from __future__ import annotations

import io
import math
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.shown import markdown
from fastmoco.config import Config
from fastmoco.distributed.mesh import World
from fastmoco.recipes import get_recipe
from fastmoco.run.events import read_events
from fastmoco.run.folder import RunFolder
from fastmoco.run.metrics_file import read_series
from fastmoco.training.trainer import Trainer
from fastmoco_pipelines import pack_digits

NAME = "instability"
DEFAULTS = {"recipe": "unstable_digits", "seeds": 8, "steps": 0, "folder": ""}
"""`recipe`; `seeds`, their number; `steps` of a run, 0: all; `folder`, which keeps finished runs, so
that the same command continues (empty: a temporary one)."""
QUICK = {"seeds": 1, "steps": 10}
SIDES = {"trained": False, "frozen": True}
"""Side -> whether its patch projection is frozen."""
FALL = 0.08
"""Distance of kNN to its best so far from which it counts as a fall, a share."""
START = 20
"""Step from which kNN counts: it falls at first, as random weights tell these images apart. The
detector of spikes starts there too."""
WINDOW = 20
"""Steps before a fall in which a spike announces it."""
MOST = 0.8
"""Share of runs that must show what the picture says: see `_failed`."""
LINES = {"trained": ("#D55E00", "-"), "frozen": ("#0072B2", "--")}
STYLES = {
    "patch_embed": ("#D55E00", "-"),
    "first_block": ("#0072B2", "-"),
    "last_block": ("#009E73", "--"),
    "heads": ("#CC79A7", ":"),
}
"""Colors of Okabe and Ito, and lines for those who see no color."""
PLACES = tuple(STYLES)


def run(options: dict[str, Any]) -> dict[str, Any]:
    """Train both sides with every seed.

    Returns:
        `runs`: for each its side and seed, `knn` and the largest gradient norms of each interval by
        place as [steps, values], `spikes` as [step, place, multiple of the median], and the figures
        of `judged`; `failed`, if in whole runs the picture is another one.
    """
    runs = []
    with tempfile.TemporaryDirectory(prefix="fastmoco-instability-") as temporary:
        folder = Path(options["folder"] or temporary)
        if not (folder / "set").exists():
            pack_digits(folder / "set")
        for seed in range(options["seeds"]):
            for side, frozen in SIDES.items():
                config = config_of(options["recipe"], folder / "set", seed=seed, frozen=frozen)
                out = folder / f"{side}-{seed}"
                _train(config, out, options["steps"])
                runs.append({"side": side, "seed": seed, **_read(RunFolder(out))})
    return {"failed": {} if options["steps"] else _failed(runs), "runs": runs}


def config_of(recipe: str, images: Path, *, seed: int, frozen: bool) -> Config:
    """The config of a run on packed digits, with one thread."""
    config = get_recipe(recipe)
    return replace(
        config,
        seed=seed,
        threads=1,
        device="cpu",
        model=replace(config.model, freeze_patch_embed=frozen),
        data=replace(config.data, shards=str(images / "train-*.tar")),
        knn=replace(config.knn, test_shards=str(images / "test-*.tar")),
    )


def judged(knn: Sequence[Sequence[float]], spikes: Sequence[Sequence[Any]]) -> dict[str, Any]:
    """What a run shows.

    Args:
        knn: [steps, shares].
        spikes: [step, place, size] in the order of steps.

    Returns:
        `best` and `last` kNN, `fall`, the largest distance below the best so far; `falls`, for each
        the step at which it is first seen and that of the last spike before it, None if there is
        none in the last `WINDOW` steps; `spikes`, their number, and `early_spikes`, that of steps with
        one more than `WINDOW` steps before the first fall; `largest_spike`, 0 without. A fall is
        over at half its distance. kNN before `START` does not count.
    """
    best, fall, inside = 0.0, 0.0, False
    falls: list[tuple[int, int | None]] = []
    for step, value in zip(*knn, strict=True):
        if step < START:
            continue
        best = max(best, value)
        below = best - value
        fall = max(fall, below)
        if below >= FALL and not inside:
            before = [int(at) for at, _, _ in spikes if step - WINDOW <= at <= step]
            falls.append((int(step), before[-1] if before else None))
        inside = below >= (FALL / 2 if inside else FALL)
    early = {at for at, _, _ in spikes if not falls or at < falls[0][0] - WINDOW}
    return {
        "best": round(best, 4),
        "last": round(knn[1][-1], 4),
        "fall": round(fall, 4),
        "falls": falls,
        "spikes": len(spikes),
        "early_spikes": len(early),
        "largest_spike": max((size for _, _, size in spikes), default=0.0),
    }


def table(result: Mapping[str, Any]) -> str:
    """A row for each run."""
    head = (
        *("patch projection", "seed", "kNN: best", "at the end", "largest fall below the best"),
        *("falls of 8 points: step (spike before it)", "spikes", "early ones without a fall"),
        "largest, x median",
    )
    rows = []
    for run in result.get("runs", []):
        figures = run["figures"]
        falls = (f"{step} ({spike or 'none'})" for step, spike in figures["falls"])
        rows.append(
            (
                run["side"],
                str(run["seed"]),
                *(f"{figures[name]:.1%}" for name in ("best", "last")),
                f"{100 * figures['fall']:.1f} points",
                ", ".join(falls) or "none",
                *(str(figures[name]) for name in ("spikes", "early_spikes")),
                f"{figures['largest_spike']:,.0f}" if figures["spikes"] else "none",
            )
        )
    return markdown(head, rows)


def draw(result: Mapping[str, Any], path: Path) -> None:
    """For each seed kNN of both sides, and below it the gradient norms of the trained one with its
    spikes.

    Args:
        result: of the case.
        path: the picture; its suffix gives the format.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    runs = {(run["side"], run["seed"]): run for run in result["runs"]}
    seeds = sorted({seed for _, seed in runs})
    figure = Figure(figsize=(2.4 * len(seeds), 7.2), layout="constrained")
    panels = figure.subplots(3, len(seeds), squeeze=False, sharex=True, sharey="row")
    for seed, column in zip(seeds, panels.T, strict=True):
        for side, (color, line) in LINES.items():
            steps, values = runs[side, seed]["knn"]
            shown = [100 * value for value in values]
            column[0].plot(steps, shown, line, color=color, label=f"{side} projection")
        for panel, side in zip(column[1:], SIDES, strict=True):
            for place, (color, line) in STYLES.items():
                if place in runs[side, seed]["norms"]:
                    steps, values = runs[side, seed]["norms"][place]
                    panel.plot(steps, values, line, color=color, label=place, linewidth=1)
            for step, place, _ in runs[side, seed]["spikes"]:
                panel.axvline(step, color="0.6", linewidth=0.6, zorder=0)
                if side == "trained":
                    column[0].axvline(step, color="0.6", linewidth=0.6, zorder=0)
                if place in STYLES:
                    top = panel.get_xaxis_transform()
                    panel.plot(step, 1, "v", color=STYLES[place][0], transform=top, clip_on=False)
            panel.set_yscale("log")
        column[0].set_title(f"seed {seed}", loc="left")
        column[-1].set_xlabel("step")
        for panel in column:
            panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("kNN, %")
    for row, side in zip(panels[1:], SIDES, strict=True):
        row[0].set_ylabel(f"gradient norms, {side}")
    panels[0][0].legend(loc="lower left", fontsize=8)
    panels[1][0].legend(loc="upper left", fontsize=8)

    # The same result gives the same file.
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"Date": None} if path.suffix == ".svg" else None
    with rc_context({"svg.hashsalt": "fastmoco"}):
        figure.savefig(path, dpi=120, metadata=metadata)


def _train(config: Config, out: Path, steps: int) -> None:
    """Train a run to its end, or some of its steps; nothing if it is finished."""
    before = torch.get_num_threads()
    try:
        with redirect_stdout(io.StringIO()):
            trainer = Trainer.build(config, out, World())
            try:
                trainer.run(steps or None)
            finally:
                trainer.close()
    finally:
        torch.set_num_threads(before)


def _read(folder: RunFolder) -> dict[str, Any]:
    """What a finished run has recorded."""
    names = {f"gradient_norm/{place}": place for place in PLACES}
    series = read_series(folder.metrics, lambda name: name == "knn" or name in names)
    events = read_events(folder.metrics)
    spikes = [
        (event.step, event.layer, round(event.size, 1))
        for event in events
        if event.name == "gradient_spike" and event.size is not None
    ]
    knn = [series["knn"].steps.tolist(), [round(x, 4) for x in series["knn"].values.tolist()]]
    norms = {
        place: [of.steps.tolist(), [float(f"{x:.3g}") for x in of.values.tolist()]]
        for name, place in names.items()
        if (of := series.get(name)) is not None
    }
    return {
        "knn": knn,
        "norms": norms,
        "spikes": spikes,
        "events": sorted({event.name for event in events}),
        "figures": judged(knn, spikes),
    }


def _failed(runs: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Why the picture is another one: the first fall of most runs comes after a spike, and in most
    seeds a trained projection falls first and has the lower best kNN."""
    figures = {(run["side"], run["seed"]): run["figures"] for run in runs}
    pairs = [
        (figures["trained", seed], of) for (side, seed), of in figures.items() if side == "frozen"
    ]
    announced = sum(bool(of["falls"]) and of["falls"][0][1] is not None for of in figures.values())
    counts = {
        "spikes": (announced, len(figures)),
        "order": (sum(_first_fall(one) < _first_fall(other) for one, other in pairs), len(pairs)),
        "kNN": (sum(one["best"] < other["best"] for one, other in pairs), len(pairs)),
    }
    return {
        name: f"{count} of {total}"
        for name, (count, total) in counts.items()
        if count < MOST * total
    }


def _first_fall(figures: Mapping[str, Any]) -> float:
    """The step of the first fall; infinite without one."""
    return figures["falls"][0][0] if figures["falls"] else math.inf
