"""The table of docs/faults.md against the tests: every fault is in it, and every test it names is
one that `make faults` runs."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ROWS = [
    line
    for line in (ROOT / "docs" / "faults.md").read_text().splitlines()
    if re.match(r"\| T\d\d", line)
]


def _marks(nodes: list[ast.expr]) -> set[str]:
    """Names in ``pytest.mark.NAME``, called or not, of some expressions."""
    found = (
        inner for node in nodes for inner in ast.walk(node) if isinstance(inner, ast.Attribute)
    )
    return {
        inner.attr
        for inner in found
        if isinstance(inner.value, ast.Attribute) and inner.value.attr == "mark"
    }


@functools.cache
def _tests() -> dict[str, list[set[str]]]:
    """Every test function, with the marks of each that has the name: its own and its file's."""
    tests: dict[str, list[set[str]]] = {}
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        body = ast.parse(path.read_text()).body
        whole = [
            n.value
            for n in body
            if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "pytestmark"
        ]
        for node in body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                tests.setdefault(node.name, []).append(_marks([*whole, *node.decorator_list]))
    return tests


def test_every_fault_has_a_row() -> None:
    text = "\n".join(row.split("|")[1] for row in ROWS)
    spans = [(int(a), int(b or a)) for a, b in re.findall(r"T(\d\d)(?:-T(\d\d))?", text)]
    assert {number for first, last in spans for number in range(first, last + 1)} == set(
        range(1, 40)
    )


def test_every_test_of_the_table_exists_and_make_faults_runs_it() -> None:
    named = [(row[2:5], name) for row in ROWS for name in re.findall(r"`([a-z0-9_]+)\.\.\.`", row)]
    assert len(named) > 20
    for fault, name in named:
        marks = [
            m
            for test, of_each in _tests().items()
            if test.startswith(f"test_{name}")
            for m in of_each
        ]
        assert any("faults" in m for m in marks), (
            f"{fault}: no test_{name}... that is marked faults"
        )


def test_what_make_test_leaves_out_make_long_runs() -> None:
    long = {
        name: marks for name, of_each in _tests().items() for marks in of_each if "long" in marks
    }
    assert len(long) > 10
    makefile = (ROOT / "Makefile").read_text()
    assert '-m "not long"' in makefile
    assert "-m long" in makefile
    ci = (ROOT / ".ci" / "run").read_text()
    assert {"make test", "make long"} <= {line.partition(" #")[0] for line in ci.splitlines()}
