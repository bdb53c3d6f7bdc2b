"""Training of small encoders: kNN against images seen and against CPU-seconds, and the baseline.

Both sides start from the same weights and see the same images in the same views, so that they learn
the same from the same number of images, which is the check; the CPU-seconds differ. Every run has
one thread. It trains until it has used its budget of CPU-seconds, in which the start and the
measurements of kNN do not count. The rate is constant after a warm-up: a point of a curve does not
depend on where the run ends, and the kNN of the slower side after the budget is that of a run that
was planned for it.

The images are those of packages, and nothing is downloaded: Fashion-MNIST, and patches of
photographs, in which the class is the photograph. The runs of the seeds alternate between the
sides. `make learning` repeats the runs of fastmoco and compares them with the newest stored line,
by images, because CPU-seconds are of one machine.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.case import chosen_words
from benchmarks.learning import figure
from benchmarks.learning.curves import Curve, task_result
from benchmarks.learning.figure import draw, rows
from benchmarks.learning.runs import folder_of_runs, trained
from benchmarks.learning.tasks import TASKS, Data, MissingData, config_of, prepare
from benchmarks.shown import markdown

__all__ = ["DEFAULTS", "NAME", "QUICK", "draw", "rows", "run", "table"]

NAME = "learning"
DEFAULTS = {
    "tasks": "fashion,patches",
    "sides": "fastmoco,baseline",
    "seeds": 3,
    "budget_s": 36.0,
    "points": 6,
    "every": 40,
    "every_other": 20,
    "agree": 0.02,
    "attention": "sdpa",
    "workers": 0,
    "fashion": "/usr/share/datasets/fashion-mnist",
    "photos": "/usr/share/wallpapers",
    "folder": "",
}
QUICK = {
    "tasks": "digits",
    "seeds": 1,
    "budget_s": 0.5,
    "points": 1,
    "every": 10,
    "every_other": 10,
    "agree": 0.06,
}
SIDES = ("fastmoco", "baseline")


def run(options: dict[str, Any]) -> dict[str, Any]:
    """Train every side with every seed on every task.

    Args:
        options: `tasks` of `fashion`, `patches` and `digits`; `sides`, the first is the subject;
            `seeds`, their number; `budget_s`, CPU-seconds of each run; `points` that every run of
            the first side has at least, `every` so many steps: where they end `make learning`
            judges; `every_other`, steps between the points of another side, which sees fewer images
            in its budget; `agree`, the largest difference of the sides' mean kNN after the same
            images; `attention` of the baseline, `sdpa` or `explicit`; `workers` of its DataLoader,
            0: its batches are made in the process of the training; `fashion` and `photos`, folders
            of the source files; `folder`, which keeps sets, and finished runs of an unmodified
            commit, so that the same command continues (empty: a temporary one).

    Returns:
        `tasks`: for each that was run the figures of `curves.task_result`, `source` (digest of its
        source files) and `recipe`; `skipped`, why others were not; `skipped_because`, if all were;
        `failed`, reasons by task; `unstable`, signs of instability by run; `speedup` by task.

    Raises:
        ValueError: for an unknown task or side, or points that the sides do not share.
    """
    names = chosen_words(options, "tasks", TASKS)
    sides = chosen_words(options, "sides", SIDES)
    if options["every"] % options["every_other"]:
        raise ValueError(
            f"every={options['every']}: must be a multiple of every_other={options['every_other']}"
        )
    result: dict[str, Any] = {
        "tasks": {},
        "skipped": {},
        "failed": {},
        "unstable": {},
    }
    speedup = {}
    with folder_of_runs(options["folder"]) as folder:
        for name in names:
            try:
                data = prepare(name, options, folder)
            except MissingData as error:
                result["skipped"][name] = str(error)
                continue
            curves = _curves(name, data, sides, options, folder)
            batch = config_of(name, data, seed=0, samples=1).global_batch_size
            found = task_result(
                curves,
                images=options["points"] * options["every"] * batch,
                budget_s=options["budget_s"],
                agree=options["agree"],
            )
            recipe = TASKS[name].recipe
            result["tasks"][name] = {"source": data.source, "recipe": recipe, **found}

            # The same by task, where programs look for it.
            for key in ("failed", "unstable"):
                for side, reason in found[key].items():
                    result[key][f"{name}, {side}"] = reason
            for side, each in found.get("speedup", {}).items():
                speedup.update({f"{side}, {name}, {kind}": value for kind, value in each.items()})
    if speedup and not result["failed"]:
        result["speedup"] = speedup
    if not result["tasks"]:
        result["skipped_because"] = "; ".join(result["skipped"].values())
    return result


def table(result: Mapping[str, Any]) -> str:
    """A row for each task and side, then what was skipped, failed or unstable."""
    lines = [markdown(*figure.rows(result))]
    for key in ("skipped", "failed", "unstable"):
        lines += [f"{key}: {name}: {reason}" for name, reason in result.get(key, {}).items()]
    return "\n\n".join(lines)


def _curves(
    name: str, data: Data, sides: list[str], options: Mapping[str, Any], folder: Path
) -> dict[str, list[Curve]]:
    """Curves by side. The first side has all the points; another one has the first of them at
    least, and ends with its budget.
    """
    found: dict[str, list[Curve]] = {side: [] for side in sides}
    for seed in range(options["seeds"]):
        for side in sides:
            first = side == sides[0]
            settings = {
                "points": options["points"]
                if first
                else options["every"] // options["every_other"],
                "every": options["every"] if first else options["every_other"],
                "budget_s": options["budget_s"],
            }
            if side == "baseline":
                settings |= {k: options[k] for k in ("attention", "workers")}
            found[side].append(trained(folder, data, settings, task=name, side=side, seed=seed))
    return found
