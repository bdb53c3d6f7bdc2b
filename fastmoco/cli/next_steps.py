"""What to type next: commands that a shell takes as they are printed."""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from fastmoco.config import Config
from fastmoco_pipelines.text import redact


def program() -> str:
    """The command of this installation: its name if the shell finds it, otherwise its path."""
    if shutil.which("fastmoco"):
        return "fastmoco"
    script = Path(sys.executable).parent / "fastmoco"
    if not script.exists():
        return shlex.join([os.path.basename(sys.executable), "-m", "fastmoco"])
    inside = script.is_relative_to(Path.cwd())
    return shlex.quote(os.path.relpath(script) if inside else str(script))


def after_finish(out: Path, config: Config, *, best: bool) -> list[str]:
    """The commands for a finished run; the one for curves only where they can be drawn.

    Args:
        out: folder of the run.
        config: of the run.
        best: whether a checkpoint before the last one has a higher accuracy.
    """
    run = f"./{out}" if str(out).startswith("-") else str(out)
    more = ["--best"] if best else []
    bank = config.knn.train_shards or config.data.shards
    encoder = str(out / "encoder.safetensors")
    commands = [["checkpoint", "consolidate", run, "--encoder", *more, "--out", encoder]]
    if bank and not config.data.synthetic:
        test = config.knn.test_shards
        # Without held-out labelled images there is nothing to classify.
        first = (
            ["eval", "knn", run, *more, "--train", bank, "--test", test]
            if test
            else ["eval", "neighbours", run, *more, "--train", bank, "--query", bank]
        )
        commands.insert(0, first)
    if importlib.util.find_spec("matplotlib"):
        commands.append(["curves", run])
    return [_line(words) for words in commands]


def after_stop(argv: Sequence[str]) -> str:
    """The command that continues an interrupted run.

    Args:
        argv: arguments of this process, without the name of the program.
    """
    return _line(argv)


def _line(words: Sequence[str]) -> str:
    """A command as a shell reads it; passwords and queries of URLs are not printed."""
    return " ".join([program(), *(_quoted(redact(word)) for word in words)])


def _quoted(word: str) -> str:
    """A word for a shell; characters that would move the cursor, and bytes that are no text, are
    written as bash and zsh read them."""
    if word.isprintable():
        return shlex.quote(word)
    return "$'" + "".join(_in_dollar_quotes(character) for character in word) + "'"


def _in_dollar_quotes(character: str) -> str:
    if character in "'\\":
        return "\\" + character
    if character.isprintable():
        return character
    return "".join(f"\\x{byte:02x}" for byte in os.fsencode(character))
