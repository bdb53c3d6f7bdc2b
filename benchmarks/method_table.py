"""What a step of every method takes on ViT-S and ViT-B, counted on tensors without memory, and what
is published: three tables of docs/methods.md.

    python -m benchmarks.method_table            write them into the page
    python -m benchmarks.method_table --check    exit code 1 if they are not those of the code

Everything else on the page is written by hand. Its first table has a row for each method with the
recipe that is counted here, so a method without a row has no figures.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
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
CURE = "run `python -m benchmarks.method_table` and commit docs/methods.md"
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


def costs(rows: dict[str, str]) -> str:
    """GFLOPs and forwards of every method."""
    return _table(("S: GFLOP", "S: forwards", "B: GFLOP", "B: forwards"), rows, cost_cells)


def memory(rows: dict[str, str]) -> str:
    """State and bytes of an image of every method."""
    head = ("S: state, GB", "S: MB an image", "B: state, GB", "B: MB an image")
    return _table(head, rows, memory_cells)


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


TABLES: dict[str, Callable[[dict[str, str]], str]] = {
    "costs": costs,
    "memory": memory,
    "published": published,
}


def with_tables(page: str) -> str:
    """The page with its tables as they are now."""
    rows = methods(page)
    for name, make in TABLES.items():
        begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        before, after = page.split(begin)[0], page.split(end)[1]
        page = f"{before}{begin}\n\n{make(rows)}\n\n{end}{after}"
    return page


def _table(
    head: Sequence[str], rows: dict[str, str], cells: Callable[[str, int], Sequence[str]]
) -> str:
    lines = [
        (method, *cells(recipe, SMALL), *cells(recipe, BASE)) for method, recipe in rows.items()
    ]
    return markdown(("method", *head), lines)


def main() -> int:
    """Write or check the tables; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args().check
    text = PAGE.read_text()
    new = with_tables(text)
    if check:
        print("docs/methods.md is that of the code" if new == text else f"docs/methods.md: {CURE}")
        return int(new != text)
    PAGE.write_text(new)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
