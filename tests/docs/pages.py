"""The written pages of the project: their blocks, commands and links."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from textwrap import dedent

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = (
    "fastmoco",
    "python",
    "python3",
    "pip",
    "make",
    "git",
    "torchrun",
    "sbatch",
    "srun",
    "export",
    "docker",
    "conda",
)
TYPED = re.compile(rf"(({'|'.join(PROGRAMS)}) (?! )|\. \.venv|launch/)(?! *help\b)[^:]*$")
"""The first line of a block that a reader types, where the block has no language."""
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<!!)\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^)\s]+)\)")
IMAGE = re.compile(r"!\[[^\]]*\]\(([^)\s]+)\)")


@dataclass(frozen=True)
class Block:
    """A fenced block."""

    page: str
    line: int
    language: str
    text: str


@dataclass(frozen=True)
class Typed:
    """A command of a page."""

    page: str
    line: int
    text: str

    @property
    def words(self) -> list[str]:
        """As a shell splits it, without its comment and without a file for its output."""
        words = shlex.split(self.text, comments=True)
        return words[: words.index(">")] if ">" in words else words


def pages() -> list[Path]:
    """README.md, everything below docs/, and the READMEs of the folders."""
    folders = ("docs", "fastmoco", "kernels", "pipelines", "benchmarks", "launch")
    found = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
    for folder in folders:
        name = "*.md" if folder == "docs" else "README.md"
        found += sorted((ROOT / folder).rglob(name))
    return found


@cache
def blocks() -> tuple[Block, ...]:
    """Every fenced block of every page."""
    found = []
    for path in pages():
        text = path.read_text()
        for match in FENCE.finditer(text):
            line = text.count("\n", 0, match.start()) + 1
            name = str(path.relative_to(ROOT))
            body = dedent(match[3])
            typed = "bash" if TYPED.match(body.splitlines()[0]) else "text"
            found.append(Block(name, line, match[2] or typed, body))
    return tuple(found)


@cache
def commands() -> tuple[Typed, ...]:
    """Every command of the blocks in bash."""
    found = []
    for block in blocks():
        if block.language != "bash":
            continue
        text = block.text.replace("\\\n", " ")
        for number, line in enumerate(text.splitlines()):
            parts = [part.strip() for part in line.partition(" #")[0].split("&&")]
            found += [
                Typed(block.page, block.line + 1 + number, part)
                for part in parts
                if part and not part.startswith("#")
            ]
    return tuple(found)


def prose(text: str) -> str:
    """A page without its fenced blocks."""
    return FENCE.sub("", text)


def anchors(text: str) -> set[str]:
    """What a link to a page may name behind #: its headings, as code hosts and the site do."""
    found = set()
    for heading in re.findall(r"^#{1,6} (.+)$", prose(text), re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").strip().lower()
        found.add(re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", plain)))
    return found
