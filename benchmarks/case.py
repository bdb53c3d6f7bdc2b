"""The form of a case, and its options."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from benchmarks import shown
from benchmarks.contest import Task, contest
from benchmarks.outcome import FAILED, outcome
from fastmoco_pipelines.text import first_sentence

Options = dict[str, Any]
COMMON = {"device": "auto", "threads": 0, "rounds": 7, "seed": 0}
"""Options of every case of tasks: `device` ("auto": CUDA if there is one, else "cpu"); `threads` of
torch (0: its choice); timed `rounds`; `seed` of the inputs."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One benchmark.

    Attributes:
        name: on the command line and of its file of results.
        doc: what it shows; the first sentence is listed.
        defaults: its options and their values.
        quick: values of some options, with which the whole case takes at most 20 CPU-seconds.
        run: checks, then measures; the result has JSON values.
        table: a result in Markdown, instead of the table of `benchmarks.shown`.
        charts: a result as charts, instead of those of `benchmarks.shown`.
        draw: draws a result into a file, where charts do not show it.
    """

    name: str
    doc: str
    defaults: Mapping[str, Any]
    quick: Mapping[str, Any]
    run: Callable[[Options], dict[str, Any]]
    table: Callable[[Mapping[str, Any]], str] = shown.table
    charts: Callable[[Mapping[str, Any]], list[shown.Chart]] = shown.charts
    draw: Callable[[Mapping[str, Any], Path], None] | None = None

    @property
    def summary(self) -> str:
        """The first sentence of its description."""
        return first_sentence(self.doc)

    def shown(self, result: Mapping[str, Any]) -> str:
        """A result in Markdown; a failed check comes first."""
        status, reason = outcome(result)
        return f"The check failed: {reason}.\n\n" * (status == FAILED) + self.table(result)

    def options(self, given: Sequence[str] = (), *, quick: bool = False) -> Options:
        """The default options, those of the quick form if asked for, and given `name=value`s."""
        return parse_options(given, {**self.defaults, **(self.quick if quick else {})})


def case_of(module: ModuleType) -> Case:
    """The case that a module of `cases/` defines by its names.

    All have `NAME`, a docstring, `DEFAULTS` and `QUICK`, and some `table` and `charts`. One has `run(options)`, and measures by
    itself. Another has `tasks(options, device)`, the tasks for this harness: one, or several by
    name. It may have `SHAPES`, by type of device the values of options that are 0, without those
    devices that it does not run on, and `together(result, options)`, figures of all its tasks.
    """
    run, defaults = getattr(module, "run", None), module.DEFAULTS
    if run is None:
        run, defaults = functools.partial(_run_tasks, module), {**COMMON, **defaults}
    return Case(
        name=module.NAME,
        doc=module.__doc__ or "",
        defaults=defaults,
        quick=module.QUICK,
        run=run,
        table=getattr(module, "table", shown.table),
        charts=getattr(module, "charts", shown.charts),
        draw=getattr(module, "draw", None),
    )


def _run_tasks(module: ModuleType, options: Options) -> dict[str, Any]:
    shapes: Mapping[str, Options] = getattr(module, "SHAPES", {"cpu": {}, "cuda": {}})
    device = chosen_device(options["device"], shapes)
    options = options | {k: v for k, v in shapes[device.type].items() if not options[k]}
    how: Any = {"device": device, "rounds": options["rounds"], "seed": options["seed"]}
    with threads(options["threads"]):
        torch.manual_seed(options["seed"])
        tasks: Task | Mapping[str, Task] = module.tasks(options, device)
        if isinstance(tasks, Task):
            return contest(tasks, **how)
        result = {name: contest(task, **how) for name, task in tasks.items()}
    together = getattr(module, "together", None)
    return result | (together(result, options) if together else {})


def chosen_device(name: str, known: Iterable[str] = ("cpu", "cuda")) -> torch.device:
    """The device that an option names; `auto` is CUDA if there is one and the case runs on it.

    Raises:
        ValueError: for a device that is not known.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() and "cuda" in known else "cpu"
    if torch.device(name).type not in known:
        raise ValueError(f"device={name!r}: runs on {', '.join(known)}")
    return torch.device(name)


def chosen_words(options: Mapping[str, Any], option: str, known: Collection[str]) -> list[str]:
    """The words of an option, which have commas between them.

    Raises:
        ValueError: for a word that is not known.
    """
    words = str(options[option]).split(",")
    for word in words:
        if word not in known:
            raise ValueError(
                f"{option}={options[option]!r}: {word!r} is none of {', '.join(known)}"
            )
    return words


@contextmanager
def threads(number: int) -> Iterator[None]:
    """That many threads of torch, meanwhile; 0: as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


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
