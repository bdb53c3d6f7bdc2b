"""The command line: arguments to a function call. Slow imports are delayed
until they are needed.
"""

from __future__ import annotations

import difflib
import functools
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro
from tyro.conf import Positional

from fastmoco.cli import plan as cli_plan
from fastmoco.cli.collection import collection_paused
from fastmoco.cli.environment import clean_environment
from fastmoco.cli.opening import announce, suggestion
from fastmoco.cli.plan import PlanArguments
from fastmoco.config import Config
from fastmoco.config.serial import to_json
from fastmoco.errors import EXIT_INTERRUPTED, EXIT_REFUSED, one_line, say
from fastmoco.recipes import RECIPES, get_recipe, with_image_size
from fastmoco_pipelines.text import first_sentence, redact


@dataclass(frozen=True, kw_only=True)
class TrainArguments:
    """Pre-train an encoder. The same command again continues the run; SIGTERM
    and Ctrl-C save and exit with code 75.
    """

    out: Path
    """Folder of the run: checkpoints, metrics.jsonl, config.json, curves.png."""
    gpus: int = 0
    """Processes to start on this machine, one per GPU; 0: train in this
    process, also under torchrun or srun."""
    allow: tuple[str, ...] = ()
    """Fields that may differ from those of the run in --out, e.g. optim.lr; the
    error of a refused run lists them."""
    trust: bool = False
    """Continue from the newest checkpoint in --out even if another run wrote
    it. Its SHA-256 is still checked."""
    config: Annotated[Config, tyro.conf.arg(name="")]


@dataclass(frozen=True, kw_only=True)
class ConfigArguments:
    """Print the config of a recipe with these overrides as JSON."""

    config: Annotated[Config, tyro.conf.arg(name="")]


P = TypeVar("P", TrainArguments, ConfigArguments, PlanArguments)


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
            functools.partial(_train, process_ends=argv is None), _train
        ),
        "recipes": _recipes,
        "print-config": _print_config,
        "plan": _plan,
        "data pack": _parsed("data pack", cli_data.pack),
        "data index": _parsed("data index", cli_data.index),
        "data check": _parsed("data check", cli_check.check),
        "data stats": _parsed("data stats", cli_check.stats),
        "data views": cli_data.views,
        "data sample": _parsed("data sample", cli_data.sample),
        "checkpoint verify": _parsed("checkpoint verify", cli_checkpoint.verify),
        "checkpoint list": _parsed("checkpoint list", cli_checkpoint.list_all),
        "checkpoint consolidate": _parsed("checkpoint consolidate", cli_checkpoint.consolidate),
        "eval knn": _parsed("eval knn", _eval_knn),
        "quickstart": _parsed("quickstart", _quickstart),
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


def _parse_config(kind: type[P], verb: str, args: list[str]) -> P | None:
    """A recipe and its overrides; None if no recipe is named."""
    if not args or args[0].startswith("-"):
        print(
            f"usage: fastmoco {verb} RECIPE [options]; "
            f"`fastmoco {verb} RECIPE --help` lists them\nrecipes:"
        )
        _recipes([])
        if verb == "train" and (hint := suggestion(args)) is not None:
            print(f"for these images: {hint}")
        return None
    # Errors also come from rules between two fields, which tyro passes on.
    with one_line(EXIT_REFUSED, ValueError):
        config = _follow_image_size(get_recipe(args[0]), args[1:])
        missing: Any = tyro.MISSING
        fields: dict[str, Any] = {"config": config} | (
            {"out": missing} if kind is TrainArguments else {}
        )
        return tyro.cli(
            kind, prog=f"fastmoco {verb} {args[0]}", args=args[1:], default=kind(**fields)
        )


def _follow_image_size(config: Config, args: list[str]) -> Config:
    """Apply `--model.image-size` to the views too, unless their sizes are given."""
    given = {}
    for name, value in zip(args, [*args[1:], ""], strict=False):
        key, _, inline = name.replace("_", "-").partition("=")
        given[key] = inline or value
    size = given.get("--model.image-size")
    patch = given.get("--model.patch-size", str(config.model.patch_size))
    if size is None or not (size.isdigit() and patch.isdigit()):
        return config
    return with_image_size(config, int(size), patch_size=int(patch))


def _recipes(args: list[str]) -> int:
    """List the recipes."""
    del args
    width = max(map(len, RECIPES))
    for name, recipe in RECIPES.items():
        print(f"  {name:<{width}} {first_sentence(recipe.__doc__)}")
    return 0


def _print_config(args: list[str]) -> int:
    """Print the config of a recipe with overrides, as JSON."""
    parsed = _parse_config(ConfigArguments, "print-config", args)
    if parsed is None:
        return EXIT_REFUSED
    print(json.dumps(to_json(parsed.config), indent=2))
    return 0


def _plan(args: list[str]) -> int:
    """Memory, FLOPs, micro-batches and largest batches of a recipe on given GPUs."""
    parsed = _parse_config(PlanArguments, "plan", args)
    if parsed is None:
        return EXIT_REFUSED
    return cli_plan.plan(parsed)


def _train(args: list[str], *, process_ends: bool = False) -> int:
    """Pre-train from a recipe; the same command again continues."""
    try:
        parsed = _parse_config(TrainArguments, "train", args)
    except SystemExit:
        if "TORCHELASTIC_RUN_ID" not in os.environ:
            raise
        from fastmoco.faults.restarts import refusals_are_final

        with refusals_are_final():  # otherwise torchrun would start the same command again
            raise
    if parsed is None:
        return EXIT_REFUSED
    announce(parsed.config)
    if parsed.gpus:
        from fastmoco.cli.launch import launch

        with one_line(EXIT_REFUSED, ValueError, OSError):
            return launch(parsed.gpus, ["train", *_without_gpus(args)], parsed.out)
    with collection_paused():
        from fastmoco.cli.train import train

    return train(
        parsed.config,
        parsed.out,
        allow=parsed.allow,
        trust=parsed.trust,
        process_ends=process_ends,
    )


def _without_gpus(args: list[str]) -> list[str]:
    """The arguments of one of several processes."""
    kept = [
        word for i, word in enumerate(args) if word != "--gpus" and args[max(i - 1, 0)] != "--gpus"
    ]
    return [word for word in kept if not word.startswith("--gpus=")]


def _eval_knn(
    run: Positional[Path], *, train: str, test: str, k: int = 20, temperature: float = 0.07
) -> int:
    """kNN accuracy of a run's encoder (k = 20, temperature 0.07, cosine) on labelled shards.

    Args:
        run: Folder of the run, as given to `fastmoco train --out`.
        train: Labelled shards for the neighbours.
        test: Labelled shards to classify.
        k: Number of neighbours.
        temperature: The weight of a neighbour is exp(cosine / temperature).
    """
    say(f"kNN of {run}: importing torch, then opening {redact(train)} and {redact(test)}")
    with collection_paused():
        from fastmoco.cli.train import eval_knn

    return eval_knn(run, train, test, k=k, temperature=temperature)


def _quickstart(out: Path = Path("quickstart")) -> int:
    """Pack handwritten digits, train a tiny ViT on them for a few minutes, and report its kNN
    accuracy.

    Args:
        out: Folder for shards, run and pictures.
    """
    with collection_paused():
        from fastmoco.cli.quickstart import quickstart

    with one_line(EXIT_REFUSED, ValueError, OSError):
        return quickstart(out)
