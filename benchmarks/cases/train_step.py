"""A whole training step at a large batch, against a usual step: eager, mixed
precision, nothing fused.

The opponent is the baseline (`benchmarks/baseline`): each view separately through every block,
explicit attention, full logits and cross entropy, fp16 autocast with a gradient scaler on GPUs
(float32 on CPUs), torch's AdamW, the momentum update tensor by tensor. It keeps all graphs, so if
the batch does not fit it uses the largest half, quarter, ... of it that does. Loss and gradients of
the first images, ours and the reference's, are compared with float64. If our errors are several
times larger, the result is marked: it is timed, without a speed-up. On a GPU each side has its own
process.
"""

from __future__ import annotations

import statistics
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch

from benchmarks.case import chosen_words
from benchmarks.measure import interleave, ratios
from benchmarks.step_sides import SIDES, config_of, device_of, measure_apart, open_side
from fastmoco.config import Config
from fastmoco.models.precision import choose_precision
from fastmoco.planning.costs import measure_costs

NAME = "train_step"
DEFAULTS = {
    "device": "auto",
    "recipe": "",
    "architecture": "",
    "linears": "native",
    "momentum_linears": "native",
    "blocks": "modules",
    "attention": "",
    "compile": 0,
    "cuda_graphs": 0,
    "batch": 0,
    "chunk": "auto",
    "kept": "auto",
    "activation_budget": 0.0,
    "sides": "fastmoco,eager",
    "processes": -1,
    "profile": 0,
    "rounds": 5,
    "steps": 2,
    "checked": 16,
    "tflops": 790.0,
}
QUICK = {"batch": 32, "chunk": "8", "rounds": 2, "steps": 1}
TIMES = 4.0
"""Largest ratio of our error to that of the reference, both in float32 relative to float64."""
FLOOR = 1e-5
"""Smaller errors of the reference are chance."""
FLOAT8 = 0.3
"""Float8 rounds to 1/16. It is compared by the features of the trunk only, because batch norms of
initial heads over few images amplify rounding errors in all gradients."""


def run(options: dict[str, Any]) -> dict[str, Any]:
    """Check, then measure.

    Args:
        options: `device` ("auto", "cpu" or "cuda"); `recipe` (empty: vit_s16_e300_b4096 on a GPU,
            quickstart_digits on a CPU); `architecture`, `linears`, `momentum_linears`, `blocks`,
            `attention` as in `ModelConfig`, instead of the recipe's; `compile` 1 for our blocks through
            torch.compile, `cuda_graphs` 1 for chunks replayed; `batch` images (0: the recipe's);
            `chunk` ("auto", "none" or a number); `kept` and `activation_budget` as in `BatchConfig` (budget 0: auto);
            `sides`, some of `step_sides.SIDES`; `processes`
            1: each side in its own process, 0: in turns in this one, -1: separate on a GPU;
            `profile` 1 for launches and the largest kernels; `rounds` of `steps` steps; images
            `checked`; `tflops` of the device in bf16, for the utilisation.

    Returns:
        `errors`, `plain_errors` and `failed`, and `marked` with the reason where the check failed;
        `plan` of the trainer; `images_per_s` by side and round; `graphs` that torch.compile
        made while it warmed up and while it was timed; `speedup` by images/s; `batch` of
        each opponent; on CUDA `milliseconds` per image, `mfu` and `peak_bytes` by side.

    Raises:
        ValueError: for an unknown side.
    """
    sides = chosen_words(options, "sides", SIDES)
    device, config = device_of(options), config_of(options)
    # Counting takes seconds of the host, while a side may be in another process.
    counted = ThreadPoolExecutor(1).submit(_flops, config, device)
    apart = device.type == "cuda" if options["processes"] < 0 else bool(options["processes"])
    failed: dict[str, str] = {}
    found = _apart(sides, options, failed) if apart else _in_turns(sides, options)
    result: dict[str, Any] = {"failed": failed, "speedup": {}, "subject": sides[0]}
    for name, side in found.items():
        for key in (
            *("plan", "errors", "plain_errors"),
            *("launches", "busy_ms", "parts_ms", "largest_kernels", "graphs"),
        ):
            if key in side:
                result[key] = side[key]
        if "batch" in side:
            result.setdefault("batch", {})[name] = side["batch"]
    if beyond := _beyond(result):
        result["marked"] = beyond
    rates = {name: side["images_per_s"] for name, side in found.items()}
    result["images_per_s"] = {name: [round(x, 1) for x in values] for name, values in rates.items()}
    result["first_step_s"] = {name: side["first_step_s"] for name, side in found.items()}
    for name in rates:
        if name != "fastmoco" and "fastmoco" in rates and not beyond:
            result["speedup"][name] = ratios(rates["fastmoco"], rates[name])
    if device.type == "cuda" and rates:
        flops = counted.result()
        medians = {name: statistics.median(values) for name, values in rates.items()}
        result["milliseconds"] = {name: round(1e3 / value, 4) for name, value in medians.items()}
        result["mfu"] = {
            name: round(value * flops / (options["tflops"] * 1e12), 4)
            for name, value in medians.items()
        }
        result["peak_bytes"] = {name: side["peak_bytes"] for name, side in found.items()}
        result["work"] = {"flops": flops, "ms": next(iter(result["milliseconds"].values()))}
    return result


def _flops(config: Config, device: torch.device) -> float:
    """FLOPs of a step for each image; 0 on a CPU, where no rate is reported."""
    if device.type != "cuda":
        return 0.0
    return measure_costs(config, choose_precision(config.precision, device)).step_flops


def _apart(
    sides: list[str], options: dict[str, Any], failed: dict[str, str]
) -> dict[str, dict[str, Any]]:
    """Each side in its own process; a failed one does not affect the others."""
    found = {}
    for name in sides:
        try:
            found[name] = measure_apart(name, options)
        except RuntimeError as error:
            failed[name] = str(error)
    return found


def _in_turns(sides: list[str], options: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """All sides in this process, a round of each in turn, so that other load
    affects them equally.
    """
    with ExitStack() as stack:
        open_sides = {name: stack.enter_context(open_side(name, options)) for name in sides}
        for side in open_sides.values():
            side.warm(profile=bool(options["profile"]))
        steps = options["steps"]
        measures = {name: partial(side.images_per_s, steps) for name, side in open_sides.items()}
        rates = interleave(measures, rounds=options["rounds"])
        return {
            name: side.result | {"images_per_s": rates[name]} for name, side in open_sides.items()
        }


def _beyond(result: dict[str, Any]) -> str:
    """Quantities whose error relative to float64 is too large; empty if none."""
    plain = result.get("plain_errors", {})
    beyond = []
    for name, error in result.get("errors", {}).items():
        limit = FLOAT8 if name == "features" else TIMES * max(plain[name], FLOOR)
        if not error <= limit:
            beyond.append(f"{name} {error:.2g} from float64, more than {limit:.2g}")
    return ", ".join(beyond)
