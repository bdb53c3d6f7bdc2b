"""docs/methods.md is that of the code: a row for every objective, recipes that exist, and figures that
are counted.
"""

from __future__ import annotations

import re

import pytest

from benchmarks import method_table
from benchmarks.method_table import BASE, CURE, PAGE, SMALL
from fastmoco.objectives.build import OBJECTIVES
from fastmoco.recipes import RECIPES, get_recipe

TEXT = PAGE.read_text()
METHODS = method_table.methods(TEXT)
COSTS, MEMORY = (method_table.figures(TEXT, table) for table in ("costs", "memory"))


def test_every_objective_has_a_row_in_every_table() -> None:
    kinds = {get_recipe(recipe).objective.kind for recipe in METHODS.values()}
    assert kinds == {config.kind for config in OBJECTIVES}
    assert list(COSTS) == list(MEMORY) == list(METHODS)
    for head in ("| method | loss ", "| method | golden "):
        table = TEXT.partition(head)[2].partition("\n\n")[0]
        names = tuple(re.findall(r"^\| ([^|]+) \|", table, re.MULTILINE))
        plain = [re.sub(r"\[(.*)\]\(.*\)", r"\1", method.strip()) for method in METHODS]
        assert not [method for method in plain if not method.startswith(names)], head


def test_every_recipe_of_the_page_exists() -> None:
    named = set(re.findall(r"`(\w+_(?:e\d+_b\d+\w*|digits|vit_\w+))`", TEXT))
    assert set(METHODS.values()) <= named <= set(RECIPES)


def test_what_is_published_is_that_of_the_recipes() -> None:
    assert method_table.with_tables(TEXT) == TEXT, CURE


@pytest.mark.parametrize("method", METHODS)
def test_the_state_is_that_of_the_code(method: str) -> None:
    sizes = [method_table.state(METHODS[method], size) for size in (SMALL, BASE)]
    assert sizes == MEMORY[method][::2], CURE


@pytest.mark.long
@pytest.mark.parametrize("method", METHODS)
def test_activations_and_flops_of_the_small_encoder_are_counted(method: str) -> None:
    recipe = METHODS[method]
    found = (*method_table.cost_cells(recipe, SMALL), method_table.activations(recipe, SMALL))
    assert found == (*COSTS[method][:2], MEMORY[method][1]), CURE
