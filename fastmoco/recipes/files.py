"""A config in a file: a recipe and what differs from it, in YAML, TOML or JSON; or the `config.json`
of a run.

Values pass the checks of the options. A mistake is told with the file, the line, the key, what was
found and what belongs there.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

from fastmoco.config import Config, ObjectiveConfig
from fastmoco.config.documents import SUFFIXES, Document, Key, Plain, read_document
from fastmoco.config.serial import from_json, objective_class
from fastmoco.recipes import RECIPES, get_recipe, near_recipes, with_image_size
from fastmoco_pipelines.files.small import UnfitFileError
from fastmoco_pipelines.files.whole import at_home
from fastmoco_pipelines.spec import FieldError, under
from fastmoco_pipelines.text import escaped, shown_word

CUSTOM = "custom"
"""Recipe of a file that starts from the defaults of `Config`."""
OF_THE_COMMAND = ("out", "gpus", "allow", "trust", "log")
"""Options of `fastmoco train` that are no part of a config."""
MOST_FAULTS = 20
"""That are told at once."""
_NONE = ("", "~", "null", "Null", "NULL", "None", "none")
_SWITCHES = ("yes", "no", "on", "off", "y", "n")
_INTEGER = re.compile(r"[+-]?(0|[1-9][0-9]*(_[0-9]+)*)")
_NUMBER = re.compile(r"[+-]?([0-9]+(_[0-9]+)*\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_BASE_8 = re.compile(r"[+-]?0[0-9_]+")
_INFINITE = re.compile(r"[+-]?\.?(inf|nan)", re.IGNORECASE)

Near = Callable[[str, Config], Sequence[str]]
"""Dotted names of fields that an unknown one may mean."""


def is_config_file(word: str) -> bool:
    """Whether a word in place of a recipe is the name of a file."""
    path = Path(word)
    if not word or word in RECIPES:
        return False
    if path.is_dir():
        return (path / "config.json").exists() or not near_recipes(word)
    return path.suffix.lower() in SUFFIXES or path.is_file()


def near_fields(name: str, config: Config) -> list[str]:
    """Dotted names of fields like this one, by their spelling."""
    names = list(_names(config))
    last = name.rpartition(".")[2].replace("-", "_")
    same = [known for known in names if known.rpartition(".")[2] == last]
    by_last = {known.rpartition(".")[2]: known for known in reversed(names)}
    close = difflib.get_close_matches(name.replace("-", "_"), names, n=1, cutoff=0.8)
    close += [by_last[word] for word in difflib.get_close_matches(last, by_last, n=2, cutoff=0.7)]
    return list(dict.fromkeys([*same, *close]))[:3]


def read_config(
    path: Path, *, near: Near = near_fields, meant: Callable[[str], str] = at_home
) -> Config:
    """The config of a file.

    Args:
        path: ends in .yaml, .yml, .toml or .json. Its `recipe` names what the other keys change;
            without it, or with `custom`, they change the defaults of `Config`. The config.json of a
            run is read as it is.
        near: finds what an unknown key may mean.
        meant: applied to each text, which may be a path: replaces `~`.

    Raises:
        ValueError: for each mistake one line with the file and the line in it; of the file as a
            whole it is an `UnfitFileError`.
        OSError: if the file cannot be read.
    """
    if path.is_dir():
        rest = path / "config.json"
        cure = f"give {rest}" if rest.exists() else "give a file"
        raise UnfitFileError(f"{escaped(str(path))}: is a folder; {cure}")
    document = read_document(path)
    run = document.tree.get("config")
    if isinstance(run, dict) and "recipe" not in document.tree:
        return from_json(run, file=path)
    base = _base(document)
    reader = _Reader(document, base, near, meant)
    try:
        base = _following(base, document)
        found: Config = reader.group(base, document.tree, ())
        if not reader.faults:
            return found
    except FieldError as error:
        reader.faults.append(_told(document, error, base))
    more = len(reader.faults) - MOST_FAULTS
    lines = [*reader.faults[:MOST_FAULTS], *([f"and {more} more"] if more > 0 else [])]
    raise ValueError("\n  ".join(lines))


def _base(document: Document) -> Config:
    """What the keys of a file change."""
    name = document.tree.get("recipe", CUSTOM)
    objective = document.tree.get("objective")
    kind = objective.get("kind") if isinstance(objective, dict) else None
    where = document.where(("recipe",))
    if name == CUSTOM:
        if kind is None:
            return Config()
        try:
            made: Any = objective_class(str(kind), "config")
        except ValueError as error:
            known = str(error).partition("; ")[2]
            raise ValueError(
                f"{document.where(('objective', 'kind'))}: objective.kind: got {_got(kind)}; {known}"
            ) from None
        return Config(objective=made())
    if not isinstance(name, str) or (isinstance(name, Plain) and name in _NONE):
        raise ValueError(f"{where}: recipe: got {_got(name)}, must be the name of a recipe")
    if name not in RECIPES:
        near = near_recipes(name)
        hint = f"did you mean {' or '.join(near)}?" if near else "`fastmoco recipes` lists them;"
        raise ValueError(
            f"{where}: recipe {shown_word(name)} does not exist; {hint} `recipe: {CUSTOM}` starts "
            "from the defaults of MoCo v3"
        )
    base = get_recipe(str(name))
    if kind is not None and kind != base.objective.kind:
        raise ValueError(
            f"{document.where(('objective', 'kind'))}: objective.kind: got {_got(kind)}, but recipe "
            f"{name} has {base.objective.kind}; take a recipe of that method"
        )
    return base


def _following(base: Config, document: Document) -> Config:
    """The base with views that follow the image size of the file, as with the option; sizes that the
    file gives replace them later."""
    model = document.tree.get("model")
    given = model if isinstance(model, dict) else {}
    sizes = [given.get("image_size"), given.get("patch_size", base.model.patch_size)]
    whole = [int(size) if _INTEGER.fullmatch(str(size)) else None for size in sizes]
    size, patch = whole
    if size is None or patch is None or not 0 < size < 10**6 or not 0 < patch < 10**6:
        return base
    changed = (size, patch) != (base.model.image_size, base.model.patch_size)
    return with_image_size(base, size, patch_size=patch) if changed else base


def _told(document: Document, error: FieldError, base: Config) -> str:
    """A rule that a value, or two together, break."""
    path: tuple[Key, ...] = tuple(
        int(part) if part.isdigit() else part for part in error.name.split(".")
    )
    value = error.value if isinstance(error.value, str | int | float | tuple) else "..."
    # A rule about several fields together has a name of its own.
    inherited = error.name in _names(base) and not document.has(path)
    origin = f" (of recipe {base.recipe})" if inherited else ""
    shown = shown_word(str(value)) if value != "" else "''"
    return f"{document.where(path)}: {error.name}: got {shown}{origin}: {error.rule}"


class _Reader:
    """Builds a config and collects what is wrong."""

    def __init__(
        self, document: Document, base: Config, near: Near, meant: Callable[[str], str]
    ) -> None:
        self.faults: list[str] = []
        self._document = document
        self._base = base
        self._near = near
        self._meant = meant

    def group(self, base: Any, given: Any, path: tuple[Key, ...]) -> Any:
        """A dataclass with the values of a group of the file.

        Raises:
            FieldError: of a rule that the values break, by its whole name.
        """
        if not isinstance(given, dict):
            if not (isinstance(given, Plain) and given in _NONE):  # a heading with nothing below
                self._fault(path, f"got {_got(given)}, must be a group of names and values")
            return base
        hints = _hints(type(base))
        values: dict[str, Any] = {}
        for name, value in given.items():
            place = (*path, name)
            if name == "kind" and isinstance(base, ObjectiveConfig):
                continue
            if name not in hints:
                self._unknown(place, hints)
                continue
            hint, before = hints[name], getattr(base, name)
            if dataclasses.is_dataclass(before):
                values[name] = self.group(before, value, place)
            elif _items(hint):
                values[name] = self._groups(_items(hint), before, value, place)
            else:
                values[name] = self._leaf(hint, value, place)
        if self.faults:
            return base
        with under(".".join(map(str, path))):
            return dataclasses.replace(base, **values)

    def _groups(self, kind: Any, before: Any, given: Any, path: tuple[Key, ...]) -> Any:
        """A list of groups; each changes that of its number, or the defaults."""
        if not isinstance(given, list):
            self._fault(path, f"got {_got(given)}, must be a list of groups")
            return before
        return tuple(
            self.group(before[n] if n < len(before) else kind(), one, (*path, n))
            for n, one in enumerate(given)
        )

    def _leaf(self, hint: Any, given: Any, path: tuple[Key, ...]) -> Any:
        try:
            value = as_type(hint, given)
            return self._meant(value) if isinstance(value, str) else value
        except ValueError as error:
            self._fault(path, str(error))
            return None

    def _fault(self, path: tuple[Key, ...], what: str) -> None:
        name = ".".join(map(str, path))
        self.faults.append(f"{self._document.where(path)}: {escaped(name)}: {what}")

    def _unknown(self, path: tuple[Key, ...], beside: Iterable[str]) -> None:
        """Tell of a key that its group, with these names, does not have."""
        name = ".".join(map(str, path))
        if name in OF_THE_COMMAND:
            hint = f"it is an option of the command, --{name}"
        elif name in _names(self._base):  # `optim.lr: 1` in YAML
            group, _, last = name.rpartition(".")
            hint = f"write {last} below {group}:"
        else:
            word = str(path[-1]).lower().replace("-", "_")
            own = difflib.get_close_matches(word, beside, n=1, cutoff=0.7)
            near = [".".join(map(str, (*path[:-1], known))) for known in own]
            near = near or list(self._near(name, self._base))
            hint = f"did you mean {' or '.join(near)}?" if near else "print-config shows all"
        self.faults.append(
            f"{self._document.where(path)}: unknown key {shown_word(name[:200])}; {hint}"
        )


def as_type(hint: Any, given: Any) -> Any:
    """A value of a file as one of a field.

    Raises:
        ValueError: says what was found and what belongs there.
    """
    parts = _alternatives(hint)
    if get_origin(hint) is tuple:
        return _several(hint, given)
    if isinstance(given, Plain):
        return _plain(parts, given)
    if isinstance(given, str):
        words = _words(parts)
        if str in parts or given in words:
            return given
        if type(None) in parts and given.lower() == "none":  # TOML has no null
            return None
    elif isinstance(given, bool):
        if bool in parts:
            return given
    elif given is None:
        if type(None) in parts:
            return None
    elif type(given) is int:
        if int in parts or float in parts:
            return given
    elif type(given) is float and float in parts:
        return given
    raise ValueError(f"got {_got(given)}, must be {_wanted(parts)}{_near_word(parts, given)}")


def _plain(parts: tuple[Any, ...], word: Plain) -> Any:
    """A word of YAML without quotes, by the types that its field may have."""
    text = str(word)
    if text in _words(parts):
        return text
    if type(None) in parts and text in _NONE:
        return None
    if bool in parts and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if int in parts and _INTEGER.fullmatch(text) and len(text) < 40:
        return int(text)
    if float in parts and _NUMBER.fullmatch(text) and not _BASE_8.fullmatch(text):
        return int(text) if _INTEGER.fullmatch(text) and len(text) < 40 else float(text)
    if float in parts and _INFINITE.fullmatch(text):
        return float(text.replace(".", ""))  # refused by the limits, as the option
    if str in parts and text not in _NONE[:5]:
        return text
    hint = _near_word(parts, text)
    if bool in parts and text.lower() in _SWITCHES:
        hint = "; write true or false"
    elif {int, float} & set(parts) and _BASE_8.fullmatch(text):
        hint = "; some readers take a leading zero for base 8: leave it out"
    elif str in parts:
        hint = ", '' if it is empty"
    raise ValueError(f"got {_got(word)}, must be {_wanted(parts)}{hint}")


def _several(hint: Any, given: Any) -> tuple[Any, ...]:
    """The values of a list."""
    inner = get_args(hint)
    count = None if inner[-1] is Ellipsis else len(inner)
    one = {int: "whole numbers", float: "numbers", str: "texts"}.get(inner[0], "values")
    example = ", ".join(["1"] * (count or 2))
    if inner[0] is str:
        example = given if isinstance(given, str) and given.isidentifier() else "name"
    wanted = f"must be a list of {f'{count} ' if count else ''}{one}, e.g. [{example}]"
    if not isinstance(given, list):
        raise ValueError(f"got {_got(given)}, {wanted}")
    if count is not None and len(given) != count:
        raise ValueError(f"got {len(given)}, {wanted}")
    try:
        return tuple(as_type(inner[0], value) for value in given)
    except ValueError as error:
        raise ValueError(f"{str(error).partition(', must')[0]} in a list, {wanted}") from None


def _alternatives(hint: Any) -> tuple[Any, ...]:
    if get_origin(hint) in (Union, types.UnionType):
        return tuple(part for inner in get_args(hint) for part in _alternatives(inner))
    return (hint,)


def _words(parts: tuple[Any, ...]) -> list[str]:
    return [word for part in parts if get_origin(part) is Literal for word in get_args(part)]


def _wanted(parts: tuple[Any, ...]) -> str:
    names = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
    names[type(None)] = "null"
    words = _words(parts)
    some = f"one of {', '.join(words)}" if len(words) > 1 else "".join(words)
    return " or ".join([some] * bool(words) + [names[part] for part in parts if part in names])


def _near_word(parts: tuple[Any, ...], given: Any) -> str:
    near = difflib.get_close_matches(str(given), _words(parts), n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else ""


def _got(value: Any) -> str:
    """A value of a file in a message."""
    if isinstance(value, dict):
        return "a group"
    if isinstance(value, list):
        return "a list"
    if isinstance(value, bool):
        return "true" if value else "false"
    if value is None or (isinstance(value, Plain) and value in _NONE[:5]):
        return "no value" if value == "" else "null"
    if isinstance(value, Plain):
        return shown_word(value[:100])
    return f"the text {value[:100]!r}" if isinstance(value, str) else str(value)[:100]


def _hints(cls: type) -> dict[str, Any]:
    found = get_type_hints(cls)
    return {name: hint for name, hint in found.items() if get_origin(hint) is not ClassVar}


def _items(hint: Any) -> Any:
    """The dataclass of a list of groups; None for any other type."""
    inner = get_args(hint)[0] if get_origin(hint) is tuple else None
    return inner if dataclasses.is_dataclass(inner) else None


def _names(config: Any, prefix: str = "") -> Iterator[str]:
    """Dotted names of all fields of a config."""
    for name in _hints(type(config)):
        value = getattr(config, name)
        if dataclasses.is_dataclass(value):
            yield from _names(value, f"{prefix}{name}.")
        elif isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
            for number, one in enumerate(value):
                yield from _names(one, f"{prefix}{name}.{number}.")
        else:
            yield f"{prefix}{name}"
