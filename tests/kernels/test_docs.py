"""The page for people who only want the ops: every block of Python on it runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "ops.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_each_example_runs(number):
    exec(compile(BLOCKS[number], f"{PAGE.name} block {number}", "exec"), {})  # noqa: S102 - the project's own page


def test_every_exported_op_is_on_the_page():
    import fastmoco_kernels

    missing = [
        name
        for name in fastmoco_kernels.__all__
        if name not in PAGE.read_text() and name != "InfoNCEResult"
    ]
    assert not missing
