"""Where the program `fastmoco` begins: the commands, or what can be said where a package that all of them
import is missing or broken. Imports no such package itself."""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Sequence

from fastmoco.errors import EXIT_REFUSED, say


def main() -> int:
    """Run the command of this process.

    Returns:
        The exit code of `fastmoco.cli.main.main`; 2 if a package that fastmoco needs cannot be
        imported, but for `doctor`, which then tells why.
    """
    try:
        from fastmoco.cli.main import main as commands
    except Exception as error:  # a broken package raises anything
        return _without_commands(sys.argv[1:], error)
    try:
        return commands()
    except ImportError as error:
        from fastmoco.training.checkup.packages import MODULES

        if (error.name or "").partition(".")[0] not in {*MODULES.values(), "torch"}:
            raise
        return _refused(error)


def _refused(error: Exception) -> int:
    say(
        f"a package is missing or broken ({type(error).__name__}: {error}); "
        "fastmoco doctor names the cure"
    )
    return EXIT_REFUSED


def _without_commands(words: Sequence[str], error: Exception) -> int:
    """Run `doctor`, which needs nothing but Python; name it instead of any other command."""
    if list(words[:1]) != ["doctor"]:
        return _refused(error)
    from fastmoco.cli.doctor import doctor

    # Its own options and defaults, each a keyword.
    parser = argparse.ArgumentParser(prog="fastmoco doctor")
    for name, option in inspect.signature(doctor).parameters.items():
        if option.default is False:
            parser.add_argument(f"--{name}", action="store_true")
        else:
            parser.add_argument(f"--{name}", type=type(option.default), default=option.default)
    return doctor(**vars(parser.parse_args(words[1:])))
