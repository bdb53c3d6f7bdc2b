"""What the records of a run cost: steps of the trainer with all telemetry and without, in turns.

With telemetry a step is the trainer's own loop: gradient norms by place of every step, and in every
log step the figures of features and weights, the detectors, `metrics.jsonl` and the console.
Without, it is the same step with the norm of all gradients alone, which the guard against steps
that are not finite needs. Both continue one training, an interval of log steps each.

The difference of two intervals has the noise of a shared machine, so the processor time inside the
calls that only telemetry makes is also added up, as a share of the same interval: that is the gate.
"""

from __future__ import annotations

import io
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.case import chosen_words
from benchmarks.measure import interleave, quantiles, ratios
from benchmarks.shown import markdown, number
from fastmoco.config import Config, KnnConfig
from fastmoco.distributed.mesh import World
from fastmoco.recipes import get_recipe, with_image_size
from fastmoco.telemetry.stability import gradient_norms
from fastmoco.training.trainer import Trainer

NAME = "telemetry"
DEFAULTS = {"shapes": "vit_nano,vit_small", "threads": 1, "rounds": 9, "small_rounds": 3}
"""`shapes` of the encoder; `threads` of torch; `rounds` of an interval of ten steps of each side,
`small_rounds` of ViT-S."""
QUICK = {"shapes": "vit_nano", "rounds": 2}
SHAPES = ("vit_nano", "vit_small")
LIMIT, JUDGED = 0.01, 3
"""Largest median share of telemetry in the processor time of a step, and the rounds from which it is
judged."""


def run(options: dict[str, Any]) -> dict[str, Any]:
    """Measure.

    Returns:
        By shape: `share`, the processor time in calls of telemetry over that of the steps of the
        same interval; `ratio`, the time of an interval with telemetry over one without; `cpu_ms` of
        a step without; `parts`, the share of each part.
    """
    found: dict[str, Any] = {}
    failed: dict[str, str] = {}
    before = torch.get_num_threads()
    with ExitStack() as stack:
        stack.callback(torch.set_num_threads, before)
        for shape in chosen_words(options, "shapes", SHAPES):
            torch.set_num_threads(options["threads"])
            rounds = options["small_rounds" if shape == "vit_small" else "rounds"]
            found[shape] = _measured(config_of(shape, options["threads"]), rounds)
            if rounds >= JUDGED and found[shape]["share"]["median"] > LIMIT:
                failed[shape] = f"{found[shape]['share']['median']:.2%} of a step"
    return {"failed": failed, "shapes": found}


def config_of(shape: str, threads: int) -> Config:
    """A run on synthetic images of the CPU: the quickstart's, or a ViT-S on small images."""
    config = get_recipe("quickstart_digits")
    if shape == "vit_small":
        config = with_image_size(get_recipe("vit_s16_e300_b4096"), 64)
        config = replace(config, global_batch_size=8)
    return replace(
        config,
        device="cpu",
        threads=threads,
        epochs=1e4,
        data=replace(config.data, synthetic=True),
        knn=KnnConfig(every_epochs=0),
        checkpoint=replace(config.checkpoint, every_minutes=1e6),
    )


def table(result: dict[str, Any]) -> str:
    """Shares and ratios by shape."""
    rows = []
    for shape, figures in result.get("shapes", {}).items():
        share, ratio = figures["share"], figures["ratio"]
        parts = ", ".join(f"{name} {part:.2%}" for name, part in figures["parts"].items())
        rows.append(
            (
                shape,
                str(figures["images"]),
                number(figures["cpu_ms"]),
                f"{share['median']:.2%} ({share['q20']:.2%} to {share['q80']:.2%})",
                f"{ratio['median']:.3f} ({ratio['q20']:.3f} to {ratio['q80']:.3f})",
                parts,
            )
        )
    head = (
        *("encoder", "images a step", "CPU-ms a step without"),
        *("share of telemetry", "with over without", "its parts"),
    )
    return markdown(head, rows)


def _measured(config: Config, rounds: int) -> dict[str, Any]:
    """The figures of one config."""
    clock = _Clock()
    with tempfile.TemporaryDirectory(prefix="fastmoco-telemetry-") as folder, ExitStack() as stack:
        stack.enter_context(redirect_stdout(io.StringIO()))
        trainer = Trainer.build(config, Path(folder) / "run", World())
        stack.callback(trainer.close)
        stack.enter_context(clock.around(trainer))
        _with(trainer)
        _without(trainer)

        def measured_with() -> float:
            clock.begin()
            seconds = _with(trainer) - clock.own_s
            clock.end(seconds)
            return seconds

        sides = {"with": measured_with, "without": lambda: _without(trainer)}
        seconds = interleave(sides, rounds=rounds)
    steps = config.log_every_steps
    return {
        "images": config.global_batch_size,
        "cpu_ms": float(f"{quantiles(seconds['without'])['median'] / steps * 1000:.4g}"),
        "share": {
            kind: round(x, 5)
            for kind, x in quantiles([sum(i.values()) for i in clock.intervals]).items()
        },
        "ratio": {
            kind: round(x, 4) for kind, x in ratios(seconds["with"], seconds["without"]).items()
        },
        "parts": {
            name: round(quantiles([i.get(name, 0.0) for i in clock.intervals])["median"], 5)
            for name in clock.names
        },
    }


def _with(trainer: Trainer) -> float:
    """CPU-seconds of an interval of the trainer's own loop, which ends with a log step."""
    return _timed(trainer, trainer._one_step)


def _without(trainer: Trainer) -> float:
    """CPU-seconds of as many steps without telemetry."""
    places, trainer.train_step._places = trainer.train_step._places, {}

    def one() -> None:
        trainer.train_step(trainer.loader.next(), trainer.progress(trainer.step_count))
        trainer.step_count += 1

    try:
        return _timed(trainer, one)
    finally:
        trainer.train_step._places = places


def _timed(trainer: Trainer, one: Callable[[], None]) -> float:
    began = time.process_time()
    for _ in range(trainer.config.log_every_steps):
        one()
    return time.process_time() - began


class _Clock:
    """Processor time inside the calls of telemetry, by part.

    Attributes:
        names: of the parts.
        intervals: shares of the interval, by part.
        own_s: CPU-seconds of this interval that the clock itself has cost.
    """

    names = ("norms by place", "figures of weights", "records")

    def __init__(self) -> None:
        self.intervals: list[dict[str, float]] = []
        self.own_s = 0.0
        self._spent: dict[str, float] = {}

    def begin(self) -> None:
        """Start an interval."""
        self._spent = {}
        self.own_s = 0.0

    def end(self, seconds: float) -> None:
        """End an interval of so many CPU-seconds."""
        self.intervals.append({name: spent / seconds for name, spent in self._spent.items()})

    @contextmanager
    def around(self, trainer: Trainer) -> Iterator[None]:
        """Measure the calls of a trainer while the context is open."""

        def norms(parameters: Any, places: Any) -> Any:
            parameters = list(parameters)
            began = time.process_time()
            found = gradient_norms(parameters, places)
            self._add("norms by place", time.process_time() - began)
            if places:  # without the pass over the gradients that the guard needs
                began = time.process_time()
                gradient_norms(parameters, {})
                again = time.process_time() - began
                self._add("norms by place", -again)
                self.own_s += again
            return found

        inner, weights = trainer.train_step, "figures of weights"
        with (
            patch("fastmoco.training.step.gradient_norms", norms),
            patch.object(inner._ratios, "begin", self._of(weights, inner._ratios.begin)),
            patch.object(inner, "_figures", self._of(weights, inner._figures)),
            patch.object(trainer, "_record", self._of("records", trainer._record)),
        ):
            yield

    def _of(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def measured(*arguments: Any) -> Any:
            began = time.process_time()
            try:
                return call(*arguments)
            finally:
                self._add(name, time.process_time() - began)

        return measured

    def _add(self, name: str, seconds: float) -> None:
        self._spent[name] = self._spent.get(name, 0.0) + seconds
