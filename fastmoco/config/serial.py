"""Write a config as JSON, read it back, and compare two configs."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar, get_args, get_origin, get_type_hints

from fastmoco.config import Config, MoCoV3Config, ObjectiveConfig
from fastmoco_pipelines.spec import FieldError, Resume, ViewSpec, require, under
from fastmoco_pipelines.text import redact, without_secrets

PATTERNS = (
    ("data", "shards"),
    ("knn", "train_shards"),
    ("knn", "test_shards"),
    ("accuracy", "test_shards"),
)
"""Fields that may contain URLs."""
_PLAIN: dict[Any, tuple[tuple[type, ...], str]] = {
    str: ((str,), "a text"),
    bool: ((bool,), "true or false"),
    int: ((int,), "a whole number"),
    float: ((int, float), "a number"),
}
"""Types of the values of a field in JSON, where Python would take true for 1, and the words."""


def marked(config: Config, mark: Resume) -> tuple[str, ...]:
    """Dotted names of the fields of a config with a mark; for a marked group, its name."""

    def walk(prefix: str, group: Any) -> Iterator[str]:
        for name, hint in get_type_hints(type(group), include_extras=True).items():
            if get_origin(hint) is ClassVar:
                continue
            marks = get_args(hint)[1:] if get_origin(hint) is Annotated else ()
            value = getattr(group, name)
            if mark in marks:
                yield f"{prefix}{name}"
            elif dataclasses.is_dataclass(value):
                yield from walk(f"{prefix}{name}.", value)

    return tuple(walk("", config))


def may_change(config: Config, name: str, mark: Resume) -> bool:
    """Whether a field of a config, or a group that contains it, has a mark."""
    return any(name == field or name.startswith(f"{field}.") for field in marked(config, mark))


def to_json(config: Config) -> dict[str, Any]:
    """The config as nested dictionaries for JSON; `from_json` reads it back.

    An objective other than MoCo v3 also writes its `kind`.

    URLs are written without user, password and query, which may contain keys, because others can
    read the file.
    """
    data = dataclasses.asdict(config)
    for group, name in PATTERNS:
        data[group][name] = redact(data[group][name])
    data = {group: _without_secrets(fields) for group, fields in data.items()}
    if not isinstance(config.objective, MoCoV3Config):
        data["objective"] = {"kind": config.objective.kind, **data["objective"]}
    return data


def _without_secrets(value: Any) -> Any:
    """The same with each URL in a text as it may be written down, also where none belongs."""
    if isinstance(value, dict):
        return {name: _without_secrets(inner) for name, inner in value.items()}
    return without_secrets(value) if isinstance(value, str) and "://" in value else value


def from_json(data: dict[str, Any], *, file: Path | None = None) -> Config:
    """Build a config from the output of `to_json`.

    Args:
        data: as read from JSON.
        file: that it was read from, for error messages.

    Raises:
        ValueError: for unknown fields or invalid values, by file and path: `config.knn.k`.
    """
    built: Config = _build(Config, data, "config" if file is None else f"{file}: config")
    return built


def _build(cls: Any, data: dict[str, Any], path: str) -> Any:
    """Build one dataclass from one dictionary; lists become tuples again."""
    require(isinstance(data, dict), path, data, "must be an object of JSON")
    hints = get_type_hints(cls)
    unknown = sorted(set(data) - set(hints))
    require(
        not unknown,
        path,
        unknown,
        f"unknown fields; known are {', '.join(sorted(hints))}",
    )
    values: dict[str, Any] = {}
    if cls is ViewSpec:
        values["color"] = "dali"  # what a config meant that was stored before there was a choice
    for name, value in data.items():
        hint = hints[name]
        if hint is ObjectiveConfig:
            require(isinstance(value, dict), f"{path}.{name}", value, "must be an object of JSON")
            value = dict(value)
            hint = objective_class(value.pop("kind", MoCoV3Config.kind), path)
        if dataclasses.is_dataclass(hint):
            values[name] = _build(hint, value, f"{path}.{name}")
        else:
            values[name] = _leaf(hint, value, f"{path}.{name}")
    try:
        with under(path):
            return cls(**values)
    except (TypeError, AttributeError) as error:  # a text where a number belongs, or the like
        raise FieldError(path, data, f"a value has the wrong type ({error})") from error


def objective_class(kind: Any, path: str) -> type[ObjectiveConfig]:
    """The config class of an objective, from the recipes module named after its kind.

    Raises:
        ValueError: if there is no such class.
    """
    named = isinstance(kind, str)  # a config may hold anything, also what cannot be looked up
    if named and kind not in ObjectiveConfig.kinds and kind.isidentifier():
        with contextlib.suppress(ModuleNotFoundError):
            importlib.import_module(f"fastmoco.recipes.{kind}")
    known = {name: made for name, made in ObjectiveConfig.kinds.items() if name}
    rule = f"unknown objective; known are {', '.join(sorted(known))}"
    require(named and kind in known, f"{path}.objective.kind", kind, rule)
    return known[kind]


def _leaf(hint: Any, value: Any, path: str) -> Any:
    """A field that is not a dataclass; lists become tuples again, also of dataclasses."""
    if hint in _PLAIN:
        kinds, words = _PLAIN[hint]
        require(type(value) in kinds, path, value, f"must be {words}")
    if get_origin(hint) is not tuple:
        return value
    require(isinstance(value, list | tuple), path, value, "must be a list of JSON")
    inner = get_args(hint)[0]
    if not dataclasses.is_dataclass(inner):
        return tuple(_leaf(inner, item, f"{path}.{number}") for number, item in enumerate(value))
    return tuple(_build(inner, item, f"{path}.{number}") for number, item in enumerate(value))


def flatten(config: Config) -> dict[str, Any]:
    """Every leaf by its dotted name, as on the command line: `{"optim.lr": 0.1, ...}`."""

    def walk(prefix: str, node: dict[Any, Any]) -> dict[str, Any]:
        flat: dict[str, Any] = {}
        for name, value in node.items():
            dotted = f"{prefix}{name}"
            if name == "more_views":  # numbered groups, and their count
                flat[dotted], value = len(value), dict(enumerate(value))
            flat |= walk(f"{dotted}.", value) if isinstance(value, dict) else {dotted: value}
        return flat

    return walk("", to_json(config))


def differences(saved: Config, wanted: Config) -> list[str]:
    """Fields that differ and affect training, as `name: saved -> wanted`; empty if there are
    none."""
    old, new = flatten(saved), flatten(wanted)
    if saved.objective.kind != wanted.objective.kind:
        return [f"objective: {saved.objective.kind!r} -> {wanted.objective.kind!r}"]
    return [
        f"{name}: {old[name]!r} -> {new[name]!r}"
        for name in old
        if old[name] != new.get(name, old[name]) and not may_change(saved, name, Resume.FREE)
    ]
