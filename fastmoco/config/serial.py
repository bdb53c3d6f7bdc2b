"""A config as JSON, there and back, and what changed between two of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from fastmoco.config import Config
from fastmoco_pipelines.spec import Resume, require
from fastmoco_pipelines.text import redact

PATTERNS = (("data", "shards"), ("knn", "train_shards"), ("knn", "test_shards"))
"""Fields that may hold URLs."""


def marked(mark: Resume) -> tuple[str, ...]:
    """The dotted names of the fields that bear a mark; of a group that bears it, the group's name."""

    def walk(prefix: str, cls: Any) -> Iterator[str]:
        for name, hint in get_type_hints(cls, include_extras=True).items():
            kind, *marks = get_args(hint) if get_origin(hint) is Annotated else (hint,)
            if mark in marks:
                yield f"{prefix}{name}"
            elif dataclasses.is_dataclass(kind):
                yield from walk(f"{prefix}{name}.", kind)

    return tuple(walk("", Config))


def may_change(name: str, mark: Resume) -> bool:
    """Whether a field, or the group that it is in, bears a mark."""
    return any(name == field or name.startswith(f"{field}.") for field in marked(mark))


def to_json(config: Config) -> dict[str, Any]:
    """The config as nested JSON-able dictionaries; `from_json` reads it back.

    URLs lose user, password and query, which may hold keys: what is written down is read by others.
    """
    data = dataclasses.asdict(config)
    for group, name in PATTERNS:
        data[group][name] = redact(data[group][name])
    return data


def from_json(data: dict[str, Any]) -> Config:
    """Build a config from what `to_json` wrote.

    Raises:
        ValueError: for unknown fields, by name, or values that the config refuses.
    """
    if data.get("device") == "cuda":  # as configs before spelled it
        data = data | {"device": "gpu"}
    built: Config = _build(Config, data, "config")
    return built


def _build(cls: Any, data: dict[str, Any], path: str) -> Any:
    """One dataclass from one dictionary; lists become the tuples they were."""
    hints = get_type_hints(cls)
    unknown = sorted(set(data) - set(hints))
    require(not unknown, path, unknown, f"these fields do not exist; known are {', '.join(sorted(hints))}")
    values = {}
    for name, value in data.items():
        hint = hints[name]
        if dataclasses.is_dataclass(hint):
            values[name] = _build(hint, value, f"{path}.{name}")
        else:
            values[name] = tuple(value) if get_origin(hint) is tuple else value
    return cls(**values)


def flatten(config: Config) -> dict[str, Any]:
    """Every leaf by its dotted name, as the command line spells it: ``{"optim.lr": 0.00015, ...}``."""

    def walk(prefix: str, node: dict[str, Any]) -> dict[str, Any]:
        flat: dict[str, Any] = {}
        for name, value in node.items():
            dotted = f"{prefix}{name}"
            flat |= walk(f"{dotted}.", value) if isinstance(value, dict) else {dotted: value}
        return flat

    return walk("", to_json(config))


def differences(saved: Config, wanted: Config) -> list[str]:
    """Fields that change training and differ, each as ``name: saved -> wanted``; empty where a run may continue."""
    old, new = flatten(saved), flatten(wanted)
    return [
        f"{name}: {old[name]!r} -> {new[name]!r}"
        for name in old
        if old[name] != new[name] and not may_change(name, Resume.FREE)
    ]
