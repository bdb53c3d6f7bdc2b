"""CPU-seconds of MoCo v3 to a fixed kNN: plain, with dropped tokens, and by a schedule of both.

The accuracy is fixed by the plain runs: a share of what they gain over random weights in their
budget, in the mean of the seeds. All sides have the same weights, images, views, rate and number of
points; only the tokens that the trained encoder keeps and the sizes of the patches differ. kNN
always sees all tokens and the smallest patches. Only training counts: neither the start nor kNN.

The rate is constant after a warm-up. A schedule is a list of `PATCH/KEEP@STEP`, the step at which a
phase begins, so that it does not depend on where the run ends: a point of any curve is a run that
was planned for that point. The time of a side is where its curve first reaches the accuracy, on a
straight line between two points. Another side than the plain one ends there, or at the budget.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import mean
from typing import Any

from benchmarks.case import chosen_words
from benchmarks.learning.curves import Curve, at_seconds, seconds_to, summary
from benchmarks.learning.runs import folder_of_runs, trained
from benchmarks.learning.tasks import TASKS, MissingData, config_of, phase_words, prepare
from benchmarks.shown import Chart, Lines, markdown
from fastmoco.config import Config
from fastmoco.planning.costs import part_flops
from fastmoco.recipes import with_image_size
from fastmoco_pipelines.loading.step_parts import LOSS

__all__ = ["DEFAULTS", "NAME", "QUICK", "charts", "run", "table"]

NAME = "time_to_accuracy"
DEFAULTS = {
    "task": "fashion",
    "sides": "plain,dropping,schedule",
    "seeds": 3,
    "budget_s": 60.0,
    "share": 0.95,
    "image_size": 32,
    "patch_size": 4,
    "hidden_dim": 256,
    "dropping": "4/0.125@0,4/0.5@110",
    "schedule": "8/0.5@0,8/1@60,4/0.5@180",
    "every": 40,
    "every_other": 40,
    "fashion": "/usr/share/datasets/fashion-mnist",
    "folder": "",
}
QUICK = {
    "task": "digits",
    "sides": "plain,dropping",
    "seeds": 1,
    "budget_s": 0.5,
    "image_size": 8,
    "patch_size": 2,
    "dropping": "2/0.5@0",
    "every": 10,
    "every_other": 10,
}
SIDES = ("plain", "dropping", "schedule")
IMAGES = 4096
"""Images of the step whose FLOPs are counted; an image's do not depend on them."""
GOALS = {"dropping": 0.6, "schedule": 0.45}
"""Time over that of the plain side, at most."""


def run(options: dict[str, Any]) -> dict[str, Any]:
    """Train the plain side with every seed, which fixes the accuracy, then the others.

    Args:
        options: `task`, `fashion` or `digits`; `sides`, the first is `plain`; `seeds`, their
            number; `budget_s`, CPU-seconds of a plain run, and at most of another; `share` of the
            gain of the plain side that is the accuracy; `image_size` and `patch_size` of the
            encoder, `hidden_dim` of the heads; `dropping` and `schedule`, phases as
            `tasks.phase_words` reads them; `every` so many steps kNN is measured on the plain
            side, `every_other` on another; `fashion`, folder of the source files; `folder`, which
            keeps sets, and finished runs of an unmodified commit, so that the same command
            continues (empty: a temporary one).

    Returns:
        `accuracy`, the kNN to reach; `sides`: for each its `phases` with `flops`, those of a step
        for one image, `seconds` and `images` to the accuracy by seed (None: not reached), their
        `mean_s`, `min_s`, `max_s` if all have reached it, and `curves`; `ratio` of the mean time to
        that of `plain`, by side, with the smallest and largest of the same seeds; `goals`;
        `reached`, whether each is; `failed`, why the figures are not to be trusted; `unstable`,
        signs of instability by run; or `skipped_because`.

    Raises:
        ValueError: for an unknown task or side, a schedule that is none, or if `plain` is not
            first.
    """
    (task,) = chosen_words(options, "task", TASKS)
    sides = chosen_words(options, "sides", SIDES)
    if sides[0] != "plain":
        raise ValueError(f"sides={options['sides']!r}: the first must be plain")
    schedules = {side: "" if side == "plain" else options[side] for side in sides}
    for schedule in filter(None, schedules.values()):
        phase_words(schedule)
    shape = {name: options[name] for name in ("image_size", "patch_size", "hidden_dim")}
    result: dict[str, Any] = {"sides": {}, "failed": {}, "unstable": {}}
    with folder_of_runs(options["folder"]) as folder:
        try:
            data = prepare(task, options, folder)
        except MissingData as error:
            return result | {"skipped_because": str(error)}
        curves: dict[str, list[Curve]] = {}
        until: dict[str, float] = {}
        for side in sides:
            settings = {
                "points": 1,
                "every": options["every" if side == "plain" else "every_other"],
                "budget_s": options["budget_s"],
                "config": {**shape, "schedule": schedules[side]},
                **until,
            }
            curves[side] = [
                trained(folder, data, settings, task=task, side="fastmoco", seed=seed)
                for seed in range(options["seeds"])
            ]
            if side == "plain":
                level = accuracy_of(curves[side], options["budget_s"], options["share"])
                until["until"] = level
        plain = config_of(task, data, seed=0, samples=1, **shape)
    result |= compared(curves, level)
    result |= {"budget_s": options["budget_s"], "source": data.source}
    for side, found in result["sides"].items():
        phases = phase_words(schedules[side] or f"{options['patch_size']}/1@0")
        found["phases"] = [
            {
                "patch_size": patch,
                "keep": keep,
                "from_step": step,
                "flops": flops_of(plain, patch, keep),
            }
            for patch, keep, step in phases
        ]
    return result


def accuracy_of(plain: Sequence[Curve], budget_s: float, share: float) -> float:
    """The kNN to reach: random weights, and a share of what the plain side gains in its budget."""
    start = mean(curve["knn"][0] for curve in plain)
    end = mean(at_seconds(curve, budget_s) for curve in plain)
    return float(round(start + share * (end - start), 5))


def compared(curves: Mapping[str, Sequence[Curve]], level: float) -> dict[str, Any]:
    """Times of the sides to a kNN, and their ratios to the first side, `plain`."""
    found: dict[str, Any] = {"accuracy": level, "sides": {}, "ratio": {}, "reached": {}}
    found |= {
        "failed": {},
        "unstable": {},
        "goals": {s: g for s, g in GOALS.items() if s in curves},
    }
    for side, runs in curves.items():
        seconds = [seconds_to(curve, level) for curve in runs]
        own: dict[str, Any] = {
            "start": summary([curve["knn"][0] for curve in runs]),
            "seconds": [None if s is None else round(s, 2) for s in seconds],
            "images": [seconds_to({**c, "cpu_s": c["images"]}, level) for c in runs],
            "images_per_cpu_s": summary([c["images"][-1] / c["cpu_s"][-1] for c in runs]),
        }
        whole = [s for s in seconds if s is not None]
        if len(whole) == len(runs):
            own |= {f"{name}_s": value for name, value in summary(whole).items()}
        found["sides"][side] = own | {"curves": list(runs)}
        for curve in runs:
            if curve["events"]:
                found["unstable"][f"{side}, seed {curve['seed']}"] = list(curve["events"])

    # A plain run that learns nothing fixes no accuracy.
    plain = found["sides"]["plain"]
    if not level > plain["start"]["max"]:
        found["failed"]["plain"] = f"kNN {level:.1%} is not above that of random weights"
        return found
    for side, goal in found["goals"].items():
        own = found["sides"][side]
        if "mean_s" in own and "mean_s" in plain:
            pairs = [a / b for a, b in zip(own["seconds"], plain["seconds"], strict=True)]
            found["ratio"][side] = {
                "of_means": round(own["mean_s"] / plain["mean_s"], 4),
                "min": round(min(pairs), 4),
                "max": round(max(pairs), 4),
            }
        found["reached"][side] = found["ratio"].get(side, {}).get("of_means", 9.0) <= goal
    return found


def flops_of(plain: Config, patch: int, keep: float) -> float:
    """FLOPs of a step for one image in a phase, forward and backward, of all views; counted. Without
    those of the loss, which depend on the batch.

    Args:
        plain: config without phases.
        patch: pixels of the phase's patches.
        keep: share of the tokens that the trained encoder sees.
    """
    own, side = plain.model.patch_size, plain.model.image_size
    # Views of larger patches are made smaller, for the same patches of the encoder.
    phase = with_image_size(plain, side * own // patch, patch_size=own)
    model = replace(phase.model, keep_tokens=f"{keep}@0")
    parts = part_flops(replace(phase, model=model), "bf16", IMAGES, attention="explicit")
    return sum(flops for name, flops in parts.items() if name != LOSS) / IMAGES


def table(result: Mapping[str, Any]) -> str:
    """A row for each side, then the accuracy, and what is unstable."""
    head = (
        "side",
        "phases: patch in pixels, tokens kept, from step",
        "MFLOP for an image",
        "CPU-seconds to the accuracy: mean",
        "seeds",
        "images",
        "images per CPU-second",
        "time over plain",
        "goal",
    )
    rows = []
    for side, own in result.get("sides", {}).items():
        ratio, goal = result["ratio"].get(side), result["goals"].get(side)
        phases = own["phases"]
        images = [n for n in own["images"] if n is not None]
        rows.append(
            (
                side,
                ", ".join(f"{p['patch_size']}, {p['keep']:g}, {p['from_step']}" for p in phases),
                ", ".join(f"{p['flops'] / 1e6:.1f}" for p in phases),
                f"{own['mean_s']:.1f}" if "mean_s" in own else "",
                ", ".join("not reached" if s is None else f"{s:.1f}" for s in own["seconds"]),
                f"{mean(images):,.0f}" if images else "",
                f"{own['images_per_cpu_s']['mean']:,.0f}",
                f"{ratio['of_means']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})"
                if ratio
                else "",
                f"{goal:g}: {'reached' if result['reached'].get(side) else 'missed'}"
                if goal
                else "",
            )
        )
    lines = [markdown(head, rows)]
    if "accuracy" in result:
        lines.append(f"The accuracy is a kNN of {result['accuracy']:.1%}.")
    if reason := result.get("skipped_because"):
        lines.append(f"Skipped: {reason}.")
    lines += [f"unstable: {name}: {why}" for name, why in result.get("unstable", {}).items()]
    return "\n\n".join(lines)


def charts(result: Mapping[str, Any]) -> list[Chart]:
    """kNN against CPU-seconds, a line for each side, the mean of the seeds; and the accuracy."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for side, own in result.get("sides", {}).items():
        curves = own["curves"]
        points = min(len(curve["knn"]) for curve in curves)
        lines[side] = [
            (
                mean(curve["cpu_s"][i] for curve in curves),
                100 * mean(curve["knn"][i] for curve in curves),
            )
            for i in range(points)
        ]
    if not lines:
        return []
    level, last = 100 * result["accuracy"], max(x for line in lines.values() for x, _ in line)
    lines["the accuracy"] = [(0.0, level), (last, level)]
    title = "kNN of MoCo v3, mean of the seeds"
    return [Lines(title=title, x="CPU-seconds of training", y="kNN, %", lines=lines)]
