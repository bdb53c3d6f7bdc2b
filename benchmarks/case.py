"""The form of a case, and its options."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from fastmoco_pipelines.text import first_sentence

Options = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One benchmark.

    Attributes:
        name: on the command line and of its file of results.
        doc: what it shows; the first sentence is listed.
        defaults: its options and their values.
        quick: values of some options, with which the whole case takes at most 20 CPU-seconds.
        run: checks, then measures; the result has JSON values.
        table: the result as text, if a table shows it better than a line of JSON.
    """

    name: str
    doc: str
    defaults: Mapping[str, Any]
    quick: Mapping[str, Any]
    run: Callable[[Options], dict[str, Any]]
    table: Callable[[Mapping[str, Any]], str] | None = None

    @property
    def summary(self) -> str:
        """The first sentence of its description."""
        return first_sentence(self.doc)

    def options(self, given: Sequence[str] = (), *, quick: bool = False) -> Options:
        """The default options, those of the quick form if asked for, and given `name=value`s."""
        return parse_options(given, {**self.defaults, **(self.quick if quick else {})})


def case_of(module: ModuleType) -> Case:
    """The case that a module of `cases/` defines by its names."""
    return Case(
        name=module.NAME,
        doc=module.__doc__ or "",
        defaults=module.DEFAULTS,
        quick=module.QUICK,
        run=module.run,
        table=getattr(module, "table", None),
    )


def parse_options(given: Sequence[str], defaults: Mapping[str, Any]) -> Options:
    """The defaults of a case, overridden by `name=value` arguments of the same types.

    Raises:
        SystemExit: for an unknown option, with near names, or a value of another type.
    """
    options = dict(defaults)
    for word in given:
        name, equals, value = word.partition("=")
        if name not in defaults:
            raise SystemExit(f"benchmarks: no option {name!r} {near(name, defaults)}")
        kind = type(defaults[name])
        try:
            if not equals:
                raise ValueError
            options[name] = kind(value)
        except ValueError:
            raise SystemExit(f"benchmarks: {word!r}: give {name}=<{kind.__name__}>") from None
    return options


def near(name: str, known: Iterable[str]) -> str:
    """The names that resemble a wrong one, else all, for the end of a message."""
    known = list(known)
    close = difflib.get_close_matches(name, known)
    return f"(near: {', '.join(close)})" if close else f"(known: {', '.join(known)})"
