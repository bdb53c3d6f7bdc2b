"""The commands that take a recipe and overrides: `train`, `print-config` and `plan`; and `recipes`."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro

from fastmoco.cli import plan as cli_plan
from fastmoco.cli.collection import collection_paused
from fastmoco.cli.plan import PlanArguments
from fastmoco.config import Config
from fastmoco.config.serial import to_json
from fastmoco.errors import EXIT_REFUSED, close_output, one_line
from fastmoco.faults.parent import follow_parent
from fastmoco.faults.start_up import StartUp
from fastmoco.recipes import RECIPES, get_recipe, with_image_size
from fastmoco_pipelines.text import first_sentence


@dataclass(frozen=True, kw_only=True)
class TrainArguments:
    """Pre-train an encoder. The same command again continues the run; SIGTERM
    and Ctrl-C save and exit with code 75.
    """

    out: Path
    """Folder of the run: checkpoints, metrics.jsonl, config.json, curves.png."""
    gpus: int = 0
    """Processes to start on this machine, one per GPU, or on its CPU; 0: train in this process,
    also as one of several under torchrun, srun or launch/slurm.sh."""
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


def parse_config(kind: type[P], verb: str, args: list[str]) -> P | None:
    """A recipe and its overrides; None if no recipe is named."""
    if not args or args[0].startswith("-"):
        print(
            f"usage: fastmoco {verb} RECIPE [options]; "
            f"`fastmoco {verb} RECIPE --help` lists them\nrecipes:"
        )
        recipes([])
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


def recipes(args: list[str]) -> int:
    """List the recipes."""
    del args
    width = max(map(len, RECIPES))
    for name, recipe in RECIPES.items():
        print(f"  {name:<{width}} {first_sentence(recipe.__doc__)}")
    return 0


def print_config(args: list[str]) -> int:
    """Print the config of a recipe with overrides, as JSON."""
    parsed = parse_config(ConfigArguments, "print-config", args)
    if parsed is None:
        return EXIT_REFUSED
    print(json.dumps(to_json(parsed.config), indent=2))
    return 0


def plan(args: list[str]) -> int:
    """Memory, FLOPs, micro-batches and largest batches of a recipe on given GPUs."""
    parsed = parse_config(PlanArguments, "plan", args)
    if parsed is None:
        return EXIT_REFUSED
    return cli_plan.plan(parsed)


def train(args: list[str], *, process_ends: bool = False) -> int:
    """Pre-train from a recipe; the same command again continues."""
    if "TORCHELASTIC_RUN_ID" in os.environ:  # a launcher that is killed cannot end its workers
        follow_parent()
    with StartUp() as start_up:
        code = _train(args, start_up, process_ends=process_ends)
    if process_ends:
        close_output()
    return code


def _train(args: list[str], start_up: StartUp, *, process_ends: bool) -> int:
    try:
        parsed = parse_config(TrainArguments, "train", args)
    except SystemExit:
        if "TORCHELASTIC_RUN_ID" not in os.environ:
            raise
        from fastmoco.faults.restarts import refusals_are_final

        with refusals_are_final():  # otherwise torchrun would start the same command again
            raise
    if parsed is None:
        return EXIT_REFUSED
    if parsed.gpus:
        from fastmoco.cli.launch import launch

        start_up.end()
        with one_line(EXIT_REFUSED, ValueError, OSError):
            words = ["train", *_without_gpus(args)]
            return launch(parsed.gpus, words, parsed.out, device=parsed.config.device)
    start_up.opens(parsed.out)
    with collection_paused():
        from fastmoco.cli.train import train

    return train(
        parsed.config,
        parsed.out,
        allow=parsed.allow,
        trust=parsed.trust,
        process_ends=process_ends,
        begun=start_up.end,
    )


def _without_gpus(args: list[str]) -> list[str]:
    """The arguments of one of several processes."""
    kept = [
        word for i, word in enumerate(args) if word != "--gpus" and args[max(i - 1, 0)] != "--gpus"
    ]
    return [word for word in kept if not word.startswith("--gpus=")]
