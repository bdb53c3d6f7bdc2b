"""Every method that learns without labels, for equal CPU-seconds: kNN against random weights.

A method is a small recipe of `RECIPES`, so a new one is here without a line. All have the trunk,
the images, the batch, the protocol of kNN and the budget of CPU-seconds in common; views, heads and
rates are those of the recipe. Only training counts: neither the start nor kNN. The rate is constant
after a warm-up, so a point of a curve does not depend on where the run ends. The encoder is the one
that the method evaluates.

A method fails if the kNN of a seed has gained less than `gain` over its random weights. The table
does not rank: recipes are not tuned equally.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from benchmarks.case import chosen_words
from benchmarks.learning.curves import Curve, at_seconds, seconds_to, summary
from benchmarks.learning.runs import folder_of_runs, trained
from benchmarks.learning.tasks import MissingData, prepare
from benchmarks.shown import Chart, Lines, markdown
from fastmoco.objectives.build import OBJECTIVES
from fastmoco.recipes import RECIPES

__all__ = ["DEFAULTS", "NAME", "QUICK", "charts", "methods_of", "run", "table"]

NAME = "methods"
DEFAULTS = {
    "task": "fashion",
    "methods": "all",
    "seeds": 2,
    "budget_s": 40.0,
    "every": 80,
    "gain": 0.08,
    "fashion": "/usr/share/datasets/fashion-mnist",
    "folder": "",
}
QUICK = {
    "task": "digits",
    "methods": "moco_v3",
    "seeds": 1,
    "budget_s": 0.5,
    "every": 10,
    "gain": 0.0,
}
SUFFIXES = {"fashion": "_nano7_e12_b256", "digits": "_digits"}
"""How the names of a task's recipes end."""
BARE = ("vit", "quickstart")
"""Beginnings of recipes of MoCo v3, which have no name of a method."""


def methods_of(task: str) -> dict[str, str]:
    """Recipe by method: all of a task that learn without labels."""
    found = {}
    for recipe, make in RECIPES.items():
        name, config = recipe.removesuffix(SUFFIXES[task]), make()
        build = OBJECTIVES[type(config.objective)]
        needs_labels = build.__self__.needs_labels  # type: ignore[attr-defined]
        if name != recipe and not needs_labels:
            found[config.objective.kind if name in BARE else name] = recipe
    return found


def run(options: dict[str, Any]) -> dict[str, Any]:
    """Train every method with every seed.

    Args:
        options: `task`, `fashion` or `digits`; `methods`, with commas, or `all`; `seeds`, their
            number; `budget_s`, CPU-seconds of each run; `every` so many steps kNN is measured;
            `gain` of kNN that every seed must have at the budget, at least; `fashion`, folder of
            the source files; `folder`, which keeps sets, and finished runs of an unmodified commit,
            so that the same command continues (empty: a temporary one).

    Returns:
        `methods`: for each its `recipe`, the seeds' mean, min and max of kNN at the `start` and
        after the budget (`by_seconds`), of their difference (`gain`) and of `images_per_cpu_s`,
        `seconds_to_gain` of each seed, its `trunk` and its `curves`; `budget_s`; `needed`, the
        gain; `source`, digest of the source files; `failed`, reasons by method; `unstable`, signs
        of instability by run; or `skipped_because`.

    Raises:
        ValueError: for an unknown task or method.
    """
    (task,) = chosen_words(options, "task", SUFFIXES)
    known = methods_of(task)
    given = options["methods"]
    names = list(known) if given == "all" else chosen_words(options, "methods", known)
    result: dict[str, Any] = {
        "methods": {},
        "budget_s": options["budget_s"],
        "needed": options["gain"],
        "failed": {},
        "unstable": {},
    }
    with folder_of_runs(options["folder"]) as folder:
        try:
            data = prepare(task, options, folder)
        except MissingData as error:
            return result | {"skipped_because": str(error)}
        curves: dict[str, list[Curve]] = {name: [] for name in names}
        for seed in range(options["seeds"]):
            for name in names:
                settings = {
                    "points": 1,
                    "every": options["every"],
                    "budget_s": options["budget_s"],
                    "config": {"recipe": known[name]},
                }
                curves[name].append(
                    trained(folder, data, settings, task=task, side="fastmoco", seed=seed)
                )
    result["source"] = data.source
    for name in names:
        found = method_result(curves[name], options["budget_s"], options["gain"])
        model = RECIPES[known[name]]().model
        trunk = f"{model.architecture}/{model.patch_size}, {model.image_size} pixels"
        result["methods"][name] = {"recipe": known[name], "trunk": trunk, **found}
        if not found["gain"]["min"] >= options["gain"]:
            result["failed"][name] = (
                f"kNN gained {100 * found['gain']['min']:.1f} points over random weights after "
                f"{options['budget_s']:g} CPU-seconds, {100 * options['gain']:.1f} are needed"
            )
        for curve in curves[name]:
            if curve["events"]:
                result["unstable"][f"{name}, seed {curve['seed']}"] = list(curve["events"])
    return result


def method_result(curves: Sequence[Curve], budget_s: float, gain: float) -> dict[str, Any]:
    """The figures of one method.

    Args:
        curves: of the seeds.
        budget_s: CPU-seconds at which kNN counts.
        gain: of kNN, of which the seconds are given.
    """
    starts = [curve["knn"][0] for curve in curves]
    ends = [at_seconds(curve, budget_s) for curve in curves]
    rates = [curve["images"][-1] / curve["cpu_s"][-1] for curve in curves]
    return {
        "start": summary(starts),
        "by_seconds": summary(ends),
        "gain": summary([end - start for start, end in zip(starts, ends, strict=True)]),
        "images_per_cpu_s": summary(rates),
        "seconds_to_gain": [
            seconds_to(curve, start + gain) for start, curve in zip(starts, curves, strict=True)
        ],
        "curves": list(curves),
    }


def table(result: Mapping[str, Any]) -> str:
    """A row for each method, then what is unstable."""
    head = (
        "method",
        "kNN, random weights",
        f"kNN after {result.get('budget_s', 0):g} CPU-seconds",
        "gain in points: mean",
        "of the worse seed",
        f"CPU-seconds to {100 * result.get('needed', 0):g} points",
        "images per CPU-second",
    )
    rows = [
        (
            name,
            f"{found['start']['mean']:.1%}",
            f"{found['by_seconds']['mean']:.1%}",
            f"{100 * found['gain']['mean']:.1f}",
            f"{100 * found['gain']['min']:.1f}",
            ", ".join("none" if s is None else f"{s:.0f}" for s in found["seconds_to_gain"]),
            f"{found['images_per_cpu_s']['mean']:,.0f}",
        )
        for name, found in result.get("methods", {}).items()
    ]
    lines = [markdown(head, rows)]
    if reason := result.get("skipped_because"):
        lines.append(f"Skipped: {reason}.")
    lines += [f"unstable: {name}: {why}" for name, why in result.get("unstable", {}).items()]
    return "\n\n".join(lines)


def charts(result: Mapping[str, Any]) -> list[Chart]:
    """Gain of kNN against CPU-seconds, a line for each method: the mean of the seeds."""
    lines = {}
    for name, found in result.get("methods", {}).items():
        curves = found["curves"]
        points = min(len(curve["knn"]) for curve in curves)
        lines[name] = [
            (
                mean(curve["cpu_s"][i] for curve in curves),
                100 * mean(curve["knn"][i] - curve["knn"][0] for curve in curves),
            )
            for i in range(points)
        ]
    if not lines:
        return []
    title = "kNN over that of random weights, mean of the seeds"
    return [Lines(title=title, x="CPU-seconds of training", y="points of kNN", lines=lines)]
