"""A page for each method with its recipes: their numbers, their schedules, and what has been measured
and published of each. All of it is from `fastmoco.recipes` and `benchmarks/results/`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch

from benchmarks.plot import lines_of
from benchmarks.shown import markdown
from benchmarks.site.charts import Panel, Points, figure
from fastmoco.cli.options import docstring
from fastmoco.config import Config, resolve
from fastmoco.objectives.build import build_model
from fastmoco.objectives.interface import Objective, Progress
from fastmoco.optim import run_learning_rate
from fastmoco.recipes import EXPECTED, RECIPES, get_recipe
from fastmoco_pipelines.spec import each_view
from fastmoco_pipelines.text import first_sentence

IMAGENET, SMALL = 1_281_167, 51_200
"""Images of ImageNet's training set; and of the small set for which the schedules of the recipes for
a CPU are drawn. Schedules are functions of the epoch but for the rounding of steps."""
POINTS = 120
"""Points of a schedule."""
TITLES = {
    "byol": "BYOL",
    "cmae": "CMAE",
    "dino": "DINO",
    "esvit": "EsViT",
    "extrema": "ExtreMA",
    "fcmae": "FCMAE",
    "macrl": "MACRL",
    "mae": "MAE",
    "maskfeat": "MaskFeat",
    "moby": "MoBY",
    "moco": "MoCo v1 and v2",
    "moco_v3": "MoCo v3",
    "mp3": "MP3",
    "projector_momentum": "Projector-only momentum",
    "sdssl": "SDSSL",
    "simclr": "SimCLR",
    "simsiam": "SimSiam",
    "small": "MoCo v3, small images",
    "supervised": "With labels",
    "supmae": "SupMAE",
    "swav": "SwAV",
    "token_dropping": "MoCo v3, fewer tokens",
}
"""Titles of the pages, by the module that has the recipes."""


def groups() -> dict[str, list[str]]:
    """The names of the recipes by page, in the order of `fastmoco recipes`.

    Raises:
        KeyError: if a module of recipes has no title.
    """
    found: dict[str, list[str]] = {}
    for name, recipe in RECIPES.items():
        found.setdefault(recipe.__module__.rpartition(".")[2], []).append(name)
    untitled = sorted(set(found) - set(TITLES))
    if untitled:
        raise KeyError(f"benchmarks/site/recipes.py: TITLES lacks {', '.join(untitled)}")
    return found


def nav() -> list[dict[str, str] | str]:
    """The part of the navigation with the methods."""
    return ["recipes/index.md", *({TITLES[page]: f"recipes/{page}.md"} for page in groups())]


def addresses() -> dict[str, str]:
    """The section of each recipe, from the root of the site."""
    return {
        name: f"recipes/{page}.html#{name}" for page, names in groups().items() for name in names
    }


def make() -> dict[str, str]:
    """The text of every page, by its path."""
    found = {"recipes/index.md": _index()}
    for page, names in groups().items():
        parts = [f"# {TITLES[page]}", *(_section(name) for name in names)]
        found[f"recipes/{page}.md"] = "\n\n".join(parts) + "\n"
    return found


def _index() -> str:
    parts = [
        "# Recipes",
        "A recipe is a complete configuration under a name: method, encoder, views, optimizer and "
        "schedules. Every number of it is an option. What is published is stated with its source; "
        "what was measured here was measured on two CPU cores, and none of the results on ImageNet "
        "has been reproduced with fastmoco.",
    ]
    for page, names in groups().items():
        rows = [
            f"| [`{name}`]({page}.md#{name}) | {first_sentence(docstring(RECIPES[name]))} |"
            for name in names
        ]
        parts += [f"## {TITLES[page]}", "\n".join(["| recipe | |", "|---|---|", *rows])]
    return "\n\n".join(parts) + "\n"


# --- one recipe


def _section(name: str) -> str:
    config = get_recipe(name)
    small = config.model.image_size < 64
    parts = [f"## {name} {{ #{name} }}", first_sentence(docstring(RECIPES[name]))]
    parts += [f"```bash\n{_command(name, config, small=small)}\n```"]
    parts += [markdown(("setting", "value"), _settings(config)), _schedules(name, config, small)]
    parts += ["**Published.** " + str(EXPECTED[name])] if name in EXPECTED else []
    parts += _measured(name)
    return "\n\n".join(parts)


def _command(name: str, config: Config, *, small: bool) -> str:
    images = "--data.images YOUR_IMAGES --knn.holdout 10%"
    classes = " --objective.classes CLASSES" if hasattr(config.objective, "classes") else ""
    gpus = "" if small else " --gpus 8"
    return f"fastmoco train {name} \\\n    {images}{classes} \\\n    --out runs/{name}{gpus}"


@cache
def _objective(name: str) -> tuple[Objective, int]:
    """A recipe's objective without memory, and its parameters that train."""
    config = get_recipe(name)
    if hasattr(config.objective, "classes"):  # they are those of the data: 1000 as of ImageNet
        config = replace(config, objective=replace(config.objective, **{"classes": 1000}))
    with torch.device("meta"):
        objective = build_model(config)
    return objective, sum(p.numel() for p in objective.parameters() if p.requires_grad)


def _settings(config: Config) -> list[tuple[str, str]]:
    objective, parameters = _objective(config.recipe)
    model, optim = config.model, config.optim
    sizes: dict[int, int] = {}
    for view in each_view(config.data.views):
        sizes[view.size] = sizes.get(view.size, 0) + 1
    rows = [
        ("encoder", f"`{model.architecture}`" + (_patches(config))),
        ("parameters that train, heads included", _millions(parameters)),
        ("views", ", ".join(f"{count} of {size} pixels" for size, count in sizes.items())),
        ("epochs", f"{config.epochs:g}, {optim.warmup_epochs:g} of them warm-up"),
        ("batch", f"{config.global_batch_size} images over all processes"),
        ("optimizer", f"`{optim.name}`, weight decay {optim.weight_decay:g}"),
        ("learning rate", f"{_rate(config)}, `{optim.schedule}`"),
    ]
    loss = objective.uninformed_loss(config.global_batch_size)
    if loss is not None:
        classes = " (of 1000 classes)" if hasattr(config.objective, "classes") else ""
        rows.append(("loss of an encoder that knows nothing", f"{loss:.3f}{classes}"))
    temperature = getattr(config.objective, "temperature", None)
    if isinstance(temperature, float):
        rows.append(("temperature", f"{temperature:g}"))
    return rows


def _patches(config: Config) -> str:
    return f", patches of {config.model.patch_size}" if config.model.family == "vit" else ""


def _millions(count: int) -> str:
    return f"{count / 1e6:.1f} M" if count >= 1e6 else f"{count / 1e3:.0f} k"


def _rate(config: Config) -> str:
    rules = {"none": "", "sqrt": " x sqrt(batch)", "linear": " x batch / 256"}
    rule = rules.get(config.optim.lr_scaling, f" x {config.optim.lr_scaling}")
    return f"{config.optim.lr:g}{rule}" + (f" = {config.peak_lr:.3g}" if rule else "")


def _schedules(name: str, config: Config, small: bool) -> str:
    """Charts of what changes during the run."""
    objective, _ = _objective(name)
    images = max(SMALL if small else IMAGENET, config.global_batch_size)
    resolved = resolve(config, world_size=1, sample_count=images)
    total = resolved.total_steps
    steps = sorted({round(i * (total - 1) / (POINTS - 1)) for i in range(POINTS)})
    curves: dict[str, list[tuple[float, float]]] = {}
    for step in steps:
        epoch = step / resolved.steps_per_epoch
        at = Progress(step=step, total_steps=total, steps_per_epoch=resolved.steps_per_epoch)
        curves.setdefault("learning rate", []).append(
            (epoch, run_learning_rate(step, config, resolved))
        )
        for what, value in objective.schedules(at).items():
            curves.setdefault(what.replace("_", " "), []).append((epoch, float(value)))
    panels = [Panel(what, "epoch", {what: points}) for what, points in curves.items()]
    on = "51,200 images" if small else "ImageNet"
    return figure(panels, f"Schedules of {name} on {on}.")


# --- what was measured


@dataclass(frozen=True)
class _Curves:
    """kNN and loss of the seeds of one result, against the images seen."""

    where: str
    knn: Mapping[str, Points]
    loss: Mapping[str, Points]
    said: str


def _measured(name: str) -> list[str]:
    parts = []
    for curves in (found for read in (_of_methods, _of_learning) for found in read(name)):
        panels = [
            Panel("kNN accuracy, %", "images seen", curves.knn),
            Panel("loss", "images seen", curves.loss),
        ]
        parts += [
            f"**Measured on {curves.where}.** {curves.said}",
            figure(panels, f"{name} on {curves.where}: every seed is a line."),
        ]
    parts += _of_photographs(name)
    if not parts:
        parts = [
            "**Measured.** No result is committed for this recipe; "
            "[what normal looks like](../normal.md) describes the signs of a healthy run."
        ]
    return parts


def _of_methods(name: str) -> Iterable[_Curves]:
    """Results of the benchmark case `methods`: Fashion-MNIST at equal CPU-seconds."""
    lines = lines_of().get("methods", [])
    for method in (m for line in lines for m in line["result"]["methods"].values()):
        if method["recipe"] == name:
            yield _curves("Fashion-MNIST", method)


def _of_learning(name: str) -> Iterable[_Curves]:
    """The newest result of the case `learning`, of what `methods` does not have."""
    for task, result in lines_of()["learning"][-1]["result"]["tasks"].items():
        if result["recipe"] == name and task != "fashion":
            where = "color patches of photographs" if task == "patches" else task
            yield _curves(where, result["sides"]["fastmoco"])


def _curves(where: str, result: Mapping[str, Any]) -> _Curves:
    seeds = {f"seed {curve['seed']}": curve for curve in result["curves"]}
    said = (
        f"kNN from {_percent(result['start'])} to {_percent(result['by_seconds'])}, the mean of "
        f"{len(seeds)} seeds, with {result['images_per_cpu_s']['mean']:,.0f} images per CPU-second "
        "([how it was taken](../performance.md))."
    )
    return _Curves(where, _lines(seeds, "knn", 100), _lines(seeds, "loss", 1), said)


def _lines(seeds: Mapping[str, Any], what: str, scale: float) -> dict[str, Points]:
    return {
        name: [
            (x, y * scale)
            for x, y in zip(curve["images"], curve[what], strict=True)
            if y is not None
        ]
        for name, curve in seeds.items()
    }


def _percent(found: Mapping[str, float]) -> str:
    return f"{100 * found['mean']:.1f} %"


def _of_photographs(name: str) -> list[str]:
    """A table from the newest result of the case `photographs`."""
    for method in lines_of()["photographs"][-1]["result"]["methods"].values():
        if method["recipe"] == name:
            rows = [
                (what, _percent(score["start"]), _percent(score["end"]))
                for what, score in method["scores"].items()
            ]
            return [
                f"**Measured on patches of photographs**, after {method['cpu_s']['mean']:.0f} "
                f"CPU-seconds and {method['images']['mean']:,.0f} images with the encoder "
                f"{method['trunk']} ([how it was taken](../performance.md#photographs)).",
                markdown(("score", "before", "after"), rows),
            ]
    return []
