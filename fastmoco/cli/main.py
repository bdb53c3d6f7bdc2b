"""The command line: arguments to a function call. Slow imports are delayed
until they are needed.
"""

from __future__ import annotations

import difflib
import functools
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import tyro

from fastmoco.cli import delayed, recipe_commands
from fastmoco.cli.environment import clean_environment
from fastmoco.errors import EXIT_INTERRUPTED, EXIT_REFUSED, one_line, say
from fastmoco_pipelines.text import first_sentence


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: arguments without the name of the program; default those of the process, which then
            ends with the command.

    Returns:
        The exit code: 0 finished, 1 failed while running, 2 refused before running, 75 stopped by a
        signal after saving its state, 130 interrupted with nothing to save.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        clean_environment(os.environ)
    except ValueError as error:
        say(str(error))
        return EXIT_REFUSED
    from fastmoco.cli import check as cli_check
    from fastmoco.cli import checkpoint as cli_checkpoint
    from fastmoco.cli import data as cli_data

    verbs: dict[str, Callable[[list[str]], int]] = {
        # A caller that gives the arguments is a program of its own, which goes on afterwards.
        "train": functools.update_wrapper(
            functools.partial(recipe_commands.train, process_ends=argv is None),
            recipe_commands.train,
        ),
        "recipes": recipe_commands.recipes,
        "print-config": recipe_commands.print_config,
        "plan": recipe_commands.plan,
        "data pack": _parsed("data pack", cli_data.pack),
        "data index": _parsed("data index", cli_data.index),
        "data check": _parsed("data check", cli_check.check),
        "data stats": _parsed("data stats", cli_check.stats),
        "data views": cli_data.views,
        "data sample": _parsed("data sample", cli_data.sample),
        "checkpoint verify": _parsed("checkpoint verify", cli_checkpoint.verify),
        "checkpoint list": _parsed("checkpoint list", cli_checkpoint.list_all),
        "checkpoint consolidate": _parsed("checkpoint consolidate", cli_checkpoint.consolidate),
        "eval knn": _parsed("eval knn", delayed.eval_knn),
        "quickstart": _parsed("quickstart", delayed.quickstart),
    }
    if not args or args[0] in ("-h", "--help"):
        print(_usage(verbs))
        return 0
    if args[0] == "--version":
        import fastmoco

        print(fastmoco.__version__)
        return 0
    for words in (2, 1):
        verb = verbs.get(" ".join(args[:words]))
        if verb is not None:
            try:
                return verb(args[words:])
            except KeyboardInterrupt:  # before the first step or outside training: nothing to save
                say("interrupted")
                return EXIT_INTERRUPTED
            except SystemExit as stop:
                # From the parser and `one_line`; return the code to the caller.
                return stop.code if isinstance(stop.code, int) else EXIT_REFUSED
    group = [name for name in verbs if name.split()[0] == args[0]]
    if group and (len(args) == 1 or args[1] in ("-h", "--help")):
        print(_usage({name: verbs[name] for name in group}))
        return 0
    # An unknown command: suggest similar ones.
    wanted = " ".join(args[: 2 if group else 1])
    near = difflib.get_close_matches(wanted, verbs, n=2, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else "see fastmoco --help"
    say(f"unknown command {wanted!r}; {hint}")
    return EXIT_REFUSED


def _parsed(name: str, function: Callable[..., int]) -> Callable[[list[str]], int]:
    """A verb whose arguments are those of a function, read from its signature and its docstring."""

    @functools.wraps(function)
    def bound(*values: Any, **named: Any) -> Callable[[], int]:
        return functools.partial(function, *values, **named)

    def verb(args: list[str]) -> int:
        with one_line(EXIT_REFUSED, ValueError):  # of rules that a group of arguments checks itself
            call = tyro.cli(bound, prog=f"fastmoco {name}", args=args)
        return call()

    verb.__doc__ = function.__doc__
    return verb


def _usage(verbs: dict[str, Callable[[list[str]], int]]) -> str:
    """One line for each command."""
    lines = [
        f"  fastmoco {name:<14} {first_sentence(verb.__doc__)}" for name, verb in verbs.items()
    ]
    return "\n".join(
        [
            "fastmoco: MoCo v3 pre-training",
            "",
            *lines,
            "",
            "fastmoco COMMAND --help lists its options.",
        ]
    )
