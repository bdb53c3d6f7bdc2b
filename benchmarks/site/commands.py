"""A page for each command: its help, and the pages of the site that use it."""

from __future__ import annotations

import contextlib
import io
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from fastmoco.cli.commands import COMMANDS, GROUPS
from fastmoco.cli.main import main

COLUMNS = "88"
"""Width of the help: what fits beside the navigation."""


def path_of(command: str) -> str:
    """The page of a command, from the folder of the pages."""
    return f"commands/{command.replace(' ', '_')}.md"


def nav() -> list[dict[str, list[dict[str, str]]] | str]:
    """The part of the navigation with every command, under its group."""
    groups = [
        {title: [{command.name: path_of(command.name)} for command in group]}
        for title, group in GROUPS.items()
    ]
    return ["commands/index.md", *groups]


def make(written: Mapping[str, str]) -> dict[str, str]:
    """The text of every page, by its path.

    Args:
        written: the pages that are written by hand, by path: their commands are listed.
    """
    found = {"commands/index.md": _index()}
    with _as_piped():
        for group in GROUPS.values():
            for command in group:
                found[path_of(command.name)] = _page(command.name, command.line, written)
    return found


def addresses() -> dict[str, str]:
    """Where each command is, by how pages write it: from the root of the site."""
    found = {}
    for command in COMMANDS:
        page = path_of(command).replace(".md", ".html")
        found[f"fastmoco {command}"] = page
        if " " in command:
            found[command] = page
    return found


def _index() -> str:
    parts = [
        "# Commands",
        "Every command is `fastmoco COMMAND [options]`. Its page here is what `fastmoco help COMMAND` "
        "prints. Exit codes: 0 finished, 1 failed, 2 refused before it began, 75 stopped by a signal "
        "after saving (the same command continues), 130 interrupted with nothing to save.",
    ]
    for title, group in GROUPS.items():
        rows = [f"| [`{c.name}`]({path_of(c.name).split('/')[1]}) | {c.line} |" for c in group]
        parts += [f"## {title}", "\n".join(["| command | |", "|---|---|", *rows])]
    return "\n\n".join(parts) + "\n"


def _page(name: str, line: str, written: Mapping[str, str]) -> str:
    head = "---\nhide: [toc]\n---\n\n"  # its room goes to the help
    parts = [f"{head}# fastmoco {name}", line, f"```text\n{help_of(name)}\n```"]
    uses = _uses(name, written)
    if uses:
        parts.append("## Where it is used")
        for path, commands in uses.items():
            lines = "\n".join(dict.fromkeys(commands))
            parts.append(f"[{title_of(written[path])}](../{path}):\n\n```bash\n{lines}\n```")
    return "\n\n".join(parts) + "\n"


def title_of(text: str) -> str:
    """The first heading of a page."""
    found = re.search(r"^# (.+)$", text, re.MULTILINE)
    return found[1] if found else ""


def help_of(name: str) -> str:
    """What `fastmoco help NAME` prints in a pipe."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        code = main(["help", *name.split()])
    if code:
        raise RuntimeError(f"fastmoco help {name} ended with {code}")
    return text.getvalue().rstrip()


def _uses(name: str, written: Mapping[str, str]) -> dict[str, list[str]]:
    """The lines of the written pages that run a command, by page, at most two of a page."""
    found: dict[str, list[str]] = {}
    for path, text in written.items():
        for block in re.findall(r"^```(?:bash|)\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                words = re.sub(r"\s+", " ", line.partition(" #")[0]).strip()
                if words.startswith(f"fastmoco {name} ") and len(found.get(path, [])) < 2:
                    found.setdefault(path, []).append(words)
    return found


@contextmanager
def _as_piped() -> Iterator[None]:
    """Help without color, in a width of its own."""
    before = {name: os.environ.get(name) for name in ("COLUMNS", "NO_COLOR")}
    os.environ.update(COLUMNS=COLUMNS, NO_COLOR="1")
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
