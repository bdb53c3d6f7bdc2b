"""The table of commands. To add one: a function in a module of this room, and a line here."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """One command; its module is imported when it is used."""

    name: str
    """One or two words, as typed."""
    function: str
    """Module in `fastmoco.cli` and function. It returns the exit code."""
    line: str
    """What it does, for the overview: at most 64 characters."""
    reads_words: bool = False
    """The function takes the words after the name, help flags included; else they are parsed by its
    signature."""
    continues: bool = False
    """The same command goes on after Ctrl-C: it stores parts of its work."""
    ranks: bool = False
    """Several processes of a launcher may run it together; each of them ends with the launcher."""

    @functools.cached_property
    def call(self) -> Callable[..., int]:
        """The function."""
        module, _, name = self.function.partition(":")
        found: Callable[..., int] = getattr(importlib.import_module(f"fastmoco.cli.{module}"), name)
        return found


def _words(name: str, function: str, line: str, *, ranks: bool = False) -> Command:
    """A command that reads its own words."""
    return Command(name, function, line, reads_words=True, ranks=ranks)


def _eval(name: str, function: str, line: str, *, continues: bool = True) -> Command:
    """An evaluation."""
    return Command(name, function, line, continues=continues, ranks=True)


GROUPS: dict[str, tuple[Command, ...]] = {
    "Train": (
        _words(
            "train",
            "recipe_commands:train",
            "Pre-train; the same command again continues.",
            ranks=True,
        ),
        _words("recipes", "recipe_commands:recipes", "List the recipes."),
        _words(
            "print-config",
            "recipe_commands:print_config",
            "Print a config, as a file to train from.",
        ),
        _words("plan", "recipe_commands:plan", "Memory, FLOPs and largest batches on given GPUs."),
        _words(
            "profile",
            "recipe_commands:profile",
            "Where the time of a step goes, by part.",
            ranks=True,
        ),
        _words("tune", "recipe_commands:tune", "Measure the fastest settings; a launch script."),
        Command("quickstart", "delayed:quickstart", "Train on handwritten digits, in minutes."),
        Command("doctor", "doctor:doctor", "What works on this machine, and cures."),
    ),
    "Data": (
        Command("data pack", "data:pack", "Pack a folder of images into shards."),
        Command("data index", "data:index", "Index existing shards of any origin."),
        Command("data check", "check:check", "Decode every image and list the unusable ones."),
        Command("data stats", "check:stats", "Sizes, formats and classes of a set."),
        _words("data views", "data:views", "Draw images and their augmented views."),
        Command("data sample", "data:sample", "Write a small real set: handwritten digits."),
    ),
    "Checkpoints": (
        Command("checkpoint list", "checkpoint:list_all", "Step, size and state of each."),
        Command("checkpoint verify", "checkpoint:verify", "Read and verify every byte."),
        Command("checkpoint consolidate", "checkpoint:consolidate", "Write one safetensors file."),
        Command("export", "export:export", "Write the encoder for timm, Hugging Face, ONNX, ..."),
    ),
    "Evaluate": (
        _eval("eval knn", "delayed:eval_knn", "kNN accuracy of an encoder."),
        _eval("eval linear", "linear:eval_linear", "Linear classifier on a frozen encoder."),
        _eval(
            "eval finetune",
            "finetune:eval_finetune",
            "Train on with labels; its accuracy.",
            continues=False,
        ),
        _eval("eval embed", "embed:embed", "Write the features of images to a file."),
        _eval("eval neighbours", "embed:neighbours", "The nearest images of each image."),
        _eval("eval outliers", "embed:outliers", "Images that are like no others."),
        Command("runs", "runs:runs", "List the runs below a folder: state, step, kNN, speed."),
        Command("curves", "curves:curves", "Draw loss, kNN and gradient norms of a run."),
        Command("report", "report:report", "Write a page about runs: curves, health, pictures."),
        Command("run images", "step_images:images", "Which images were in a step or a spike."),
    ),
}
"""Every command, by the heading of the overview."""

COMMANDS: dict[str, Command] = {
    command.name: command for group in GROUPS.values() for command in group
}
"""Every command by its name."""


def group_of(word: str) -> list[Command]:
    """The commands of two words that begin with a word."""
    return [command for name, command in COMMANDS.items() if name.split()[:-1] == [word]]
