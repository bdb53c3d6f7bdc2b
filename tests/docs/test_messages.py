"""Messages that the pages about symptoms quote are messages of the code, and every option that a page
names exists.
"""

from __future__ import annotations

import ast
import errno
import os
import re
from functools import cache

import pytest

pytest.importorskip("tyro", reason="tyro is not installed")

from fastmoco.cli.commands import COMMANDS
from fastmoco.cli.data import ViewsArguments
from fastmoco.cli.options import describe
from fastmoco.cli.recipe_commands import (
    ConfigArguments,
    PlanArguments,
    ProfileArguments,
    TrainArguments,
    TuneArguments,
    _defaults,
)
from fastmoco.config import Config
from fastmoco.recipes import RECIPES, get_recipe
from fastmoco_pipelines import moco_v3_views
from tests.docs.pages import ROOT, blocks, pages, prose

LEAST = 8
"""Characters that a message and a text of the code have in common, at least."""
FILLED = 5
"""Plain words of a message in places that the code fills in, at most: a class, the name of a stage."""
OF_OTHERS = {
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.": "torch",
    "Watchdog caught collective operation timeout": "NCCL's watchdog in torch",
    "bash: fastmoco: command not found": "the shell",
}
"""Quoted messages of other programs."""
SYMPTOMS = [
    (block.page, line)
    for block in blocks()
    if block.page.startswith("docs/troubleshooting/") and block.language == "text"
    for line in block.text.splitlines()
    if line.strip()
]


@cache
def texts() -> tuple[str, ...]:
    """What strings of the code have between the places that are filled in, the longest first."""
    found = set()
    for folder in ("fastmoco", "kernels", "pipelines"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.add(node.value)
    found |= {os.strerror(number) for number in (errno.ENOSPC, errno.EACCES, errno.EROFS)}
    return tuple(sorted((t for t in found if len(t) >= LEAST), key=len, reverse=True))


def invented(line: str) -> list[str]:
    """The plain words of a message that no text of the code has. Numbers, options, paths and values
    are none."""
    for text in texts():
        line = line.replace(text, " | ")
    plain = [word.strip("(),;:!'\"") for word in line.split()]
    return [word for word in plain if re.fullmatch(r"[A-Za-z]{2,}", word) and word != "fastmoco"]


@pytest.mark.parametrize(("page", "line"), SYMPTOMS)
def test_a_quoted_message_is_one_of_the_code(page, line):
    if line.strip() not in OF_OTHERS:
        assert len(invented(line)) <= FILLED, f"{page}: not of the code: {invented(line)}"
        assert invented(line) != line.split()


def test_an_invented_message_is_found():
    line = "fastmoco: the gradient exploded, please restart the computer"
    assert invented(line) == ["the", "exploded", "please", "restart", "the", "computer"]


@cache
def options() -> frozenset[str]:
    """The options of every command and of every recipe."""
    found = {"--help", "--help-all", "--version"}
    kinds = {get_recipe(name).objective.kind: name for name in RECIPES}
    for name in kinds.values():
        found |= set(
            describe(TrainArguments, _defaults(TrainArguments, get_recipe(name))).by_flag()
        )
    for kind in (ConfigArguments, PlanArguments, ProfileArguments, TuneArguments):
        found |= set(describe(kind, _defaults(kind, Config())).by_flag())
    for command in COMMANDS.values():
        if not command.reads_words:
            found |= set(describe(command.call).by_flag())
    view1, view2 = moco_v3_views()
    views = ViewsArguments(shards="x", view1=view1, view2=view2, more_views=())
    return frozenset(found | set(describe(ViewsArguments, views).by_flag()))


OTHER_PROGRAMS = {
    "--nodes": "sbatch",
    "--ntasks": "srun",
    "--max-restarts": "torchrun",
    "--nproc-per-node": "torchrun",
    "--force-reinstall": "pip",
    "--user": "docker",
    "--shm-size": "docker",
    "--ipc": "docker",
    "--strict": "twine and mkdocs",
    "--inplace": "rsync",
    "--targets": "benchmarks.fuzz",
    "--table": "benchmarks.chaos",
    "--against": "benchmarks.compiled",
}
"""Options of other programs that pages name."""


def test_every_option_that_a_page_names_exists():
    missing = {}
    for path in pages():
        if path.name in ("LOG.md", "CHANGELOG.md") or "decisions" in path.parts:
            continue  # of their time
        if "benchmarks" in path.parts or path.name == "performance.md":
            continue  # other programs
        for code in re.findall(r"`([^`\n]*--[a-z][^`]*)`", prose(path.read_text())):
            for flag in re.findall(r"(?<!\S)--[a-z][\w.-]*", code):
                plain = flag.rstrip(".")
                known = any(o == plain or o.startswith(f"{plain}.") for o in options())
                if not known and plain not in OTHER_PROGRAMS:
                    missing.setdefault(str(path.relative_to(ROOT)), []).append(flag)
    assert missing == {}
