"""The cures that refusals name, done as a person would who reads them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.chaos.damage import Folder
from benchmarks.chaos.processes import environment

_MOVE = re.compile(r"\b(?:move|remove|delete)\b.*?\b(?:it|away|aside)\b|: Is a directory; fix it")
_NAME = re.compile(r"[\w./-]*/[\w./-]*[\w-]")


def cure(text: str, folder: Folder, words: list[str]) -> str:
    """Do what a message says; returns it in a few words, empty if it names nothing.

    Args:
        text: what the command has printed.
        folder: of the story.
        words: of the command; an option that the message names is added.
    """
    said = "\n".join(line for line in text.splitlines() if line.startswith(("fastmoco: ", "  ")))
    if re.search(r"[Pp]ermission|[Rr]ead-only|not writable", said) and folder.allow_writing():
        return "given rights"
    if re.search(r"[Ss]pace|full|No room", said) and folder.make_room():
        return "made room"
    if "add --trust" in said and "--trust" not in words:
        words.append("--trust")
        return "--trust"
    for line in filter(_MOVE.search, said.splitlines()):
        for name in _NAME.findall(line):
            if _is_inside(folder.path / name, folder.path) and _move_away(name, folder.path):
                return f"moved {name} away"
    if "data index" in said:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "fastmoco", "data", "index", "data/train-000000.tar"],
            cwd=folder.path,
            env=environment(),
            capture_output=True,
            check=False,
            timeout=120,
        )
        return "indexed again" if done.returncode == 0 else ""
    return ""


def _is_inside(path: Path, folder: Path) -> bool:
    return folder in path.parents and path.parent.resolve().is_relative_to(folder.resolve())


def _move_away(name: str, folder: Path) -> bool:
    """Move a file, a link or a folder out of the way; whether there was one."""
    path, away = folder / name, folder / "away"
    if not os.path.lexists(path) or path.suffix == ".tar":
        return False
    away.mkdir(exist_ok=True)
    try:
        shutil.move(str(path), away / f"{len(list(away.iterdir()))}-{path.name}")
    except OSError:
        return False
    return True
