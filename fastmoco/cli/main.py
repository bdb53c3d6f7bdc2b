"""The command line: find the command, run it, and return its exit code. Slow imports are delayed
until they are needed.
"""

from __future__ import annotations

import functools
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from fastmoco.cli.commands import COMMANDS, Command, group_of
from fastmoco.cli.environment import (
    clean_environment,
    require_current_folder,
    without_modules_here,
)
from fastmoco.cli.output import PROCESS_ENDS
from fastmoco.cli.pages import HELP, of_function, overview, show_page
from fastmoco.cli.words import prepare_streams, prepare_words
from fastmoco.errors import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_REFUSED,
    EXIT_UNREAD,
    close_output,
    one_line,
    output_fault,
    reader_is_gone,
    say,
)
from fastmoco.errors.streams import open_closed_streams, shown_streams
from fastmoco.faults.parent import follow_launcher
from fastmoco_pipelines.processes import is_orphan, leave_current_folder


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: arguments without the name of the program; default those of the process, which then
            ends with the command.

    Returns:
        The exit code: 0 finished, 1 failed while running, 2 refused before running, 75 stopped by a
        signal after saving its state, 130 interrupted with nothing to save, 141 the reader of the
        output has closed its pipe.
    """
    process_ends = argv is None
    token = PROCESS_ENDS.set(process_ends)
    if process_ends:
        open_closed_streams()
        leave_current_folder()
    with shown_streams(for_good=process_ends), without_modules_here(for_good=process_ends):
        try:
            code = _main(list(sys.argv[1:] if argv is None else argv), process_ends=process_ends)
        except OSError as error:
            if isinstance(error, BrokenPipeError) and reader_is_gone():
                code = EXIT_UNREAD
            elif fault := output_fault():
                say(f"standard output: {fault}")
                code = EXIT_FAILED
            else:
                raise
        finally:
            PROCESS_ENDS.reset(token)
    if process_ends and is_orphan():
        # Nobody reads its output, and Python takes seconds to put away what torch has made.
        close_output()
        os._exit(code)
    return code


def _main(args: list[str], *, process_ends: bool) -> int:
    try:
        prepare_streams()
        clean_environment(os.environ)
        args = prepare_words(args)
    except ValueError as error:
        say(str(error))
        return EXIT_REFUSED

    # Help and version.
    if args and args[0] == "help":
        args = [*args[1:], "--help"]
    if not args or args[0] in HELP:
        show_page(overview())
        return 0
    if args[0] in ("--version", "-V", "version"):
        from fastmoco.training.checkup.packages import version_line

        print(version_line(), flush=True)
        return 0

    # A command.
    for words in (2, 1):
        command = COMMANDS.get(" ".join(args[:words]))
        if command is not None:
            try:
                with one_line(EXIT_REFUSED, ValueError):
                    require_current_folder()
                    if command.ranks and process_ends and not set(args) & set(HELP):
                        follow_launcher()
                code = _run(command, args[words:], process_ends=process_ends)
                if sys.stdout is not None:
                    sys.stdout.flush()
                return code
            except KeyboardInterrupt:  # before the first step or outside training: nothing to save
                again = "; to continue: the same command again" if command.continues else ""
                say(f"interrupted{again}")
                return EXIT_INTERRUPTED
            except SystemExit as stop:
                # From the parser and `one_line`; return the code to the caller.
                return stop.code if isinstance(stop.code, int) else EXIT_REFUSED

    # A group of commands.
    if group_of(args[0]) and (len(args) == 1 or args[1] in HELP):
        show_page(overview(args[0]))
        return 0
    say(_unknown(args))
    return EXIT_REFUSED


def _run(command: Command, args: list[str], *, process_ends: bool) -> int:
    """Run one command with the words after its name.

    Args:
        command: of the table.
        args: the words.
        process_ends: whether the process ends with the command; a caller that gives the arguments
            is a program of its own, which goes on afterwards.
    """
    if command.reads_words:
        ends = {"process_ends": process_ends} if command.name == "train" else {}
        return command.call(args, **ends)

    from fastmoco.cli.mistakes import Wording, parse, worded
    from fastmoco.cli.options import describe
    from fastmoco.config.limits import require_limit

    function = command.call
    if set(args) & set(HELP):
        show_page(of_function(command.name, describe(function)))
        return 0

    @functools.wraps(function)
    def bound(*values: Any, **named: Any) -> Callable[[], int]:
        given = inspect.signature(function).bind(*values, **named).arguments
        for name, value in given.items():
            require_limit(name, value)
        return functools.partial(function, *values, **named)

    call = parse(bound, command.name, args)
    with worded(lambda error: Wording(describe(function), args)(error)):
        return call()


def _unknown(args: list[str]) -> str:
    """What to say about a command that does not exist."""
    from fastmoco.cli.suggest import near_commands, one_of
    from fastmoco.recipes import RECIPES, near_recipes

    if args[0].startswith("-"):
        return f"{args[0]}: options come after the command, fastmoco COMMAND [options]"
    if args[0] in RECIPES:
        return f"unknown command {args[0]!r}; did you mean train {args[0]}?"
    wanted = " ".join(args[: 2 if group_of(args[0]) else 1])
    near = near_commands(args, COMMANDS)
    if not near and (recipes := near_recipes(args[0])):
        near = [f"train {recipe}" for recipe in recipes]
    lists = f"fastmoco {args[0]} --help" if group_of(args[0]) else "fastmoco --help"
    hint = f"did you mean {one_of(near)}?" if near else f"{lists} lists all"
    return f"unknown command {wanted!r}; {hint}"
