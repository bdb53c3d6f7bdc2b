"""fastmoco against the baseline, end to end from JPEG shards: images per CPU-second, peak memory,
and where the time of a step goes.

Every contender is a process of its own that trains on the same images with the same draws and
start weights; `benchmarks/baseline` is the opponent. A contender whose first losses differ from the
baseline's is not compared. Turns are interleaved over contenders and sizes. A turn is some steps of
the whole training loop between two moments at which the loaders are idle, in processor time of the
process and its workers. `python -m benchmarks.photos` makes shards of photographs.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.baseline.views import library
from benchmarks.case import chosen_words
from benchmarks.end_to_end_child import BASELINE, CONTENDERS
from benchmarks.measure import interleave, ratios
from benchmarks.photos import sample_shards
from benchmarks.shown import low_high, markdown, number
from fastmoco_pipelines.views.runtime import has_dali

NAME = "end_to_end"
DEFAULTS = {
    "shards": "",
    "sizes": "224,96",
    "contenders": ",".join(CONTENDERS),
    "measures": "rate,parts,memory",
    "precision": "fp32",
    "batch": 64,
    "width": 192,
    "depth": 4,
    "heads": 3,
    "hidden": 1024,
    "threads": 1,
    "checked": 2,
    "steps": 1,
    "rounds": 3,
}
QUICK = {
    "sizes": "32",
    "contenders": "fastmoco,baseline eager",
    "measures": "rate,parts",
    "batch": 8,
    "width": 32,
    "depth": 2,
    "heads": 2,
    "hidden": 64,
    "steps": 2,
    "rounds": 1,
}
MEASURES = ("rate", "parts", "memory")
LIMITS = {"fp32": 1e-3, "bf16": 3e-2}
"""Largest difference of the first losses. Views differ by a few levels in a few windows, where
Pillow resizes in another order; bf16 rounds to 1/256."""
REFERENCE = "baseline eager"


class Child:
    """A contender's process."""

    def __init__(self, options: dict[str, Any], **variables: str) -> None:
        command = [sys.executable, "-m", "benchmarks.end_to_end_child", json.dumps(options)]
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(options["threads"]),
            "TORCHINDUCTOR_COMPILE_THREADS": "1",
            **variables,
        }
        self._name = f"{options['contender']} at {options['size']}"
        self._process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, word: str) -> dict[str, Any]:
        """The answer to a word.

        Raises:
            ValueError: if the process has ended.
        """
        assert self._process.stdin is not None  # noqa: S101 - a type: it was opened with a pipe
        assert self._process.stdout is not None  # noqa: S101 - a type: it was opened with a pipe
        self._process.stdin.write(word + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise ValueError(f"{self._name} ended with {self._process.wait()} at {word!r}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None  # noqa: S101 - a type: it was opened with a pipe
        self._process.stdin.close()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()


def run(options: dict[str, Any]) -> dict[str, Any]:
    """Check, then measure.

    Args:
        options: `shards` (empty: cut from sample photographs); `sizes` of the views in pixels;
            `contenders`, some of `end_to_end_child.CONTENDERS`, among them `baseline eager`;
            `measures`, some of rate, parts, memory; `precision` (fp32 or bf16); images of a
            `batch`; `width`, `depth` and `heads` of the ViT, `hidden` width of its heads;
            `threads` of torch, and of the loader: threads of fastmoco, worker processes of the
            baseline; first losses `checked`; `steps` of a turn at the largest size, more at
            smaller ones, inversely proportional to the size; `rounds`.

    Returns:
        By size: `losses` of the first steps, `failed` with reasons, `first_step` with the time of
        compilation; `images_per_cpu_s` by contender and round, and their medians;
        `speedup` of fastmoco, and `speedup_compiled` of fastmoco with compiled blocks, over each
        baseline; `parts` and `parts_total` in CPU milliseconds per image; `memory` in bytes. Also
        the libraries that make the views.

    Raises:
        ValueError: for an unknown contender, measure or precision.
    """
    names = chosen_words(options, "contenders", CONTENDERS)
    measured = chosen_words(options, "measures", MEASURES)
    chosen_words(options, "precision", LIMITS)
    if REFERENCE not in names:
        raise ValueError(f"contenders: needs {REFERENCE!r}, whose losses the others are held to")
    sizes = [int(word) for word in options["sizes"].split(",")]
    result: dict[str, Any] = {
        "failed": {},
        "views": {"baseline": library(), "fastmoco": "DALI" if has_dali() else "Pillow"},
    }
    with ExitStack() as stack:
        if not options["shards"]:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            options = options | {"shards": sample_shards(folder, options["batch"])}
        by_size = {size: _options(options, size, max(sizes)) for size in sizes}
        if "rate" in measured or "parts" in measured:
            _in_turns(by_size, names, measured, result)
        if "memory" in measured:
            for size, own in by_size.items():
                found = {name: _memory(own | {"contender": name}) for name in names}
                result.setdefault(str(size), {})["memory"] = found
    return result


def table(result: Mapping[str, Any]) -> str:
    """For each size a row for each contender, then its parts of a step."""
    sizes = {n: p for n, p in result.items() if n.isdigit() and isinstance(p, Mapping)}
    text = []
    for size, part in sizes.items():
        names = list(dict.fromkeys((*part.get("median", {}), *part.get("memory", {}))))
        rows = []
        for name in names:
            ratios_ = [part.get(key, {}).get(name) for key in ("speedup", "speedup_compiled")]
            rows.append(
                (
                    name,
                    number(part["median"][name]) if name in part.get("median", {}) else "",
                    *(_spread(ratio) for ratio in ratios_),
                    *_peaks(part.get("memory", {}).get(name, {})),
                )
            )
        head = ("contender", "images per CPU-second", "speed-up of fastmoco over it")
        keys = [f"{key}, MB" for key in next(iter(part.get("memory", {}).values()), {})]
        heads = (*head, "speed-up of fastmoco compiled over it", *keys)
        text.append(f"**{size} pixels**")
        if rows:  # without the columns of what was not measured
            shown = [i for i, _ in enumerate(heads) if any(row[i] for row in rows)]
            cells = [[row[i] for i in shown] for row in rows]
            text.append(markdown([heads[i] for i in shown], cells))
        if parts := part.get("parts"):
            steps = list(dict.fromkeys(step for own in parts.values() for step in own))
            rows = [(n, *(number(own.get(s, 0.0)) for s in steps)) for n, own in parts.items()]
            text.append("CPU milliseconds per image by part of a step:")
            text.append(markdown(("contender", *steps), rows))
        text += [f"{name} failed: {why}." for name, why in part.get("failed", {}).items()]
    return "\n\n".join(text)


def _spread(ratio: Mapping[str, float] | None) -> str:
    if not ratio:
        return ""
    return f"{number(ratio['median'])} ({' to '.join(map(number, low_high(ratio)))})"


def _peaks(memory: Mapping[str, Any]) -> list[str]:
    return [f"{value / 1e6:,.1f}" if isinstance(value, int) else "" for value in memory.values()]


def _options(options: dict[str, Any], size: int, largest: int) -> dict[str, Any]:
    """The options of one size."""
    return options | {
        "size": size,
        "steps": max(1, round(options["steps"] * largest / size)),
    }


def _in_turns(
    by_size: dict[int, dict[str, Any]],
    names: list[str],
    measured: list[str],
    result: dict[str, Any],
) -> None:
    """Check all contenders, then let them take turns, and add the figures to `result`."""
    with ExitStack() as stack:
        children: dict[tuple[int, str], Child] = {}
        for size, own in by_size.items():
            for name in names:
                child = Child(own | {"contender": name})
                stack.callback(child.close)
                children[size, name] = child

            # The gate: the losses of the first steps.
            answers = {name: children[size, name].ask("check") for name in names}
            losses = {name: answer.pop("losses") for name, answer in answers.items()}
            failed = _failed(losses, LIMITS[own["precision"]])
            result["failed"] |= {f"{name} at {size}": why for name, why in failed.items()}
            result[str(size)] = {"losses": losses, "first_step": answers, "failed": failed}
            for name in failed:
                del children[size, name]

        # Images per CPU-second. The first losses were the warm-up.
        rounds = next(iter(by_size.values()))["rounds"]
        if "rate" in measured:
            turns = {key: partial(_rate, child) for key, child in children.items()}
            rates = interleave({f"{s} {n}": turn for (s, n), turn in turns.items()}, rounds=rounds)
            for size in by_size:
                own = {n: rates[f"{size} {n}"] for s, n in children if s == size}
                result[str(size)] |= _compared(own)
        if "parts" in measured:
            for (size, name), child in children.items():
                answer = child.ask("parts")
                of_size = result[str(size)]
                of_size.setdefault("parts", {})[name] = answer["parts"]
                of_size.setdefault("parts_total", {})[name] = answer["total"]


def _rate(child: Child) -> float:
    return float(child.ask("turn")["images_per_cpu_s"])


def _failed(losses: dict[str, list[float]], limit: float) -> dict[str, str]:
    """Contenders whose first losses differ from the reference's, with the reason."""
    failed = {}
    for name, own in losses.items():
        apart = max(abs(a - b) for a, b in zip(own, losses[REFERENCE], strict=True))
        if not apart <= limit:
            failed[name] = f"first losses {apart:.2g} from those of {REFERENCE}, limit {limit}"
    return failed


def _compared(rates: dict[str, list[float]]) -> dict[str, Any]:
    """Rates by contender, and the ratios of fastmoco over the baselines."""
    found: dict[str, Any] = {
        "images_per_cpu_s": {n: [round(x, 2) for x in values] for n, values in rates.items()},
        "median": {n: round(statistics.median(values), 2) for n, values in rates.items()},
    }
    for key, subject in (("speedup", "fastmoco"), ("speedup_compiled", "fastmoco compiled")):
        if subject in rates:
            found[key] = {
                n: {kind: round(x, 3) for kind, x in ratios(rates[subject], rates[n]).items()}
                for n in BASELINE
                if n in rates
            }
    return found


def _memory(options: dict[str, Any]) -> dict[str, Any]:
    """Of one contender, in a fresh process that returns freed memory to the system at once."""
    child = Child(options, MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="65536")
    try:
        return child.ask("memory")
    finally:
        child.close()
