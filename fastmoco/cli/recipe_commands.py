"""The commands that take a recipe, or a config file, and overrides: `train`, `print-config`, `plan`,
`profile` and `tune`; and `recipes`.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro

from fastmoco.cli import plan as cli_plan
from fastmoco.cli import profile as cli_profile
from fastmoco.cli import tune as cli_tune
from fastmoco.cli.collection import collection_paused
from fastmoco.cli.config_text import Format, config_text
from fastmoco.cli.mistakes import Wording, parse, sort_words, worded
from fastmoco.cli.opening import announce, suggestion
from fastmoco.cli.options import Described, describe, docstring
from fastmoco.cli.output import run_logged
from fastmoco.cli.pages import HELP, no_recipe, of_config, show_page
from fastmoco.cli.plan import PlanArguments
from fastmoco.cli.profile import ProfileArguments
from fastmoco.cli.suggest import near_options
from fastmoco.cli.tune import TuneArguments
from fastmoco.cli.words import typed_path
from fastmoco.config import Config
from fastmoco.config.limits import require_limits
from fastmoco.errors import EXIT_REFUSED, close_output, one_line, say
from fastmoco.errors.log import Style
from fastmoco.faults.start_up import StartUp
from fastmoco.recipes import EXPECTED, RECIPES, get_recipe, with_image_size
from fastmoco.recipes.files import is_config_file, near_fields, read_config
from fastmoco_pipelines.spec import require
from fastmoco_pipelines.text import first_sentence


@dataclass(frozen=True, kw_only=True)
class TrainArguments:
    """Pre-train an encoder. The same command again continues the run; SIGTERM
    and Ctrl-C save and exit with code 75.
    """

    out: Path
    """Folder of the run: checkpoints, metrics.jsonl, config.json, curves.png."""
    gpus: int = 0
    """Processes to start on this machine, one per GPU, or on its CPU; 0: this one alone, or as one
    of several under torchrun or srun."""
    allow: tuple[str, ...] = ()
    """Fields that may differ from those of the run in --out, e.g. optim.lr; the
    error of a refused run lists them."""
    trust: bool = False
    """Continue from a checkpoint in --out that another run wrote. Its SHA-256 is still checked."""
    log: Style = "auto"
    """How progress is shown; json is for programs. `auto`: a table on a terminal, else lines."""
    config: Annotated[Config, tyro.conf.arg(name="")]

    def __post_init__(self) -> None:
        require_limits(self)
        require(self.gpus >= 0, "gpus", self.gpus, "must be 0 or the number of processes")


@dataclass(frozen=True, kw_only=True)
class ConfigArguments:
    """Print the config of a recipe with these overrides, as a file that every command takes in place
    of a recipe."""

    format: Format = "yaml"
    """How it is written."""
    comments: bool = True
    """Write the help of each field above it. JSON has no comments."""
    config: Annotated[Config, tyro.conf.arg(name="")]


P = TypeVar("P", TrainArguments, ConfigArguments, PlanArguments, ProfileArguments, TuneArguments)

FOLLOWS = {
    f"data.{view}.{name}": "model.image_size"
    for view in ("view1", "view2", "more_views.0", "more_views.1", "more_views.2")
    for name in ("size", "base_size", "shift", "blur_sigma")
}
"""Options that `--model.image-size` changes."""
REQUIRED: dict[type, tuple[str, ...]] = {TrainArguments: ("data.images",)}
"""Options of a config that a command needs although they have a default."""


def parse_config(kind: type[P], verb: str, args: list[str]) -> P | None:
    """A recipe and its overrides; None if no recipe is named.

    Raises:
        SystemExit: with 0 after a help page, with 2 for a mistake.
    """
    recipe, rest = _split(kind, args)
    if set(args) & set(HELP):
        whole = "--help-all" in args
        if recipe is None and not whole:
            show_page(_without_recipe(kind, verb))
        else:
            show_page(_page(kind, verb, recipe, whole=whole))
        raise SystemExit(0)
    if recipe is None and not args:
        print(
            f"usage: fastmoco {verb} RECIPE [options]; `fastmoco {verb} --help` describes both\n"
            "recipes:"
        )
        recipes([])
        return None
    if recipe is None:
        hint = suggestion(args) if verb == "train" else None
        if hint is not None:
            say(f"name a recipe; for these images: {hint}")
            return None
        say(
            f"name a recipe: fastmoco {verb} RECIPE {shlex.join(args)}; `fastmoco recipes` lists them"
        )
        return None
    base = base_config(recipe)
    origin = _origin(recipe)
    with worded(wording(kind, base, rest, origin)), one_line(EXIT_REFUSED, ValueError):
        config = _follow_image_size(base, rest)
    return parse(
        kind,
        f"{verb} {shlex.quote(recipe)}",
        rest,
        default=_defaults(kind, config),
        follows=FOLLOWS,
        origin=origin,
    )


def base_config(word: str) -> Config:
    """The config of a recipe, or of a file.

    Raises:
        SystemExit: with 2, after a message, if there is none.
    """
    with one_line(EXIT_REFUSED, ValueError, OSError):
        if not is_config_file(word):
            return get_recipe(word)
        return read_config(Path(word), near=_near, meant=typed_path)


def _near(name: str, config: Config) -> list[str]:
    """Fields that an unknown key of a file may mean: as options, also by words of other scripts."""
    found = [option.name for option in near_options(name, describe(Config, config))]
    return found or near_fields(name, config)


def wording(
    kind: type[P], config: Config, args: list[str], origin: str = ""
) -> Callable[[Exception], str]:
    """How errors of fields are shown for these words.

    Args:
        kind: of the command.
        config: with the words applied, or of the recipe alone.
        args: the words.
        origin: where values come from that were not typed; empty: by the recipe among the words.
    """
    described = describe(kind, _defaults(kind, config))

    def shown(error: Exception) -> str:
        place = origin or _origin(_split(kind, args)[0])
        return Wording(described, args, FOLLOWS, place)(error)

    return shown


def _origin(recipe: str | None) -> str:
    """How errors call the place of values that were not typed."""
    return recipe if recipe is not None and is_config_file(recipe) else "the recipe"


def _defaults(kind: type[P], config: Config) -> P:
    """The defaults of a command with a recipe."""
    missing: Any = tyro.MISSING
    fields: dict[str, Any] = {"config": config}
    writes = kind in (TrainArguments, TuneArguments)
    return kind(**fields | ({"out": missing} if writes else {}))


def _split(kind: type[P], args: list[str]) -> tuple[str | None, list[str]]:
    """The recipe, which may also come after options, and the other words."""
    if args and not args[0].startswith("-"):
        return args[0], args[1:]
    words: list[str] = [word for word in args if word not in HELP]
    place: int | None = sort_words(words, describe(kind, _defaults(kind, Config()))).first_place
    if place is None:  # perhaps after an option that does not exist
        place = next((i for i, word in enumerate(words) if word in RECIPES), None)
    if place is None:
        return None, words
    recipe = words.pop(place)
    return recipe, words


def _page(kind: type[P], verb: str, recipe: str | None, *, whole: bool) -> str:
    """The help of a command with a recipe."""
    about = ""
    config = Config()
    if recipe is not None:
        config = base_config(recipe)
    if recipe in RECIPES:
        about = f"{recipe}: {first_sentence(docstring(RECIPES[recipe]))}"
        about += f" {EXPECTED[recipe]}" if recipe in EXPECTED else ""
    return of_config(
        f"{verb} {recipe or 'RECIPE'}",
        describe(kind, _defaults(kind, config)),
        about=about,
        also_required=REQUIRED.get(kind, ()),
        whole=whole,
    )


def _without_recipe(kind: type[P], verb: str) -> str:
    """The help of a command before a recipe is chosen."""
    described = describe(kind, _defaults(kind, Config()))
    methods = groupby(RECIPES, key=lambda name: get_recipe(name).objective.kind)
    recipes = [list(names) for _, names in methods]
    return no_recipe(verb, described, recipes, also_required=REQUIRED.get(kind, ()))


def _follow_image_size(config: Config, args: list[str]) -> Config:
    """Apply `--model.image-size` to the views too, unless their sizes are given."""
    given = {}
    for name, value in zip(args, [*args[1:], ""], strict=False):
        key, _, inline = name.replace("_", "-").partition("=")
        given[key] = inline or value
    size = given.get("--model.image-size")
    patch = given.get("--model.patch-size", str(config.model.patch_size))
    if size is None or not (_is_small(size) and _is_small(patch)):
        return config
    return with_image_size(config, int(size), patch_size=int(patch))


def _is_small(text: str) -> bool:
    """Whether a text is a number of pixels; of any other the option itself is refused."""
    return text.isascii() and text.isdigit() and len(text) < 10


def recipes(args: list[str]) -> int:
    """List the recipes, with the accuracy that is published for them."""
    del args
    width = max(map(len, RECIPES))
    for name, recipe in RECIPES.items():
        print(f"  {name:<{width}} {first_sentence(docstring(recipe))}")
        if name in EXPECTED:
            print(f"  {'':<{width}} {EXPECTED[name].brief}")
    return 0


def print_config(args: list[str]) -> int:
    """Print the config of a recipe with overrides."""
    parsed = parse_config(ConfigArguments, "print-config", args)
    if parsed is None:
        return EXIT_REFUSED
    show_page(config_text(parsed.config, parsed.format, comments=parsed.comments))
    return 0


def plan(args: list[str]) -> int:
    """Memory, FLOPs, micro-batches and largest batches of a recipe on given GPUs."""
    parsed = parse_config(PlanArguments, "plan", args)
    if parsed is None:
        return EXIT_REFUSED
    with worded(wording(PlanArguments, parsed.config, args)):
        return cli_plan.plan(parsed)


def profile(args: list[str]) -> int:
    """Where the time of a recipe's steps goes on this machine."""
    parsed = parse_config(ProfileArguments, "profile", args)
    if parsed is None:
        return EXIT_REFUSED
    with worded(wording(ProfileArguments, parsed.config, args)):
        return cli_profile.profile(parsed)


def tune(args: list[str]) -> int:
    """Measure what changes only speed, and write a launch script with the fastest settings."""
    parsed = parse_config(TuneArguments, "tune", args)
    if parsed is None:
        return EXIT_REFUSED
    with worded(wording(TuneArguments, parsed.config, args)):
        recipe = _split(TuneArguments, args)[0]
        # The script may be started in another folder.
        trained = os.path.abspath(recipe) if recipe and is_config_file(recipe) else recipe
        typed = _typed(args, describe(TuneArguments, parsed))
        return cli_tune.tune(parsed, typed, trained or parsed.config.recipe)


def _typed(args: list[str], described: Described) -> dict[str, tuple[str, ...]]:
    """The options that are typed in a command without mistakes, each with its words."""
    typed: dict[str, tuple[str, ...]] = {}
    for name, values in sort_words(args, described).values.items():
        option = described.named(name)
        assert option is not None  # noqa: S101 - a type: the words were sorted by these options
        if option.count == 0:
            typed[name] = (option.flag if values[0] == "True" else option.negative,)
        else:
            typed[name] = (option.flag, *values)
    return typed


def train(args: list[str], *, process_ends: bool = False) -> int:
    """Pre-train from a recipe; the same command again continues."""
    with StartUp() as start_up:
        code = _train(args, start_up, process_ends=process_ends)
    if process_ends:
        close_output()
    return code


def _train(args: list[str], start_up: StartUp, *, process_ends: bool) -> int:
    try:
        parsed = parse_config(TrainArguments, "train", args)
    except SystemExit:
        if "TORCHELASTIC_RUN_ID" not in os.environ:
            raise
        from fastmoco.faults.restarts import refusals_are_final

        with refusals_are_final():  # otherwise torchrun would start the same command again
            raise
    if parsed is None:
        return EXIT_REFUSED
    announce(parsed.config)
    with worded(wording(TrainArguments, parsed.config, args)):
        return run_logged(
            parsed.log,
            lambda: _run(parsed, args, start_up, process_ends=process_ends),
            starts_others=parsed.gpus > 0,
        )


def _run(parsed: TrainArguments, args: list[str], start_up: StartUp, *, process_ends: bool) -> int:
    """Train in this process, or start others that do."""
    if parsed.gpus:
        from fastmoco.cli.launch import launch

        start_up.end()
        with one_line(EXIT_REFUSED, ValueError, OSError):
            words = ["train", *_without_gpus(args)]
            return launch(parsed.gpus, words, parsed.out, device=parsed.config.device)
    start_up.opens(parsed.out)
    with collection_paused():
        from fastmoco.cli.train import train

    return train(
        parsed.config,
        parsed.out,
        allow=parsed.allow,
        trust=parsed.trust,
        process_ends=process_ends,
        begun=start_up.end,
    )


def _without_gpus(args: list[str]) -> list[str]:
    """The arguments of one of several processes."""
    kept = [
        word for i, word in enumerate(args) if word != "--gpus" and args[max(i - 1, 0)] != "--gpus"
    ]
    return [word for word in kept if not word.startswith("--gpus=")]
