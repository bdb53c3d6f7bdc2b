"""Every option with a number, of every command, with numbers that none can mean: found in the
parser's own list, so a new option is tested too."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator
from typing import Any

import pytest

from fastmoco.recipes import RECIPES, get_recipe
from fastmoco_pipelines.spec import FieldError, under
from tests.command_line import main

pytest.importorskip("tyro", reason="tyro is not installed")

from fastmoco.cli.commands import COMMANDS
from fastmoco.cli.data import ViewsArguments
from fastmoco.cli.mistakes import Wording, find_faults
from fastmoco.cli.options import Described, Option, describe, fits
from fastmoco.cli.plan import PlanArguments
from fastmoco.cli.profile import ProfileArguments
from fastmoco.cli.recipe_commands import ConfigArguments, TrainArguments, _defaults
from fastmoco.cli.tune import TuneArguments
from fastmoco.config.limits import require_limit

NEVER = ("nan", "inf", "-inf", "1e308", "-1e308", str(10**30), str(-(10**30)), "1e400", "")
"""No option takes one of these."""
ODD = ("0", "-1", "-0.0", "1e-320", "0x10", "1_0", "\u0663", "many", "\x1b[2J")
"""Some options take one of these; others refuse it with a rule."""
RECIPE_OF = {get_recipe(name).objective.kind: name for name in RECIPES}
ARGUMENTS = {
    f"{kind.__name__} {recipe}": (kind, recipe)
    for kind, recipes in (
        (ConfigArguments, (*RECIPE_OF.values(), "swav_crops_digits", "resnet_nano_e60_b256")),
        (TrainArguments, ("quickstart_digits",)),
        (PlanArguments, ("quickstart_digits",)),
        (ProfileArguments, ("quickstart_digits",)),
        (TuneArguments, ("quickstart_digits",)),
    )
    for recipe in recipes
    if recipe in RECIPES
}
FUNCTIONS = [name for name, command in COMMANDS.items() if not command.reads_words]


def kinds_of(hint: Any) -> set[type]:
    """The types of the numbers that an option takes."""
    if hint in (int, float):
        return {hint}
    return {kind for part in typing.get_args(hint) for kind in kinds_of(part)}


def numeric(described: Described) -> list[Option]:
    return [option for option in described.options if kinds_of(option.hint)]


def value_of(option: Option, word: str) -> Any:
    """What the parser makes of a word, or of several that are equal."""
    kind = int if int in kinds_of(option.hint) and fits(int, word) else float
    one = kind(word)
    count = option.count
    return one if count == 1 else (one,) * (count or 1)


def replaced(group: Any, name: str, value: Any) -> Any:
    """A group with another value of a field below it, checked as where it is built first."""
    first, _, rest = name.partition(".")
    if isinstance(group, tuple):
        with under(first):
            items = list(group)
            items[int(first)] = replaced(items[int(first)], rest, value)
        return tuple(items)
    if rest:
        with under(first):
            value = replaced(getattr(group, first), rest, value)
    return dataclasses.replace(group, **{first: value})


def refusals(
    described: Described, apply: Any, words: tuple[str, ...], options: list[Option] | None = None
) -> Iterator[tuple[str, str]]:
    """(option and word, what is said about it or "") of every option with a number."""
    for option in numeric(described) if options is None else options:
        for word in words:
            typed = [f"{option.flag}={word}"]
            if not fits(option.hint, word):
                said = find_faults(typed, described, "command")[0]
            else:
                try:
                    apply(option, value_of(option, word))
                    said = ""
                except FieldError as error:
                    said = Wording(described, typed)(error)
            yield f"{option.flag} {word}", said


@pytest.fixture(scope="module")
def seen() -> set[tuple[str, str]]:
    """Options that a case has tested; the next one leaves them out."""
    return set()


@pytest.mark.parametrize("case", ARGUMENTS)
def test_no_option_of_a_recipe_takes_a_number_beyond_all_bounds(case, seen):
    kind, recipe = ARGUMENTS[case]
    made = _defaults(kind, get_recipe(recipe))
    if hasattr(made, "out"):
        made = dataclasses.replace(made, out="run")
    objective = made.config.objective.kind

    def apply(option: Option, value: Any) -> None:
        name = option.name
        if name.partition(".")[0] in {field.name for field in dataclasses.fields(made)}:
            replaced(made, name, value)
        else:
            dataclasses.replace(made, config=replaced(made.config, name, value))

    described = describe(kind, made)
    own = {
        (objective * (option.group == "objective"), option.name): option
        for option in numeric(described)
    }
    new = [option for name, option in own.items() if name not in seen]
    seen.update(own)
    of_all_views = "data.view1, view2 and more_views="
    for given, said in refusals(described, apply, NEVER, new):
        assert said.startswith(("--", of_all_views)), given
        assert ": " in said or " needs " in said, given
    for _ in refusals(described, apply, ODD, new):
        pass  # taken or refused, nothing else is raised


@pytest.mark.parametrize("name", FUNCTIONS)
def test_no_option_of_another_command_takes_one(name):
    described = describe(COMMANDS[name].call)

    def apply(option: Option, value: Any) -> None:
        require_limit(option.name, value)

    for given, said in refusals(described, apply, (*NEVER, "-1", "many")):
        assert said.startswith("--"), given


def test_the_views_take_none_either():
    from fastmoco_pipelines.spec import moco_v3_views

    first, second = moco_v3_views()
    made = ViewsArguments(shards="a", view1=first, view2=second)
    described = describe(ViewsArguments, made)
    for given, said in refusals(
        described, lambda option, value: replaced(made, option.name, value), NEVER
    ):
        assert said.startswith("--"), given


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("train quickstart_digits --out r --gpus -1", "--gpus -1: must be 0 or the number of"),
        ("train quickstart_digits --out r --epochs 1e308", "--epochs 1e308: must be at most 1,000"),
        ("train quickstart_digits --out r --threads=1000000000", "must be at most 1,024"),
        (
            "train quickstart_digits --out r --model.hidden-dim 1000000000",
            "--model.hidden-dim 1000000000: must be at most 32,768",
        ),
        (
            "train quickstart_digits --out r --data.timeout-s 1e300",
            "--data.timeout-s 1e300: a time",
        ),
        ("data check x --workers 1000000000", "--workers 1000000000: must be at most 1,024"),
        ("data check x --seconds-per-image nan", "--seconds-per-image nan: must be finite"),
        ("eval knn r --train a --test b --k 20 -3", "--k 20 -3: must be from 0 on"),
        ("eval finetune r --train a --test b --out o --lr inf", "--lr inf: must be finite"),
        ("plan quickstart_digits --cores 100000000", "--cores 100000000: must be at most 65,536"),
    ],
)
def test_a_command_says_so_in_one_line(words, line, capsys):
    assert main(words.split()) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert line in printed.err
    assert printed.err.count("\n") == 1
