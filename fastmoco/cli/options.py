"""The options of a command: names, values, defaults and help, read from a dataclass or a function.

tyro parses the command line; this is what help pages show, and what a mistake is compared with.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import re
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import (
    Annotated,
    Any,
    Literal,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

import tyro
from tyro.conf import Positional

REQUIRED: Any = object()
"""The default of an option that must be given."""
_POSITIONAL = get_args(Positional[int])[1]
_RENAMED: type = type(tyro.conf.arg(name=""))


@dataclass(frozen=True, kw_only=True)
class Option:
    """One option, or one argument that is given by its place."""

    name: str
    """Dotted name in Python, `data.view1.crop_scale`."""
    hint: Any
    """Type of its value, without marks."""
    default: Any = REQUIRED
    help: str = ""
    positional: bool = False

    @property
    def flag(self) -> str:
        """As it is typed: `--data.view1.crop-scale`; `SRC` if it is given by its place."""
        dashed = self.name.replace("_", "-")
        return dashed.upper() if self.positional else f"--{dashed}"

    @property
    def negative(self) -> str:
        """The flag that switches a boolean option off; "" for other options."""
        if self.hint is not bool or self.positional:
            return ""
        group, dot, last = self.flag.removeprefix("--").rpartition(".")
        return f"--{group}{dot}no-{last}"

    @property
    def group(self) -> str:
        """The dotted name without its last part."""
        return self.name.rpartition(".")[0]

    @property
    def value(self) -> str:
        """The kind of its value, `INT`; "" for a flag without a value."""
        return "" if self.hint is bool else _value(_given(self.hint, self.default))

    @property
    def count(self) -> int | None:
        """How many words its value has; None: any number."""
        if self.hint is bool:
            return 0
        if get_origin(self.hint) is not tuple:
            return 1
        parts = get_args(self.hint)
        return None if parts[-1] is Ellipsis else len(parts)

    @property
    def shown_default(self) -> str:
        """The default as it would be typed."""
        return typed(self.default)


@dataclass(frozen=True, kw_only=True)
class Group:
    """Options that share the first parts of their names, and what they are about."""

    name: str
    """Dotted name, "" for options without a group."""
    about: str = ""
    kind: type | None = None
    """The dataclass that holds them."""


@dataclass(frozen=True)
class Described:
    """All options of a command in the order of its fields or parameters, and their groups."""

    options: tuple[Option, ...]
    groups: tuple[Group, ...]
    about: str

    def by_flag(self) -> dict[str, Option]:
        """Every option by each of its flags."""
        found: dict[str, Option] = {}
        for option in self.options:
            if not option.positional:
                found[option.flag] = option
                if option.negative:
                    found[option.negative] = option
        return found

    def named(self, name: str) -> Option | None:
        """The option with a dotted name."""
        return next((option for option in self.options if option.name == name), None)


def _given(hint: Any, default: Any) -> Any:
    """The type of what would be typed: not None where that is the default."""
    if default is not None or get_origin(hint) not in (Union, types.UnionType):
        return hint
    return Union[tuple(part for part in get_args(hint) if part is not type(None))]  # noqa: UP007


def as_parsed(args: Sequence[str], described: Described) -> list[str]:
    """The words of a command with `None` for `none` where an option has no other word of that name:
    the parser spells it as Python does."""
    flags = described.by_flag()
    words = list(args)
    for number, word in enumerate(args):
        flag, equals, value = word.partition("=")
        if not equals:
            flag, value = words[number - 1] if number else "", word
        option = flags.get(flag.replace("_", "-"))
        if value == "none" and option is not None and "none" in choices(option.hint):
            own = Literal["none"] in get_args(option.hint)
            if not own and type(None) in get_args(option.hint):
                words[number] = word.removesuffix("none") + "None"
    return words


def typed(value: Any) -> str:
    """A value as it would be typed; words of several values with spaces between them."""
    if value is None:
        return "none"
    if isinstance(value, tuple):
        return " ".join(map(typed, value))
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def describe(target: Callable[..., Any], default: Any = None) -> Described:
    """The options that tyro reads for a dataclass or a function.

    Args:
        target: of `tyro.cli`.
        default: instance of the dataclass with the defaults; its `tyro.MISSING` fields must be
            given.
    """
    groups = [Group(name="")]
    if isinstance(target, type):
        options = tuple(_fields(target, default, "", groups))
        return Described(options, tuple(groups), _paragraph(docstring(target)))
    texts = _argument_texts(target)
    hints = get_type_hints(target, include_extras=True)
    options = tuple(
        option
        for name, parameter in inspect.signature(target).parameters.items()
        for option in _leaves(name, hints[name], parameter.default, texts.get(name, ""), "", groups)
    )
    about = docstring(target).partition("\nArgs:")[0]
    return Described(options, tuple(groups), about.strip())


def _fields(cls: type, default: Any, prefix: str, groups: list[Group]) -> Iterator[Option]:
    """The options of a dataclass."""
    hints = get_type_hints(cls, include_extras=True)
    for field in dataclasses.fields(cls):
        value = getattr(default, field.name) if default is not None else _default(field)
        text = _field_text(cls, field.name)
        yield from _leaves(field.name, hints[field.name], value, text, prefix, groups)


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _leaves(
    name: str, hint: Any, default: Any, text: str, prefix: str, groups: list[Group]
) -> Iterator[Option]:
    """The option of one field or parameter, or all of a group."""
    marks: tuple[Any, ...] = ()
    if get_origin(hint) is Annotated:
        hint, *rest = get_args(hint)
        marks = tuple(rest)
    renamed = [getattr(mark, "name", None) for mark in marks if isinstance(mark, _RENAMED)]
    name = renamed[0] if renamed and renamed[0] is not None else name
    dotted = f"{prefix}{name}"

    # Groups.
    inner = f"{dotted}." if name else prefix
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        kind: type = type(default) if dataclasses.is_dataclass(default) else hint
        if name:
            groups.append(Group(name=dotted, about=text or _paragraph(docstring(kind)), kind=kind))
        yield from _fields(kind, default, inner, groups)
        return
    if get_origin(hint) is tuple and dataclasses.is_dataclass(get_args(hint)[0]):
        for number, item in enumerate(default):
            groups.append(Group(name=f"{dotted}.{number}", about=text, kind=type(item)))
            yield from _fields(type(item), item, f"{inner}{number}.", groups)
        return

    # A single option.
    missing = default in (inspect.Parameter.empty, dataclasses.MISSING, tyro.MISSING)
    yield Option(
        name=dotted,
        hint=hint,
        default=REQUIRED if missing else default,
        help=text,
        positional=_POSITIONAL in marks,
    )


def _value(hint: Any) -> str:
    """The kind of a value in capitals; its words, if there are few."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Literal:
        return "{" + ",".join(map(str, parts)) + "}"
    if origin is tuple:
        if parts[-1] is Ellipsis:
            return f"[{_value(parts[0])} ...]"
        return " ".join(map(_value, parts))
    if origin in (Union, types.UnionType):
        words = choices(hint)
        others = [_value(part) for part in parts if not _words(part)]
        return "|".join(["{" + ",".join(words) + "}"] * bool(words) + others)
    return str(getattr(hint, "__name__", hint)).upper()


def choices(hint: Any) -> list[str]:
    """The words that a value may be, of all alternatives."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return [word for part in parts for word in _words(part)]
    return _words(hint)


def _words(hint: Any) -> list[str]:
    """The words of one alternative; none for a number or a text."""
    if get_origin(hint) is Literal:
        return [str(word) for word in get_args(hint)]
    if hint is bool:
        return ["True", "False"]
    return ["none"] if hint is type(None) else []


def fits(hint: Any, word: str) -> bool:
    """Whether a word can be a value, or one of several values, of a type."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(fits(part, word) for part in parts)
    if origin is tuple:
        return all(fits(part, word) for part in parts if part is not Ellipsis)
    if hint in (int, float):
        try:
            hint(word)
        except ValueError:
            return False
        return True
    words = _words(hint)
    return not words or word in words or (hint is type(None) and word == "None")


def expected(option: Option) -> str:
    """What the value of an option must be, with an example where it is no choice of words."""
    hint, words = option.hint, choices(option.hint)
    parts = get_args(hint)
    example = _example(option)
    names = {int: "a whole number", float: "a number", str: "a text", Path: "a path"}
    if get_origin(hint) is tuple:
        count = option.count
        one = names.get(parts[0], "a value").removeprefix("a ")
        what = f"{one}s" if count is None else f"{count} {one}s"
        if of_each := choices(parts[0]):
            what = f"of {', '.join(of_each)}"
    else:
        kinds = parts if get_origin(hint) in (Union, types.UnionType) else (hint,)
        others = [names[kind] for kind in kinds if kind in names]
        some = f"one of {', '.join(words)}" if len(words) > 1 else "".join(words)
        what = " or ".join([some] * bool(words) + others)
        example = example if others else ""
    return what + (f", e.g. {option.flag} {example}" if example else "")


def _example(option: Option) -> str:
    """A value that the option takes; "" if its words are listed anyway."""
    if option.default not in (REQUIRED, None, "", ()):
        return option.shown_default
    kinds = get_args(option.hint) or (option.hint,)
    examples: dict[Any, str] = {int: "10", float: "0.1", Path: "runs/first", str: "TEXT"}
    return next((examples[kind] for kind in kinds if kind in examples), "")


# Help texts.


def docstring(target: Callable[..., Any]) -> str:
    """The docstring of a class or a function without its indentation; from its source where the
    interpreter has left it out (`python -OO`)."""
    if sys.flags.optimize < 2:
        return inspect.getdoc(target) or ""
    return _docstrings_of_module(target.__module__).get(target.__qualname__, "")


@functools.cache
def _docstrings_of_module(module: str) -> dict[str, str]:
    """The docstring of each class and function of a module; none without its source."""
    return {
        node.name: ast.get_docstring(node) or ""
        for node in _nodes_of_module(module)
        if isinstance(node, ast.ClassDef | ast.FunctionDef)
    }


def _nodes_of_module(module: str) -> list[ast.stmt]:
    source = getattr(sys.modules.get(module), "__file__", None)
    if source is None or not source.endswith(".py"):
        return []
    return ast.parse(Path(source).read_text(encoding="utf-8")).body


def _paragraph(doc: str | None) -> str:
    """The first paragraph of a docstring on one line."""
    return " ".join((doc or "").strip().partition("\n\n")[0].split())


def _field_text(cls: type, name: str) -> str:
    """The string below a field, in the class or the nearest base that has one."""
    for base in cls.__mro__:
        text = _texts_of_module(base.__module__).get((base.__qualname__, name))
        if text:
            return text
    return ""


@functools.cache
def _texts_of_module(module: str) -> dict[tuple[str, str], str]:
    """The string below each field of each class of a module; none without its source."""
    found = {}
    for node in _nodes_of_module(module):
        if not isinstance(node, ast.ClassDef):
            continue
        for field, below in zip(node.body, node.body[1:], strict=False):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(below, ast.Expr)
                and isinstance(below.value, ast.Constant)
                and isinstance(below.value.value, str)
            ):
                found[node.name, field.target.id] = " ".join(below.value.value.split())
    return found


def _argument_texts(function: Callable[..., Any]) -> dict[str, str]:
    """The text of each argument in the `Args:` of a docstring."""
    section = docstring(function).partition("\nArgs:\n")[2].partition("\n\n")[0]
    pairs: Sequence[tuple[str, str]] = re.findall(
        r"^    (\w+): (.*(?:\n     +.*)*)", section, re.MULTILINE
    )
    return {name: " ".join(text.split()) for name, text in pairs}
