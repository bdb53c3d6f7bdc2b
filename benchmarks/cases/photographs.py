"""Joint-embedding and masked methods on photographs after equal CPU-seconds: kNN, a linear classifier
and, for masked methods, fine-tuning, each beside random weights.

Images are grey windows of photographs, and the class is the photograph (`datasets.windows`). All
methods have the images, the batch and the budget of CPU-seconds in common, and the trunk, but FCMAE,
which has a ConvNeXt. Only training counts: neither the start nor evaluations. The rate is constant
after a warm-up. The encoder is the one that the method evaluates.

A joint-embedding method fails if the kNN of a seed has gained less than `gain` over its random
weights. The encoder of a masked method is not made for kNN: one fails if neither its linear
classifier nor its fine-tuning has gained `masked_gain`. The table does not rank: recipes are not
tuned equally.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.case import chosen_words
from benchmarks.learning.curves import summary
from benchmarks.learning.runs import END, START, folder_of_runs, run_of
from benchmarks.learning.tasks import Data, MissingData, prepare
from benchmarks.shown import Bars, Chart, markdown
from fastmoco.objectives.build import OBJECTIVES
from fastmoco.recipes import RECIPES

__all__ = ["DEFAULTS", "NAME", "QUICK", "charts", "methods_of", "run", "table"]

NAME = "photographs"
DEFAULTS = {
    "methods": "all",
    "seeds": 2,
    "budget_s": 60.0,
    "every": 80,
    "gain": 0.08,
    "masked_gain": 0.01,
    "epochs": 5.0,
    "late": 0.05,
    "at_once": 2,
    "photos": "/usr/share/wallpapers",
    "folder": "",
}
QUICK = {
    "methods": "moco_v3",
    "seeds": 1,
    "budget_s": 2.0,
    "gain": -1.0,
    "late": 1.0,
    "at_once": 1,
}
METHODS = (
    *("moco_v3", "moby", "esvit", "mae", "supmae", "maskfeat", "cmae", "macrl", "extrema", "mp3"),
    "fcmae",
)
"""In the order of the table; one without a recipe is left out."""
SUFFIX, SIZE, PATCH = "_nano7_e12_b256", 32, 8
"""How the names of recipes of the common trunk end, and the pixels of an image and of a patch here."""
OTHERS = {"moco_v3": f"vit{SUFFIX}", "fcmae": "fcmae_micro_e60_b256"}
"""Recipes with another name."""
LINEAR = ("--fast", "--protocol", "mae", "--copies", "0", "--epochs", "30", "--json")
FINETUNE = (
    *("--batch", "256", "--lr", "3e-3", "--mixup", "0", "--cutmix", "0", "--crop-min", "0.5"),
    *("--layer-decay", "1", "--drop-path", "0"),
)
"""In place of the defaults, which are for ViT-B on ImageNet."""
TITLES = {"knn": "kNN", "linear": "linear classifier", "finetune": "fine-tuning"}
"""Scores, and how the table calls them."""


def methods_of() -> dict[str, str]:
    """Recipe by method: those of `METHODS` that there are."""
    found = {method: OTHERS.get(method, method + SUFFIX) for method in METHODS}
    return {method: recipe for method, recipe in found.items() if recipe in RECIPES}


def run(options: dict[str, Any]) -> dict[str, Any]:
    """Train and evaluate every method with every seed.

    Args:
        options: `methods`, with commas, or `all`; `seeds`, their number; `budget_s`, CPU-seconds of
            each run; `every` so many steps kNN is measured; `gain` over random weights that every
            seed must have, at least, and `masked_gain` of masked methods; `epochs` of fine-tuning;
            `late`, share of the budget by which a run may end behind it; so many runs `at_once`;
            `photos`, folder of photographs; `folder`, which keeps sets, and finished runs of an
            unmodified commit, so that the same command continues (empty: a temporary one).

    Returns:
        `methods`: for each its `recipe`, `trunk`, whether it is `masked` and needs `labels`, by
        score the seeds' mean, min and max with random weights (`start`), with trained ones (`end`)
        and of the difference (`gain`), the `images` that it saw, its CPU-seconds (`cpu_s`), and what
        each seed has (`seeds`); `budget_s`; `source`, digest of the source files; `failed`, reasons
        by method; `unstable`, first sign of instability by run; or `skipped_because`.

    Raises:
        ValueError: for an unknown method.
    """
    known = methods_of()
    given = options["methods"]
    names = list(known) if given == "all" else chosen_words(options, "methods", known)
    result: dict[str, Any] = {
        "methods": {},
        "budget_s": options["budget_s"],
        "failed": {},
        "unstable": {},
    }
    with folder_of_runs(options["folder"]) as folder:
        try:
            data = prepare("windows", options, folder)
        except MissingData as error:
            return result | {"skipped_because": str(error)}
        jobs = [(seed, name) for seed in range(options["seeds"]) for name in names]
        with ThreadPoolExecutor(options["at_once"]) as pool:

            def measure(job: tuple[int, str]) -> dict[str, Any]:
                seed, name = job
                return measured(folder, data, options, known[name], seed)

            found = dict(zip(jobs, pool.map(measure, jobs), strict=True))
    result["source"] = data.source
    for name in names:
        own = [found[seed, name] for seed in range(options["seeds"])]
        result["methods"][name] = made = method_result(known[name], own)
        needed = options["masked_gain" if made["masked"] else "gain"]
        if reason := shortfall(made, needed):
            result["failed"][name] = f"{reason} after {options['budget_s']:g} CPU-seconds"
        if made["cpu_s"]["max"] > (1 + options["late"]) * options["budget_s"]:
            result["failed"][name] = f"a run took {made['cpu_s']['max']:.1f} CPU-seconds"
        for seed, one in enumerate(own):
            if events := one["events"]:
                more = f", and {len(events) - 1} more" if len(events) > 1 else ""
                result["unstable"][f"{name}, seed {seed}"] = f"{events[0]}{more}"
    return result


def measured(
    folder: Path, data: Data, options: Mapping[str, Any], recipe: str, seed: int
) -> dict[str, Any]:
    """One run and its evaluations: `start` and `end` by score, `images`, `cpu_s`, `events`."""
    common = {"image_size": SIZE, "patch_size": PATCH} if recipe.endswith(SUFFIX) else {}
    settings = {
        "points": 1,
        "every": options["every"],
        "budget_s": options["budget_s"],
        "exact": True,
        "config": {"recipe": recipe, **common},
    }
    run = run_of(folder, data, settings, task="windows", side="fastmoco", seed=seed)
    curve = run.curve(keep=True)
    scores = {"start": {"knn": curve["knn"][0]}, "end": {"knn": curve["knn"][-1]}}
    config = RECIPES[recipe]()
    reads_patches = config.model.family == "vit" and config.model.pooling == "class"
    pooling = ("--pooling", "mean_norm") if reads_patches else ()
    for when, encoder in (("start", START), ("end", END)):
        # A cache of its own: encoders of two methods may start with the same weights.
        own = ("--seed", str(seed), "--cache", str(folder / "features" / run.name))
        found = run.evaluated(f"linear-{when}", "linear", encoder, *LINEAR, *own)
        scores[when]["linear"] = found["best"]["top1"]
        if config.objective.masked:
            what = f"finetune-{when}-{options['epochs']:g}"
            own = ("--seed", str(seed), "--out", str(folder / "tuned" / f"{run.name}-{what}"))
            length = ("--epochs", f"{options['epochs']:g}")
            found = run.evaluated(what, "finetune", encoder, *length, *own, *FINETUNE, *pooling)
            scores[when]["finetune"] = found["top1"]
    ends = {name: curve[name][-1] for name in ("images", "cpu_s")}
    return {**scores, **ends, "events": list(curve["events"])}


def method_result(recipe: str, seeds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The figures of one method.

    Args:
        recipe: of the method.
        seeds: what `measured` has found for each.
    """
    config = RECIPES[recipe]()
    architecture = config.model.architecture
    build = OBJECTIVES[type(config.objective)]
    scores = {}
    for score in seeds[0]["end"]:
        starts, ends = ([one[when][score] for one in seeds] for when in ("start", "end"))
        gains = [end - start for start, end in zip(starts, ends, strict=True)]
        found = {"start": starts, "end": ends, "gain": gains}
        scores[score] = {what: summary(values) for what, values in found.items()}
    return {
        "recipe": recipe,
        "trunk": f"{architecture}/{PATCH}" if config.model.family == "vit" else architecture,
        "masked": config.objective.masked,
        "labels": bool(build.__self__.needs_labels),  # type: ignore[attr-defined]
        "scores": scores,
        **{name: summary([one[name] for one in seeds]) for name in ("images", "cpu_s")},
        "seeds": [
            {name: one[name] for name in ("start", "end", "images", "cpu_s")} for one in seeds
        ],
    }


def shortfall(found: Mapping[str, Any], needed: float) -> str:
    """Why a method has not gained enough over random weights; empty if it has."""
    judged = ("linear", "finetune") if found["masked"] else ("knn",)
    least = {score: found["scores"][score]["gain"]["min"] for score in judged}
    best = max(least, key=least.__getitem__)
    if least[best] >= needed:
        return ""
    return (
        f"{TITLES[best]} gained {100 * least[best]:.1f} points over random weights, "
        f"{100 * needed:.1f} are needed,"
    )


def table(result: Mapping[str, Any]) -> str:
    """A row for each method, then what is unstable."""
    head = (
        "method",
        "encoder",
        *(f"{title}, random -> trained" for title in TITLES.values()),
        *(f"gain of the worse seed in points: {title}" for title in TITLES.values()),
        "images seen",
        "CPU-seconds",
        "note",
    )
    rows = []
    for name, found in result.get("methods", {}).items():
        scores = found["scores"]
        before_after = [
            f"{scores[score]['start']['mean']:.1%} -> {scores[score]['end']['mean']:.1%}"
            if score in scores
            else ""
            for score in TITLES
        ]
        gains = [
            f"{100 * scores[score]['gain']['min']:.1f}" if score in scores else ""
            for score in TITLES
        ]
        notes = ["masked"] * found["masked"] + ["sees labels in training"] * found["labels"]
        cost = (f"{found['images']['mean']:,.0f}", f"{found['cpu_s']['mean']:.1f}")
        rows.append((name, found["trunk"], *before_after, *gains, *cost, ", ".join(notes)))
    lines = [markdown(head, rows)]
    if reason := result.get("skipped_because"):
        lines.append(f"Skipped: {reason}.")
    lines += [f"unstable: {name}: {why}" for name, why in result.get("unstable", {}).items()]
    return "\n\n".join(lines)


def charts(result: Mapping[str, Any]) -> list[Chart]:
    """Gain of each score over random weights, by method."""
    found: list[Chart] = []
    for score, title in TITLES.items():
        bars = {}
        for name, method in result.get("methods", {}).items():
            if score in method["scores"]:
                gain = method["scores"][score]["gain"]
                bars[name] = (100 * gain["mean"], 100 * gain["min"], 100 * gain["max"])
        if bars:
            title = f"{title}: gain over random weights"
            found.append(Bars(title=title, unit="points", bars=bars))
    return found
