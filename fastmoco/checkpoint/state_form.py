"""What `state.json` of a run must contain, so that whoever reads it meets no other kind of value.

A state is checked when it is loaded: one that no run can have written is refused like a damaged
file, and the checkpoint before it is tried. Entries that older versions did not write may be absent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from fastmoco.config import resolve
from fastmoco.config.serial import from_json
from fastmoco_pipelines.spec import FieldError

LARGEST = 2**62
"""No count of steps, images or bytes is larger."""


@dataclass(frozen=True, slots=True)
class Rule:
    """What a value must be, in words, and whether it is."""

    words: str
    holds: Callable[[Any], bool]


Form: TypeAlias = "Rule | Mapping[str, Form]"


def is_count(value: object, least: int = 0) -> bool:
    """Whether a value is a whole number from `least` on, of a size that occurs."""
    return type(value) is int and least <= value < LARGEST


def _is_number(value: object) -> bool:
    return type(value) is float or (type(value) is int and abs(value) < LARGEST)


def _is_figures(value: object) -> bool:
    """Numbers by name."""
    return isinstance(value, dict) and all(map(_is_number, value.values()))


def _is_rows(value: object) -> bool:
    """Steps, each with numbers by name."""
    return isinstance(value, list) and all(
        isinstance(row, list) and len(row) == 2 and is_count(row[0]) and _is_figures(row[1])
        for row in value
    )


_COUNT = Rule("a whole number from 0 on", is_count)
_POSITIVE = Rule("a whole number from 1 on", lambda v: is_count(v, 1))
_NUMBER = Rule("a number", _is_number)
_TEXT = Rule("a text", lambda v: isinstance(v, str))
_FLAG = Rule("true or false", lambda v: isinstance(v, bool))
_OBJECT = Rule("an object", lambda v: isinstance(v, dict))
_FIGURES = Rule(
    "numbers by name, a number or null", lambda v: v is None or _is_number(v) or _is_figures(v)
)
_MONITOR: Form = {
    "last_epoch": _NUMBER,
    "last": _FIGURES,
    "best": _FIGURES,
    "best_step": Rule(
        "whole numbers by name",
        lambda v: isinstance(v, dict) and all(map(is_count, v.values())),
    ),
    "classified": _COUNT,
}
_ROWS = Rule("a list of [step, numbers by name]", _is_rows)
_FORM: Mapping[str, Form] = {
    "run_id": _TEXT,
    "config": _OBJECT,
    "resolved": {
        "world_size": _POSITIVE,
        "sample_count": _POSITIVE,
        "steps_per_epoch": _POSITIVE,
        "total_steps": _POSITIVE,
        "local_batch_size": _POSITIVE,
        "peak_lr": _NUMBER,
        "precision": _TEXT,
    },
    "data": {
        "step": _COUNT,
        "digest": _TEXT,
        "order_digest": _TEXT,
        "shuffle_window": _COUNT,
        "order_version": _POSITIVE,
        "global_batch_size": _POSITIVE,
    },
    "monitors": _OBJECT,
    "knn": _MONITOR,
    "rollback": {
        "history": _ROWS,
        "pending": _ROWS,
        "total": _COUNT,
        "row": _COUNT,
        "last": Rule(
            "two steps or null",
            lambda v: v is None or (isinstance(v, list) and len(v) == 2 and all(map(is_count, v))),
        ),
    },
    "score": {
        "name": _TEXT,
        "label": _TEXT,
        "value": Rule("a share from 0 to 1", lambda v: _is_number(v) and 0 <= v <= 1),
    },
    "twin_advanced": _FLAG,
}
_OF_A_RUN: Mapping[str, tuple[str, ...]] = {
    "config": (),
    "resolved": ("world_size", "sample_count", "steps_per_epoch", "total_steps", "precision"),
    "data": ("digest",),
}
"""What the state of a run has at least."""


def require_state(state: Mapping[str, Any], run_id: str) -> None:
    """Refuse a state that no run can have written.

    Args:
        state: the content of `state.json`.
        run_id: of the marker beside it; "" if no run wrote it, whose entries are then checked only
            where they are there.

    Raises:
        ValueError: naming the entry, its value and what it must be.
    """
    _require(state, _FORM, "")
    for name, monitor in state.get("monitors", {}).items():
        _require_one(monitor, _MONITOR, f"monitors.{name}")
    if state.get("run_id", "") != run_id:
        raise ValueError("run_id is another one than that of the marker")
    if not run_id:
        return
    for group, needed in _OF_A_RUN.items():
        missing = [name for name in needed if name not in state.get(group, {})]
        if group not in state or missing:
            raise ValueError(f"{group} has no {', '.join(missing) or 'entries'}")
    resolved = state["resolved"]
    try:
        expected = resolve(
            from_json(state["config"]),
            world_size=resolved["world_size"],
            sample_count=resolved["sample_count"],
        )
    except FieldError as error:
        raise ValueError(
            f"{error}; if another version of fastmoco has written it, use that one"
        ) from error
    except (ArithmeticError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"config cannot be used ({type(error).__name__}: {error})") from error
    for name in ("steps_per_epoch", "total_steps"):
        if resolved[name] != getattr(expected, name):
            raise ValueError(
                f"resolved.{name} is {resolved[name]}, by its config {getattr(expected, name)}"
            )


def _require(found: Mapping[str, Any], form: Mapping[str, Form], path: str) -> None:
    for name, part in form.items():
        if name in found:
            _require_one(found[name], part, f"{path}{name}")


def _require_one(value: Any, form: Form, path: str) -> None:
    if isinstance(form, Rule):
        if not form.holds(value):
            raise ValueError(f"{path[:200]} is {_short(value)}: it must be {form.words}")
    elif isinstance(value, dict):
        _require(value, form, f"{path}.")
    else:
        raise ValueError(f"{path[:200]} is {_short(value)}: it must be an object")


def _short(value: Any) -> str:
    """A value in a message."""
    return f"{value!r}"[:100] if isinstance(value, str | int | float | None) else "a list or object"
