"""The lines of a card as a section of docs/performance.md: `benchmarks/results/gpu-*.jsonl`, which
hold what `make gpu` wrote, of one run or several.

Tables show the newest line of each name. A skipped line replaces none that was measured. Each line
that failed, was marked or was skipped is listed with its reason, also an earlier one.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu import goals
from benchmarks.gpu.stages import STAGES
from benchmarks.outcome import FAILED, OK, SKIPPED
from benchmarks.shown import Bars, Chart, contests, low_high, markdown, number, subject_of
from fastmoco.recipes import get_recipe

Line = Mapping[str, Any]
Lines = Mapping[str, Line]
"""The newest line of each name."""
KERNELS = 12
"""Kernels of a profile that are shown."""
REASON = 200
"""Characters of a reason that are shown."""
KERNEL = re.compile(r"(?P<ms>\S+) ms (?P<share>\S+) x(?P<calls>\d+) (?P<name>.*)")
"""An entry of `largest_kernels`."""
CEILINGS = {
    "matmul_tflops": "large product in bf16, TFLOP/s",
    "vit_s_matmul_tflops": "product of ViT-S in bf16, TFLOP/s",
    "copy_gb_per_s": "copy, read and written, GB/s",
    "launch_us": "launch of a small operation, us of the host",
}
FIGURES = {
    "milliseconds": "GPU ms of {}",
    "speedup": "speed-up over {}",
    "peak_bytes": "extra MB of {}",
    "errors": "error of the gradient of {}",
    "share": "share of the ceiling of a {}",
    "images_per_s": "images/s of {}",
    "us_per_image": "GPU us per image",
    "ratio": "images/s from shards over those of synthetic images",
    "loader_gb": "GB of the loader on the GPU",
    "bf16": "largest difference of a loss in {}",
    "fp32": "largest difference of a loss in {}",
}
"""The figures of goals in words, by the first name of their path; the second name is filled in."""
END_TO_END = {
    "images_per_s": "images/s",
    "turns": "images/s by turn",
    "ratio": "shards over synthetic",
    "wait_share": "share of time that the GPU waits for a batch",
    "host_wait_share": "share of time that the host waits",
    "knn_start": "kNN at the start",
    "knn": "kNN at the end",
    "steps": "steps",
    "batch": "batch",
    "images": "images for training, for testing",
    "kb_per_image": "kB per image",
    "photographs": "cut from photographs",
    "loader": "images are decoded on the",
    "loader_gb": "GB of the loader",
    "loader_expected_gb": "GB of the loader, expected",
    "peak_gb": "peak GB in torch",
    "reserved_gb": "GB reserved by torch",
    "driver_gb": "GB given out by the driver",
    "outside_torch_gb": "of them outside torch",
    "first_steps_s": "s of the first steps",
    "plan": "plan",
}
"""Entries of lines of `end_to_end`."""


def cards(results: Path) -> dict[str, list[dict[str, Any]]]:
    """The lines of each card by the name of its file."""
    found = {
        path.stem: [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
        for path in sorted(results.glob("gpu-*.jsonl"))
    }
    return {name: lines for name, lines in found.items() if lines}


def image(name: str) -> str:
    """Name of the image of a card's file."""
    return name.replace("-", "_") + ".svg"


def section(name: str, lines: Sequence[Line]) -> str:
    """The section of a card.

    Args:
        name: of its file.
        lines: all, in the order of the file.
    """
    card, last = card_of(lines) or name, _commit(lines[-1])
    shown: dict[str, Line] = {
        each: line if _commit(line) == last else {**line, "older": _commit(line)}
        for each, line in newest(lines).items()
    }
    parts = [f"## {card}", _about(lines)]
    if charts(lines):
        parts.append(f"![{card}](images/performance/{image(name)})")
    tables: dict[str, Callable[[Lines], str]] = {
        "Ceilings": _ceilings,
        "Goals": lambda these: _goals(these, card),
        "Training steps": _steps,
        "Attention": lambda these: _contests(_of_cases(these, "attention")),
        "Loss": lambda these: _contests(_of_cases(these, "info_nce")),
        "Optimizer and momentum update": lambda t: _contests(_of_cases(t, "adamw_ema", "ema")),
        "Other kernels": lambda these: _contests(_others(these)),
        "Loader": _loader,
        "JPEG shards to kNN": _end_to_end,
        "Correctness": _correctness,
        "Largest kernels of a step": _profiles,
        "Failed, marked, skipped, not begun": lambda _: _faults(lines),
    }
    for title, table in tables.items():
        if text := table(shown):
            parts += [f"### {title}", text]
    return "\n\n".join(parts)


def newest(lines: Iterable[Line]) -> dict[str, Line]:
    """The newest line of each name, in the order of the stages; a skipped one replaces no other."""
    found: dict[str, Line] = {}
    for line in lines:
        if line["status"] != SKIPPED or line["name"] not in found:
            found[line["name"]] = line
    names = [name for stage in STAGES for name in (stage.name, *(row.name for row in stage.rows))]
    place = {name: number for number, name in enumerate(names)}

    def order(line: Line) -> int:
        return place.get(line["name"], place.get(line["stage"], len(place)))

    return {line["name"]: line for line in sorted(found.values(), key=order)}


def card_of(lines: Iterable[Line]) -> str:
    """Name of the card."""
    return next((m["gpu"] for line in lines if "gpu" in (m := line.get("machine") or {})), "")


def charts(lines: Sequence[Line]) -> list[Chart]:
    """Images/s of all training steps."""
    bars = {}
    for name, line in newest(lines).items():
        for side, rates in _rates(line).items():
            label = name if side == "fastmoco" or side in name else f"{name}, {side}"
            bars[label] = (statistics.median(rates), min(rates), max(rates))
    title = f"{card_of(lines)}: training steps".removeprefix(": ")
    return [Bars(title=title, unit="images/s", bars=bars)] if bars else []


def _about(lines: Sequence[Line]) -> str:
    machines = [machine for line in lines if (machine := line.get("machine"))]
    newest_ = machines[-1] if machines else {}
    memory = f" with {newest_['gpu_gib']} GiB" if "gpu_gib" in newest_ else ""
    names = ("torch", "triton", "numpy", "python")
    versions = ", ".join(f"{name} {newest_.get(name, 'unknown')}" for name in names)
    commits = dict.fromkeys(_commit(line) for line in lines if line.get("machine"))
    days = sorted({line["time"][:10] for line in lines})
    dry = any(line.get("dry") for line in lines)
    warning = " Lines of a dry run are among them: these are no figures of a card." if dry else ""
    return (
        f"{card_of(lines) or 'No card'}{memory}, driver {newest_.get('driver', 'unknown')}, "
        f"{newest_.get('cores', 'unknown')} cores of {newest_.get('cpu', 'unknown')}, {versions}. "
        f"{' to '.join(dict.fromkeys((days[0], days[-1])))}, commits {', '.join(commits)}. "
        f"Measured by `make gpu`.{warning}"
    )


def _commit(line: Line) -> str:
    commit = str((line.get("machine") or {}).get("commit", "unknown"))
    return commit.replace("+", " and uncommitted changes")


def _short(reason: object) -> str:
    """The beginning of a reason, so that Markdown takes no part of it for a tag."""
    return str(reason or "")[:REASON].replace("<", "\\<")


def _note(line: Line) -> str:
    """How a line ended, if not well; and its commit, if the newest line has another."""
    reason = _short(line.get("reason"))
    found = [] if line["status"] == OK else [f"{line['status']}: {reason}".removesuffix(": ")]
    found += [f"of commit {line['older']}"] if "older" in line else []
    return "; ".join(found)


def _of_cases(lines: Lines, *cases: str) -> Lines:
    names = _names(*cases)
    return {n: line for n, line in lines.items() if line.get("case") in cases or n in names}


def _names(*cases: str) -> set[str]:
    """Names of the rows of some cases, whose lines lack the case if they were not begun."""
    return {row.name for stage in STAGES for row in stage.rows if row.case in cases}


def _ceilings(lines: Lines) -> str:
    line = lines.get("ceilings", {"status": SKIPPED})
    shapes = line.get("shapes", {})
    rows = []
    for name, words in CEILINGS.items():
        shape = " x ".join(map(str, shapes.get(name.removesuffix("_tflops"), ())))
        if name in line:
            rows.append((words.replace(" in", f" {shape} in") if shape else words, line[name]))
    return markdown(("ceiling", "measured"), [(words, number(value)) for words, value in rows])


def _goals(lines: Lines, card: str) -> str:
    """All goals; the ratios over other implementations beside the first goal of a row."""
    ceilings = lines.get("ceilings", {})
    rows, seen = [], set()
    for outcome in goals.all_outcomes(lines, card, ceilings):
        goal, line = outcome.goal, lines.get(outcome.goal.row)
        if outcome.measured is None:
            state = "not measured"
        elif outcome.met is None:
            state = "no ceilings to scale it by"
        else:
            state = "met" if outcome.met else "missed"
        if line is not None and line["status"] != OK:
            state += f"; the row is {line['status']}"
        if line is not None and "older" in line:
            state += f"; of commit {line['older']}"
        first = line is not None and outcome.measured is not None and goal.row not in seen
        seen |= {goal.row} if first else set()
        peers, share = (_peers(line), _share(line)) if first and line is not None else ("", "")
        sign = "at least" if goal.at_least is not None else "at most"
        rows.append(
            (
                goal.name,
                goal.row,
                _figure_of(goal),
                "" if outcome.wanted is None else f"{sign} {_value(goal, outcome.wanted)}",
                "" if outcome.measured is None else _value(goal, outcome.measured),
                state,
                share,
                peers,
            )
        )
    head = ("goal", "row", "figure", "wanted", "measured", "", "share of ceiling", "speed-up over")
    return markdown(head, rows)


def _figure_of(goal: goals.Goal) -> str:
    if goal.hours_of:
        return "hours of 300 epochs of ImageNet"
    text = _words(goal.figure)
    if not goal.over:
        return text
    who = goal.over_row or goal.over.split(".")[1]
    return f"{text} over {'that' if len(goal.over.split('.')) > 1 else 'those'} of {who}"


def _words(path: str) -> str:
    first, *rest = path.split(".")
    filled = {"share": {"matmul": "product"}}.get(first, {}).get(rest[0], rest[0]) if rest else ""
    return FIGURES.get(first, path).format(first if first in ("bf16", "fp32") else filled)


def _value(goal: goals.Goal, value: float) -> str:
    plain = goal.over or goal.hours_of or not goal.figure.startswith("peak_bytes")
    return number(value if plain else value / 1e6)


def _share(line: Line) -> str:
    return ", ".join(f"{name} {value:.0%}" for name, value in (line.get("share") or {}).items())


def _peers(line: Line) -> str:
    ratios = goals.result_of(line).get("speedup") or {}
    return ", ".join(f"{who} {spread['median']:.2f}x" for who, spread in ratios.items())


def _rates(line: Line) -> dict[str, list[float]]:
    """Images/s of the sides of a training step."""
    result = line.get("result")
    if line.get("case") != "train_step" or not isinstance(result, Mapping):
        return {}
    return dict(result.get("images_per_s") or {})


def _steps(lines: Lines) -> str:
    peers = {}
    for name, line in lines.items():
        model, _, side = name.partition(" peer, ")
        if side and (rates := _rates(line).get(side)):
            peers[model, side] = statistics.median(rates)
    rows = []
    for name, line in _of_cases(lines, "train_step").items():
        result: Mapping[str, Any] = line.get("result") or {}
        tflops = (line.get("options") or {}).get("tflops", 0)
        notes = [_note(line)]
        if line["status"] != FAILED:  # there they are the reason
            notes += [f"{k}: {_short(v)}" for k, v in (result.get("failed") or {}).items()]
        for side, rates in (_rates(line) or {"": []}).items():
            rate = statistics.median(rates) if rates else 0.0
            mfu, peak = ((result.get(key) or {}).get(side) for key in ("mfu", "peak_bytes"))
            over = [peers.get((name.split()[0], each)) for each in ("eager", "compiled")]
            rows.append(
                (
                    name if side in ("fastmoco", "") or side in name else f"{name}, {side}",
                    str(_batch(line, side)),
                    number(rate) if rate else "",
                    *(f"{rate / each:.2f}" if rate and each else "" for each in over),
                    f"{mfu:.1%} of {tflops:.0f}" if mfu else "",
                    f"{peak / 1e9:.1f}" if peak else "",
                    str(result.get("plan", "")) if side == "fastmoco" else "",
                    "; ".join(filter(None, notes)),
                )
            )
    if not rows:
        return ""
    head = ("step", "batch", "images/s", "over eager", "over compiled", "MFU, TFLOP/s", "peak GB")
    return (
        "`eager` is the usual step with mixed precision and explicit attention, `compiled` the same "
        "with torch's attention,\nthrough torch.compile. Ratios are of images/s, so per image, "
        "of rows of the same model. MFU counts FLOPs of the model\nonly, relative to the rate "
        "beside it.\n\n" + markdown((*head, "plan", "note"), rows)
    )


def _batch(line: Line, side: str) -> int | str:
    """Images of a step of a side."""
    if images := ((line.get("result") or {}).get("batch") or {}).get(side):
        return int(images)
    if not (options := line.get("options")):
        return ""
    recipe = options["recipe"] or "vit_s16_e300_b4096"
    return int(options["batch"] or get_recipe(recipe).global_batch_size)


def _others(lines: Lines) -> Lines:
    """Rows that no other table shows."""
    cases = {row.case for stage in STAGES for row in stage.rows} | {
        line["case"] for line in lines.values() if "case" in line
    }
    shown = {"train_step", "attention", "info_nce", "adamw_ema", "ema", "loader"}
    return _of_cases(lines, *cases - shown)


def _contests(lines: Lines) -> str:
    """A row for each contender of each line."""
    rows = []
    for name, line in lines.items():
        result = line.get("result")
        parts = contests(result) if isinstance(result, Mapping) else {}
        for part_name, part in parts.items():
            label = f"{name}, {part_name}" if part_name else name
            rows += [(label, *row) for row in _contest(part, line)]
        if not parts:
            note = _note(line) or _equality(result or {})
            rows.append((name, "", "", "", "", "", "", note))
    head = ("row", "contender", "GPU ms", "host ms", "speed-up over it", "peak MB", "error", "note")
    return markdown(head, rows) if rows else ""


def _contest(part: Mapping[str, Any], line: Line) -> list[tuple[str, ...]]:
    subject = subject_of(part)
    failed, skipped = part.get("failed") or {}, part.get("skipped") or {}
    rows: list[tuple[str, ...]] = []
    checked = part.get("errors") or {}
    for who in dict.fromkeys((subject, *part["speedup"], *checked, *failed, *skipped)):
        spread = part["speedup"].get(who)
        ends = " to ".join(map(number, low_high(spread))) if spread else ""
        times, hosts, peaks = (
            (part.get(key) or {}).get(who) for key in ("milliseconds", "host_ms", "peak_bytes")
        )
        errors = checked.get(who)
        notes = [f"failed: {_short(failed[who])}"] if who in failed else []
        notes += [f"skipped: {_short(skipped[who])}"] if who in skipped else []
        if who == subject:
            notes += filter(None, ("the subject", _share(line), _note(line)))
        rows.append(
            (
                who,
                "" if times is None else number(times),
                "" if hosts is None else number(hosts),
                f"{number(spread['median'])} ({ends})" if spread else "",
                "" if peaks is None else f"{peaks / 1e6:,.1f}",
                f"{max(errors.values()):.1e}" if errors else "",
                "; ".join(notes),
            )
        )
    return rows


def _equality(result: Mapping[str, Any]) -> str:
    """The differences of losses in each precision."""
    parts = {
        name: part
        for name, part in result.items()
        if isinstance(part, Mapping) and "largest_difference" in part
    }
    return "; ".join(
        f"{name}: losses differ by at most {part['largest_difference']:.1e} in "
        f"{len(part['differences'])} steps, limit {part['limit']:.0e}"
        for name, part in parts.items()
    )


def _loader(lines: Lines) -> str:
    """Images/s of each way to make the views; memory of the first."""
    rows = []
    for name, line in _of_cases(lines, "loader").items():
        result: Mapping[str, Any] = line.get("result") or {}
        failed = result.get("failed") or {}
        for who in dict.fromkeys((*(result.get("checked") or {}), *failed)) or ("",):
            rates, rate = ((result.get(k) or {}).get(who) for k in ("images_per_s", "median"))
            memory = (result.get("memory") or {}) if who == result.get("subject") else {}
            notes = [_note(line), f"failed: {_short(failed[who])}" if who in failed else ""]
            rows.append(
                (
                    f"{name}, {who}".removesuffix(", "),
                    number(statistics.median(rates)) if rates else "",
                    number(rate) if rate else "",
                    *(str(memory.get(key, "")) for key in ("device_mb", "growth_mb")),
                    "; ".join(filter(None, notes)),
                )
            )
    head = ("feed", "images/s", "images per CPU-second", "MB on the GPU", "MB of growth", "note")
    return markdown(head, rows) if rows else ""


def _end_to_end(lines: Lines) -> str:
    these = {n: line for n, line in lines.items() if line["stage"] == "knn" or n.startswith("JPEG")}
    rows = []
    for name, line in these.items():
        for key, words in END_TO_END.items():
            if key in line:
                rows.append((name, words, _plain(line[key])))
        if note := _note(line):
            rows.append((name, "note", note))
    return markdown(("row", "figure", "value"), rows) if rows else ""


def _plain(value: Any) -> str:
    """An entry of a line as text."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_plain(each)}" for name, each in value.items())
    if isinstance(value, list):
        return ", ".join(map(_plain, value))
    return number(value) if isinstance(value, float) else str(value)


def _correctness(lines: Lines) -> str:
    checks = {n: line for n, line in lines.items() if line["stage"] == "smoke"}
    tests = {n: line for n, line in lines.items() if line["stage"] == "tests"}
    parts = []
    for words, these in (("Checks of kernels and steps", checks), ("Tests of ops", tests)):
        if these:
            count = {s: sum(line["status"] == s for line in these.values()) for s in STATES}
            counted = ", ".join(f"{number_} {STATES[s]}" for s, number_ in count.items())
            parts.append(f"{words}: {counted}.")
    rows = []
    for name, line in checks.items():
        errors = line.get("errors") or {}
        worst = max(errors, key=lambda what: errors[what], default="")
        rows.append(
            (name, line["status"], f"{worst} {errors[worst]:.1e}" if errors else "", _note(line))
        )
    if rows:
        parts.append(markdown(("check", "outcome", "largest error", "note"), rows))
    rows = [(n, line["status"], _counts(line), _note(line)) for n, line in tests.items()]
    if rows:
        parts.append(markdown(("tests", "outcome", "counts", "note"), rows))
    return "\n\n".join(parts)


STATES = {OK: "passed", FAILED: "failed", SKIPPED: "skipped"}


def _counts(line: Line) -> str:
    """Tests by outcome, of all files of an op."""
    counts: dict[str, int] = {}
    for text in (line.get("results") or {}).values():
        last = text.split(" | ")[-1]
        for count, word in re.findall(r"(\d+) (passed|failed|skipped|errors?)\b", last):
            word = word.rstrip("s")
            counts[word] = counts.get(word, 0) + int(count)
    return ", ".join(f"{count} {word}" for word, count in counts.items())


def _profiles(lines: Lines) -> str:
    parts = []
    for name, line in lines.items():
        result = line.get("result")
        if not isinstance(result, Mapping) or "largest_kernels" not in result:
            continue
        busy, by_part = result["busy_ms"], result.get("parts_ms") or {}
        shares = ", ".join(
            f"{part} {ms / busy:.0%}" for part, ms in sorted(by_part.items(), key=lambda p: -p[1])
        )
        head = (
            f"**{name}**: {result['launches']:,} launches, {number(busy)} ms of kernels in a step"
        )
        rows = [
            (f"`{found['name']}`", found["ms"], found["share"], found["calls"])
            for text in result["largest_kernels"][:KERNELS]
            if (found := KERNEL.match(text))
        ]
        parts += [head + (f". By part: {shares}." if shares else ".")]
        parts += [markdown(("kernel", "ms", "share", "calls"), rows)]
    return "\n\n".join(parts)


def _faults(lines: Sequence[Line]) -> str:
    shown = newest(lines)
    rows = []
    for line in lines:
        if line["status"] == OK:
            continue
        later = shown[line["name"]] is not line
        rows.append(
            (
                line["name"],
                line["stage"],
                line["status"] + (", measured in another run" if later else ""),
                f"{line['time'][:16].replace('T', ' ')}, {_commit(line)}",
                _short(line.get("reason")),
            )
        )
    head = ("line", "stage", "outcome", "when, commit", "reason")
    missing = [row.name for stage in STAGES for row in stage.rows if row.name not in shown]
    parts = [markdown(head, rows)] if rows else []
    parts += [f"Rows that were not begun: {'; '.join(missing)}."] if missing else []
    return "\n\n".join(parts)
