"""Files of YAML, TOML and JSON as trees of plain values, with the line of each key.

A file may come from anybody: its size, depth and aliases are bounded, and no tag makes an object.
A word of YAML without quotes stays a text here (`Plain`), because YAML would read `no` as false,
`010` as 8, and `1e-3` as a text: who knows the type of the field reads it.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fastmoco_pipelines.files.small import JSON_DEPTH, UnfitFileError, json_of, read_small, text_of
from fastmoco_pipelines.text import escaped

SUFFIXES = {".yaml": "yaml", ".yml": "yaml", ".toml": "toml", ".json": "json"}
"""Endings of names, and the format of each."""
MOST_BYTES = 1 << 18
"""Of a file of YAML or TOML; the longest config has a tenth of it."""
MOST_VALUES = 20_000
"""Of a file of YAML, with each use of an alias."""

Key = str | int
"""Name in a group, or number in a list."""
Path_ = tuple[Key, ...]
"""Of a value, from the top."""


class Plain(str):
    """A word of YAML without quotes, whose type is that of its field."""


@dataclass(frozen=True)
class Document:
    """Content of a file."""

    path: Path
    tree: dict[str, Any]
    """Groups are dictionaries, lists are lists, all else is a plain value; of YAML a text or a
    `Plain`."""
    find_lines: Callable[[], dict[Path_, int]]

    @cached_property
    def lines(self) -> dict[Path_, int]:
        """Line of each key, from 1. Found when it is asked for: only errors need it."""
        return self.find_lines()

    def where(self, path: Sequence[Key]) -> str:
        """`FILE:LINE` of a value or of the nearest group that contains it; `FILE` for the top."""
        name = escaped(str(self.path))
        for length in range(len(path), 0, -1):
            line = self.lines.get(tuple(path[:length]))
            if line is not None:
                return f"{name}:{line}"
        return name

    def has(self, path: Sequence[Key]) -> bool:
        """Whether the file has a value of this path."""
        node: Any = self.tree
        for key in path:
            known = isinstance(node, dict) and key in node
            if not known and not (
                isinstance(node, list) and isinstance(key, int) and key < len(node)
            ):
                return False
            node = node[key]
        return True


def read_document(path: Path) -> Document:
    """Read a file by the ending of its name.

    Raises:
        UnfitFileError: if it is no regular file, too large, not UTF-8, of another format, empty, or
            has a key twice; names the line.
        OSError: if it cannot be read.
        ModuleNotFoundError: without PyYAML, for a file of YAML.
    """
    kind = SUFFIXES.get(path.suffix.lower())
    name = escaped(str(path))
    if kind is None:
        raise UnfitFileError(
            f"{name}: must end in {', '.join(SUFFIXES)}: the ending tells how it is written"
        )
    content = read_small(path) if kind == "json" else read_small(path, MOST_BYTES)
    text = text_of(content, path)
    if not text.strip():
        raise UnfitFileError(_empty(name))
    document = {"yaml": _yaml, "toml": _toml, "json": _json}[kind](path, text)
    if not document.tree:
        raise UnfitFileError(_empty(name))
    return document


def _empty(name: str) -> str:
    return f"{name}: is empty; the least is one line, `recipe: NAME`"


def _json(path: Path, text: str) -> Document:
    tree = json_of(text.encode(), path, strict=True)
    if not isinstance(tree, dict):
        raise UnfitFileError(f"{escaped(str(path))}: must be an object of JSON, with names")
    return Document(path, tree, lambda: dict(_lines_of_json(text)))


_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\],:]|[^\s{}\[\],:"]+')


def _lines_of_json(text: str) -> Iterator[tuple[Path_, int]]:
    """Line of each key of a valid text of JSON."""
    path: list[Key] = []
    line, at = 1, 0
    name: str | None = None
    for match in _TOKEN.finditer(text):
        line, at = line + text.count("\n", at, match.start()), match.start()
        word = match[0]
        if word in "{[":
            path.append("" if word == "{" else 0)
            name = None
            if word == "[":
                yield tuple(path), line
        elif word in "}]":
            path.pop()
        elif word == ",":
            name = None
            if isinstance(path[-1], int):
                path[-1] += 1
                yield tuple(path), line
        elif word != ":" and path and isinstance(path[-1], str) and name is None:
            name = path[-1] = json.loads(word)
            yield tuple(path), line


def _toml(path: Path, text: str) -> Document:
    name = escaped(str(path))
    try:
        tree = tomllib.loads(text)
    except RecursionError:
        raise UnfitFileError(f"{name}: is nested too deeply for a config") from None
    except ValueError as error:
        place = re.fullmatch(r"(.*) \(at (?:line (\d+), column \d+|end of document)\)", str(error))
        line = (place[2] or len(text.splitlines())) if place else None
        where = f"{name}:{line}" if line else name
        what = escaped(place[1] if place else str(error))
        raise UnfitFileError(f"{where}: not TOML: {what}") from None
    return Document(path, tree, lambda: _lines_of_toml(text))


def _lines_of_toml(text: str) -> dict[Path_, int]:
    """Line of each table and key. Of a text of several lines that contains what looks like keys, a
    key may be a wrong one: the lines are for messages."""
    found: dict[Path_, int] = {}
    table: Path_ = ()
    counts: dict[Path_, int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if head := re.match(r"\s*(\[\[?)\s*([^\[\]]+?)\s*\]", line):
            table = _dotted(head[2])
            if head[1] == "[[":
                counts[table] = counts.get(table, -1) + 1
                found.setdefault(table, number)
                table = (*table, counts[table])
            # A table inside the last of a list of tables.
            for many, index in counts.items():
                if table[: len(many)] == many and table[len(many) : len(many) + 1] != (index,):
                    table = (*many, index, *table[len(many) :])
            found.setdefault(table, number)
        elif key := re.match(r"""\s*([\w.\s"'-]+?)\s*=""", line):
            found.setdefault((*table, *_dotted(key[1])), number)
    return found


def _dotted(name: str) -> Path_:
    return tuple(part.strip().strip("\"'") for part in name.split("."))


def _yaml(path: Path, text: str) -> Document:
    import yaml

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        depth = 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            self.depth += 1
            if self.depth > 2 * JSON_DEPTH:
                where = f"{name}:{self.peek_event().start_mark.line + 1}"
                raise UnfitFileError(f"{where}: is nested too deeply for a config")
            node = super().compose_node(parent, index)
            self.depth -= 1
            return node

    name = escaped(str(path))
    try:
        node = Loader(text).get_single_node()
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise UnfitFileError(
            f"{name}:{line}: {escaped(chr(error.character))} is no character of YAML"
        ) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{name}:{mark.line + 1}" if mark else name
        what = escaped(error.problem or str(error.context))
        if what.startswith("but "):  # the second half of a sentence
            what = f"{escaped(str(error.context))}, {what}"
        tab = "; indent with spaces, YAML takes no tabs" if r"\t" in what else ""
        raise UnfitFileError(f"{where}: not YAML: {what}{tab}") from None
    if node is None:
        raise UnfitFileError(_empty(name))
    reader = _YamlReader(name)
    tree = reader.value(node, ())
    if not isinstance(tree, dict):
        raise UnfitFileError(f"{name}: must have names and values, as in `recipe: NAME`")
    return Document(path, tree, lambda: reader.lines)


_TAG = "tag:yaml.org,2002:"
_TAGS = {
    _TAG + kind
    for kind in ("map", "seq", "str", "int", "float", "bool", "null", "timestamp", "merge", "value")
}


class _YamlReader:
    """From nodes of PyYAML to plain values."""

    def __init__(self, name: str) -> None:
        self.lines: dict[Path_, int] = {}
        self._name = name
        self._count = 0
        self._within: list[int] = []

    def value(self, node: Any, path: Path_) -> Any:
        """The value of a node.

        Raises:
            UnfitFileError: naming the line.
        """
        self._count += 1
        if self._count > MOST_VALUES:
            raise self._error(node, f"has more than {MOST_VALUES:,} values, aliases counted")
        self._check_tag(node)
        if id(node) in self._within:
            raise self._error(node, "contains itself by an alias")
        kind = node.id
        if kind == "scalar":
            return Plain(node.value) if node.style is None else str(node.value)
        self._within.append(id(node))
        try:
            return self._list(node, path) if kind == "sequence" else self._group(node, path)
        finally:
            self._within.pop()

    def _list(self, node: Any, path: Path_) -> list[Any]:
        values = []
        for number, inner in enumerate(node.value):
            self.lines[(*path, number)] = inner.start_mark.line + 1
            values.append(self.value(inner, (*path, number)))
        return values

    def _group(self, node: Any, path: Path_) -> dict[str, Any]:
        """A mapping; keys of its own count more than merged ones (`<<: *name`)."""
        own: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        for key, inner in node.value:
            if key.id != "scalar":
                raise self._error(key, "a name must be one word")
            self._check_tag(key)
            if key.tag == _TAG + "merge":
                several = inner.value if inner.id == "sequence" else [inner]
                for one in several:
                    if one.id != "mapping":
                        raise self._error(inner, "<< merges groups with names alone")
                    merged = {**self.value(one, path), **merged}
                continue
            name = key.value
            if name in own:
                first = self.lines[(*path, name)]
                raise self._error(key, f"{escaped(name)} is given twice, first in line {first}")
            self.lines[(*path, name)] = key.start_mark.line + 1
            own[name] = self.value(inner, (*path, name))
            self.lines[(*path, name)] = key.start_mark.line + 1
        return merged | own

    def _check_tag(self, node: Any) -> None:
        if node.tag not in _TAGS:
            tag = escaped(node.tag.replace(_TAG, "!!"))
            raise self._error(node, f"the tag {tag} is not read; leave it out")

    def _error(self, node: Any, what: str) -> UnfitFileError:
        return UnfitFileError(f"{self._name}:{node.start_mark.line + 1}: {what}")
