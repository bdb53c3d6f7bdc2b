"""What a step of every method takes on ViT-S and ViT-B, counted on tensors without memory, and what
is published: three tables of docs/methods.md.

    python -m benchmarks.method_table          write them, and count the methods that have no figures
    python -m benchmarks.method_table --all    count all again, about 80 CPU-seconds

Everything else on the page is written by hand. Its first table has a row for each method with the
recipe that is counted here.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.shown import markdown
from fastmoco.config import Config, ModelConfig
from fastmoco.config.model import Architecture
from fastmoco.objectives.build import build_model
from fastmoco.planning.costs import WholeStep, count_step
from fastmoco.planning.plan import OPTIMIZER_COPIES
from fastmoco.recipes import EXPECTED, RECIPES, get_recipe

PAGE = Path(__file__).resolve().parents[1] / "docs" / "methods.md"
SIZES: dict[str, tuple[Architecture, Architecture]] = {
    "vit": ("vit_small", "vit_base"),
    "swin": ("swin_tiny", "swin_base"),
    "convnextv2": ("convnextv2_tiny", "convnextv2_base"),
}
"""The small and the base encoder of each family."""
SMALL, BASE = 0, 1
IMAGES = 4096
"""Images of the counted step."""
CLASSES = 1000
CURE = "run `python -m benchmarks.method_table --all` and commit docs/methods.md"
COUNTS: dict[tuple[str, int], WholeStep] = {}


def methods(page: str) -> dict[str, str]:
    """Recipe by method: the rows of the first table."""
    table = page[page.index("\n|") :].partition("\n\n")[0]
    return dict(re.findall(r"^\| ([^|]+) \| `(\w+)` \|", table, re.MULTILINE))


def config_of(recipe: str, size: int) -> Config:
    """A recipe with the small or the base encoder; one on a ResNet with a ViT and its own heads."""
    config = get_recipe(recipe)
    model = config.model
    if model.family == "resnet":
        model = ModelConfig(projection_dim=model.projection_dim, hidden_dim=model.hidden_dim)
    if size == BASE or model.architecture not in ("vit_small", "deit_small"):
        model = replace(model, architecture=SIZES[model.family][size])
    own: Any = config.objective
    if hasattr(own, "classes"):
        own = replace(own, classes=CLASSES)
    return replace(config, model=model, objective=own)


def counted(recipe: str, size: int) -> WholeStep:
    """A step of a recipe with the small or the base encoder, in bf16."""
    key = (recipe, size)
    if key not in COUNTS:
        COUNTS[key] = count_step(config_of(recipe, size), "bf16", IMAGES)
    return COUNTS[key]


def state(recipe: str, size: int) -> str:
    """GB of weights, averages, gradients and AdamW's two moments in float32, and of buffers."""
    with FakeTensorMode():
        objective = build_model(config_of(recipe, size))
    moments = OPTIMIZER_COPIES["adamw"]
    tensors = [*objective.parameters(), *objective.buffers()]
    sizes = [tensor.nbytes * (2 + moments if tensor.requires_grad else 1) for tensor in tensors]
    return f"{sum(sizes) / 1e9:.2f}"


def activations(recipe: str, size: int) -> str:
    """MB of an image."""
    return f"{counted(recipe, size).peak_bytes / IMAGES / 1e6:.0f}"


def cost_cells(recipe: str, size: int) -> tuple[str, str]:
    """GFLOPs of an image, and the same in forwards of the encoder."""
    step = counted(recipe, size)
    return f"{step.flops / IMAGES / 1e9:.1f}", f"{step.flops / step.encoder_flops:.1f}"


def memory_cells(recipe: str, size: int) -> tuple[str, str]:
    """GB of the state, and MB of an image."""
    return state(recipe, size), activations(recipe, size)


def figures(page: str, table: str) -> dict[str, list[str]]:
    """Cells by method of a counted table as it is on the page."""
    text = page.partition(f"<!-- {table} -->")[2].partition(f"<!-- end of {table} -->")[0]
    lines = [line.strip("| ").split(" | ") for line in text.strip().splitlines()[2:]]
    return {method: cells for method, *cells in lines}


def published(rows: dict[str, str]) -> str:
    """What is known of each recipe, in the order of the methods."""
    kinds = list(dict.fromkeys(get_recipe(recipe).objective.kind for recipe in rows.values()))
    known = sorted(
        (recipe for recipe in RECIPES if recipe in EXPECTED),
        key=lambda recipe: kinds.index(get_recipe(recipe).objective.kind),
    )
    cells = []
    for recipe in known:
        expected = EXPECTED[recipe]
        of = expected.source if expected.linear is not None else f"numbers of {expected.source}"
        on = f", on {expected.hardware}" if expected.hardware else ""
        accuracy = "not published" if expected.linear is None else f"{expected.linear:.1f} %"
        cells.append((f"`{recipe}`", accuracy, f"{of}{on}. {expected.note}".rstrip()))
    return markdown(("recipe", "linear top-1", "source"), cells)


def with_tables(page: str, *, count_all: bool = False) -> str:
    """The page with its tables as they are now; figures that it has stay unless all are counted."""
    rows = methods(page)
    for name, (cells, head) in COUNTED.items():
        known = {} if count_all else figures(page, name)
        lines = [
            (
                method,
                *(known.get(method) or [*cells(recipe, SMALL), *cells(recipe, BASE)]),
            )
            for method, recipe in rows.items()
        ]
        page = _replaced(page, name, markdown(("method", *head), lines))
    return _replaced(page, "published", published(rows))


COUNTED = {
    "costs": (cost_cells, ("S: GFLOP", "S: forwards", "B: GFLOP", "B: forwards")),
    "memory": (memory_cells, ("S: state, GB", "S: MB an image", "B: state, GB", "B: MB an image")),
}
"""Name of a table -> the cells of a method and a size, and the head."""


def _replaced(page: str, name: str, table: str) -> str:
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    return f"{page.split(begin)[0]}{begin}\n\n{table}\n\n{end}{page.split(end)[1]}"


def main() -> None:
    """Write the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--all", action="store_true", help="count all methods again")
    PAGE.write_text(with_tables(PAGE.read_text(), count_all=parser.parse_args().all))


if __name__ == "__main__":
    main()
