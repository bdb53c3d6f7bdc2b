"""Help pages as text: the overview, a page for each command, and the short and the whole page of a
config.
"""

from __future__ import annotations

import os
import re
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from fastmoco.cli.commands import GROUPS, Command, group_of
from fastmoco.cli.options import REQUIRED, Described, Group, Option, choices, docstring
from fastmoco.cli.output import until_closed, width
from fastmoco.errors.streams import raw
from fastmoco_pipelines.text import first_sentence, without_secrets

HELP = ("-h", "--help", "--help-all")
"""Words that ask for help."""
MOST_USED = (
    "epochs",
    "global_batch_size",
    "gpus",
    "optim.lr",
    "optim.weight_decay",
    "optim.warmup_epochs",
    "objective.temperature",
    "model.architecture",
    "model.image_size",
    "model.patch_size",
    "knn.holdout",
    "knn.images",
    "knn.test_shards",
    "precision",
    "device",
    "seed",
    "checkpoint.every_minutes",
    "log_every_steps",
)
"""Options on the short page of a config, in this order; then those of the command itself."""
INSTEAD = {"data.images": "data.shards"}
"""Required options, and the one that may be given in place of each."""
SELDOM = ("recipe", "threads", "network_latency_us", "link_latency_us", "decode_ms")
"""Options without a group that only the list of all others names."""
NEEDS = {"accuracy": "objective.classes"}
"""Groups of no use to a config without another option; its short page leaves them out."""
LONG = 40
"""A list of words that is longer has its words in the text."""
Row = tuple[str, str]
"""What is typed, and what it means."""


def overview(word: str = "") -> str:
    """One line for each command, under the headings of their groups.

    Args:
        word: the first of two words: only commands that begin with it; default all.
    """
    shown: Mapping[str, Sequence[Command]] = {word.capitalize(): group_of(word)} if word else GROUPS
    rows = [(command.name, command.line) for group in shown.values() for command in group]
    column = max(len(name) for name, _ in rows) + 4
    lines = [
        f"usage: fastmoco {word} COMMAND [options]" if word else "usage: fastmoco COMMAND [options]"
    ]
    for title, commands in shown.items():
        lines += ["", heading(title)]
        lines += _rows([(command.name, command.line) for command in commands], column)
    command = f"{word} COMMAND".strip()
    lines += ["", f"fastmoco {command} --help    its options, also fastmoco help {command}"]
    return "\n".join(lines)


def of_function(name: str, described: Described) -> str:
    """The page of a command whose options are those of a function."""
    required = [o for o in described.options if o.default is REQUIRED]
    others = [o for o in described.options if o.default is not REQUIRED]
    lines = [*_usage(name, required, others), "", *_wrapped(described.about)]
    if required:
        lines += ["", heading("Required"), *_option_rows(required, whole=True)]
    if others:
        lines += ["", heading("Options"), *_option_rows(others, whole=True)]
    return "\n".join(lines)


def of_config(
    name: str,
    described: Described,
    *,
    about: str = "",
    also_required: Sequence[str] = (),
    whole: bool = False,
) -> str:
    """The page of a command with a config.

    Args:
        name: of the command, with its recipe.
        described: its options.
        about: what the recipe is.
        also_required: options that have a default which cannot be used.
        whole: every option with its whole text; default required and most used ones, and the names
            of the others.
    """
    required = _required(described, also_required)
    others = [
        option
        for option in described.options
        if option not in required and option.name not in _second(required)
    ]
    lines = [*_usage(name, required, list(described.options))]
    lines += ["", *_wrapped(described.about), *_wrapped(about)]
    if required:
        lines += ["", heading("Required"), *_required_rows(described, required, whole=whole)]
    lines += _whole(described, others) if whole else _short(name, described, others)
    return "\n".join(lines)


def no_recipe(
    verb: str,
    described: Described,
    recipes: Sequence[Sequence[str]],
    *,
    also_required: Sequence[str] = (),
) -> str:
    """The page of a command with a config before a recipe is chosen.

    Args:
        verb: the command.
        described: its options, with the defaults of no recipe.
        recipes: their names, by method.
        also_required: as of `of_config`.
    """
    required = _required(described, also_required)
    lines = _usage(f"{verb} RECIPE", required, list(described.options))
    lines += ["", *_wrapped(described.about), *_wrapped(RECIPE)]

    # Names have method, encoder, epochs and batch: a method's are in as few lines as they fit in.
    lines += ["", heading("Recipes by method (fastmoco recipes describes each)")]
    for names in recipes:
        line = ""
        for name in names:
            if line and len(line) + 2 + len(name) > width():
                lines.append(line)
                line = ""
            line += f"  {name}"
        lines.append(line)
    if required:
        lines += ["", heading("Required"), *_required_rows(described, required)]
    first = {option.name for option in required} | _second(required)
    used = _used([option for option in described.options if option.name not in first])
    # A recipe has its own defaults.
    used = [
        replace(option, default=None) if option.name in MOST_USED else option for option in used
    ]
    lines += ["", heading("Most used"), *_option_rows(used)]
    more = [
        (f"fastmoco {verb} RECIPE --help", "these with the recipe's values, and all groups"),
        (f"fastmoco {verb} RECIPE --help-all", "every option"),
    ]
    lines += ["", heading("More"), *_rows(more, _column())]
    return "\n".join(lines)


RECIPE = (
    "A recipe is a complete config: model, views, schedule and batch. Every field can be changed by "
    "an option; `fastmoco print-config RECIPE` shows them all."
)
"""What a recipe is."""


def _required(described: Described, also: Sequence[str]) -> list[Option]:
    """The options that must be given, those of the config last."""
    required = [o for o in described.options if o.default is REQUIRED]
    by_name = {option.name: option for option in described.options}
    return [*required, *(by_name[name] for name in also if by_name[name] not in required)]


def _second(required: Sequence[Option]) -> set[str]:
    """Names of the options that may be given in place of required ones."""
    return {INSTEAD[option.name] for option in required if option.name in INSTEAD}


def _required_rows(
    described: Described, required: Sequence[Option], *, whole: bool = False
) -> list[str]:
    """Rows of options that must be given, also of those whose default cannot be used."""
    rows = []
    for option in required:
        other = described.named(INSTEAD.get(option.name, ""))
        for one, instead in ((option, other), (other, option)) if other else ((option, None),):
            left, text = _option_row(replace(one, default=REQUIRED), whole)
            if instead is not None:
                text = text.removesuffix("required)") + f"required, or {instead.flag})"
            rows.append((left, text))
    return _rows(rows, _column())


def _used(options: Sequence[Option]) -> list[Option]:
    """The options of the short page."""
    by_name = {option.name: option for option in options}
    own = [name for name, o in by_name.items() if not o.group and o.help and name not in SELDOM]
    return [by_name[name] for name in dict.fromkeys((*MOST_USED, *own)) if name in by_name]


def _short(name: str, described: Described, others: list[Option]) -> list[str]:
    """The most used options, and a line or two for each group."""
    lines = ["", heading("Most used"), *_option_rows(_used(others))]
    lines += ["", heading("All others, by group")]
    rows = []
    for groups in _merged(described.groups):
        names = [o.flag.rpartition(".")[2].removeprefix("--") for o in _members(described, groups)]
        needed = NEEDS.get(groups[0].name)
        if needed is not None and described.named(needed) is None:
            continue
        if groups[0].name and names:
            flags = ", ".join(f"--{_dashed(group.name)}.*" for group in groups)
            rows.append((flags, first_sentence(_about(groups)) + f" [{', '.join(names)}]"))
    rows += [(o.flag, first_sentence(o.help)) for o in others if o.name in SELDOM]
    lines += _rows(rows, _column())
    return [*lines, "", f"fastmoco {name} --help-all describes every option."]


def _whole(described: Described, others: list[Option]) -> list[str]:
    """Every option, by group."""
    lines: list[str] = []
    for groups in _merged(described.groups):
        members = [option for option in _members(described, groups) if option in others]
        if not members:
            continue
        if not groups[0].name:
            lines += ["", heading("Options"), *_option_rows(members, whole=True)]
            continue
        flags = ", ".join(f"--{_dashed(group.name)}.*" for group in groups)
        lines += ["", heading(flags), *_wrapped(_about(groups))]
        if len(groups) == 1:
            lines += _option_rows(members, whole=True)
        else:
            lines += _rows(
                [_shared_row(described, groups, option) for option in members], _column()
            )
    return lines


def _merged(groups: Iterable[Group]) -> list[list[Group]]:
    """Groups of one dataclass together, e.g. all views."""
    merged: dict[object, list[Group]] = {}
    for group in groups:
        merged.setdefault(group.kind or group.name, []).append(group)
    return list(merged.values())


def _about(groups: list[Group]) -> str:
    """The line of merged groups: that of their dataclass, or of the only one."""
    if len(groups) == 1 or groups[0].kind is None:
        return groups[0].about
    return " ".join(docstring(groups[0].kind).partition("\n\n")[0].split())


def _members(described: Described, groups: list[Group]) -> list[Option]:
    """The options of the first of merged groups."""
    return [option for option in described.options if option.group == groups[0].name]


def _shared_row(described: Described, groups: list[Group], option: Option) -> Row:
    """An option that each of several groups has, with the defaults that differ."""
    last = option.name.rpartition(".")[2]
    defaults = [option.shown_default]
    for group in groups[1:]:
        other = described.named(f"{group.name}.{last}")
        if other is not None and other.default != option.default:
            defaults.append(f"{_dashed(group.name).rpartition('.')[2]}: {other.shown_default}")
    text = f"{option.help} (default {'; '.join(defaults)})"
    return f"*.{_dashed(last)} {option.value}", text


def _usage(name: str, required: list[Option], others: list[Option]) -> list[str]:
    """The line of usage: what must be given, in the order in which it is typed."""
    words = [option.flag for option in required if option.positional]
    typed = [_typed(o, others) for o in required if not o.positional]
    # An option and its value stay on one line.
    words += [re.sub(r"(--\S+) ", "\\1\N{NO-BREAK SPACE}", text) for text in typed]
    words += ["[options]"] if others else []
    line = f"usage: fastmoco {' '.join([name, *words])}"
    lines = textwrap.wrap(line, width(), subsequent_indent="    ", break_on_hyphens=False)
    return [line.replace("\N{NO-BREAK SPACE}", " ") for line in lines]


def _typed(option: Option, options: Sequence[Option]) -> str:
    """A required option as it is typed, with the one that may be given in its place."""
    words = f"{option.flag} {option.value}".strip()
    if option.name not in INSTEAD:
        return words
    other = next(o for o in options if o.name == INSTEAD[option.name])
    return f"({words} | {other.flag} {other.value})"


def _option_rows(options: Sequence[Option], *, whole: bool = False) -> list[str]:
    """A row for each option, required ones marked."""
    return _rows([_option_row(option, whole) for option in options], _column())


def _option_row(option: Option, whole: bool) -> Row:
    text = option.help if whole else first_sentence(option.help)
    value = option.value
    if len(value) > LONG:
        value = "NAME"
        text += f" One of {', '.join(choices(option.hint))}." if whole else ""
    left = option.flag if option.positional else f"{option.flag} {value}".strip()
    return left, text + _mark(option)


def _mark(option: Option) -> str:
    """What follows the text of an option: that it is required, or its default."""
    if option.default is REQUIRED:
        return "" if option.positional else " (required)"
    if option.negative:
        return f" (default on; off: {option.negative})" if option.default else ""
    return "" if option.default in (None, "", ()) else f" (default {option.shown_default})"


def _rows(rows: Sequence[Row], column: int) -> list[str]:
    """Two aligned columns; a long left side has a line of its own."""
    lines = []
    for left, text in rows:
        room = max(20, width() - column)
        wrapped = textwrap.wrap(text, room, break_on_hyphens=False) or [""]
        if len(left) > column - 4:
            lines.append(f"  {left}")
        else:
            lines.append(f"  {left:<{column - 2}}{wrapped.pop(0)}".rstrip())
        lines += [" " * column + part for part in wrapped]
    return lines


def _wrapped(text: str) -> list[str]:
    """Paragraphs, wrapped."""
    lines: list[str] = []
    for paragraph in text.split("\n\n") if text else []:
        lines += [*([""] if lines else []), *textwrap.wrap(" ".join(paragraph.split()), width())]
    return lines


def _dashed(name: str) -> str:
    return name.replace("_", "-")


def _column() -> int:
    """Where the texts of options begin: most flags fit before it, if there is room for the text."""
    return 34 if width() >= 90 else 26


def heading(text: str) -> str:
    """A heading: bold on a terminal, unless NO_COLOR is set."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return text if plain or not sys.stdout.isatty() else f"\033[1m{text}\033[0m"


def show_page(text: str) -> None:
    """Print a page, also into a pipe that ends early, e.g. `| head`."""
    with until_closed():
        print(without_secrets(text), file=raw(sys.stdout))
