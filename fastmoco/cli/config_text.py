"""A config as a file of YAML, TOML or JSON, with the help of each field as its comment."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterator
from typing import Any, Literal

from fastmoco.cli.options import Described, describe
from fastmoco.config import Config
from fastmoco.config.serial import to_json

Format = Literal["yaml", "toml", "json"]
WIDTH = 100
"""Columns of a comment."""


def config_text(config: Config, how: Format = "yaml", *, comments: bool = True) -> str:
    """The text of a file that `recipes.files.read_config` reads as this config.

    URLs are written without user, password and query. JSON has no comments.

    Args:
        config: any.
        how: the format.
        comments: write the help of each field above it.
    """
    data = to_json(config)
    if how == "json":
        return json.dumps(data, indent=2)
    helps = _helps(describe(Config, config)) if comments else {}
    lines = _yaml(data, helps, "", 0) if how == "yaml" else _toml(data, helps, "", "")
    return "\n".join(lines).strip("\n")


def _helps(described: Described) -> dict[str, str]:
    """The help of each field and group by its dotted name."""
    groups = {group.name: group.about for group in described.groups if group.name}
    return groups | {option.name: option.help for option in described.options}


def _comment(name: str, helps: dict[str, str], indent: str = "") -> list[str]:
    text = helps.get(name, "")
    if re.search(r"\.more_views\.[1-9]", f".{name}"):
        text = ""  # as of the first of them
    lines = textwrap.wrap(text, WIDTH - len(indent) - 2, break_on_hyphens=False)
    return [f"{indent}# {line}" for line in lines]


def _is_group(value: Any) -> bool:
    return isinstance(value, dict) or (
        isinstance(value, list | tuple) and bool(value) and isinstance(value[0], dict)
    )


def _yaml(data: dict[str, Any], helps: dict[str, str], name: str, depth: int) -> Iterator[str]:
    """Lines of a group, plain values first."""
    indent = "  " * depth
    for key in sorted(data, key=lambda key: _is_group(data[key])):
        value, whole = data[key], f"{name}{key}"
        if not _is_group(value):
            yield from _comment(whole, helps, indent)
            yield f"{indent}{key}: {_yaml_value(value)}"
            continue
        if depth == 0:
            yield ""
        yield from _comment(whole, helps, indent)
        yield f"{indent}{key}:"
        if isinstance(value, dict):
            yield from _yaml(value, helps, f"{whole}.", depth + 1)
            continue
        for number, one in enumerate(value):
            mark = True
            for line in _yaml(one, helps, f"{whole}.{number}.", depth + 2):
                begin = "  " * (depth + 1) + "- "
                yield begin + line.lstrip() if mark else line
                mark = False


def _yaml_value(value: Any) -> str:
    """A value that YAML 1.1 and 1.2 read alike."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_yaml_value, value))}]"
    if value is None:
        return "null"
    if isinstance(value, float) and "e" in (text := repr(value)) and "." not in text:
        return text.replace("e", ".0e")  # YAML 1.1 takes 1e-08 for a text
    if isinstance(value, str):
        safe = re.fullmatch(r"[A-Za-z_][\w./-]*", value, re.ASCII) is not None
        odd = value.lower() in ("true", "false", "yes", "no", "on", "off", "y", "n", "null", "none")
        return value if safe and not odd else _quoted(value)
    return json.dumps(value)


def _quoted(text: str) -> str:
    """A text in double quotes, for YAML and TOML alike."""
    parts = []
    for character in text:
        code = ord(character)
        if character in '"\\':
            parts.append("\\" + character)
        elif character.isprintable():
            parts.append(character)
        else:
            parts.append(f"\\U{code:08x}" if code > 0xFFFF else f"\\u{code:04x}")
    return '"' + "".join(parts) + '"'


def _toml(data: dict[str, Any], helps: dict[str, str], name: str, head: str) -> Iterator[str]:
    """Lines of a table; its own values come before its tables."""
    if head:
        yield ""
        yield from _comment(name.removesuffix("."), helps)
        yield head
    for key, value in data.items():
        if not _is_group(value):
            yield from _comment(f"{name}{key}", helps)
            yield f"{key} = {_toml_value(value)}"
    for key, value in data.items():
        whole = f"{name}{key}"
        if isinstance(value, dict):
            yield from _toml(value, helps, f"{whole}.", f"[{whole}]")
        elif _is_group(value):
            for number, one in enumerate(value):
                yield from _toml(one, helps, f"{whole}.{number}.", f"[[{whole}]]")


def _toml_value(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_toml_value, value))}]"
    if value is None:
        return '"none"'  # TOML has no null
    return _quoted(value) if isinstance(value, str) else json.dumps(value)
