"""A profile as text: a row for each part, the figures of the whole step, the largest operators."""

from __future__ import annotations

from fastmoco.training.profiling.profile import REST, PartRow, StepProfile
from fastmoco_pipelines.loading.step_parts import EMA, OPTIMIZER


def table(profile: StepProfile) -> str:
    """The lines that `fastmoco profile` prints."""
    on_gpu = profile.device != "cpu"
    heading = [
        "part",
        *(["GPU ms"] if on_gpu else []),
        "CPU ms",
        "share",
        "GFLOP/s",
        "GB/s",
        "launches" if on_gpu else "operators",
        "waits",
    ]
    rows = [[name, *_cells(row, on_gpu)] for name, row in profile.parts.items()]
    rows.append(["step", *_cells(_whole(profile, on_gpu), on_gpu)])
    widths = [max(len(line[i]) for line in (heading, *rows)) for i in range(len(heading))]

    def line(cells: list[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        shown = [f"{first[0]:<{first[1]}}", *(f"{cell:>{width}}" for cell, width in others)]
        return "  ".join(shown).rstrip()

    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    lines = [_title(profile), "", line(heading), rule]
    lines += [*map(line, rows[:-1]), rule, line(rows[-1]), "", *_notes(profile), ""]
    return "\n".join([*lines, *_operators(profile)])


def _cells(row: PartRow, on_gpu: bool) -> list[str]:
    flops, moved = row.per_s(row.flops), row.per_s(row.bytes)
    return [
        *([_number(row.device_ms)] if on_gpu else []),
        _number(row.cpu_ms),
        f"{row.share:.1%}",
        _number(flops / 1e9 if flops is not None else None),
        _number(moved / 1e9 if moved is not None else None),
        _count(row.calls),
        _count(row.waits),
    ]


def _whole(profile: StepProfile, on_gpu: bool) -> PartRow:
    """The row of the step."""
    rows = list(profile.parts.values())

    def total(values: list[float | None]) -> float:
        return sum(value for value in values if value is not None)

    return PartRow(
        cpu_ms=profile.cpu_ms,
        wall_ms=profile.step_ms,
        share=1.0,
        device_ms=total([row.device_ms for row in rows]) if on_gpu else None,
        flops=total([row.flops for row in rows]),
        calls=total([row.calls for row in rows]),
        waits=None if profile.waits is None else total([row.waits for row in rows]),
    )


def _number(value: float | None) -> str:
    """Three digits; nothing for what is not known."""
    if value is None:
        return ""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _count(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}" if value == round(value) else f"{value:.1f}"


def _title(profile: StepProfile) -> str:
    threads = "1 thread" if profile.threads == 1 else f"{profile.threads} threads"
    return (
        f"{profile.recipe}: {profile.steps} steps of {profile.images} images on {profile.device}, "
        f"{threads}, {profile.precision}, torch {profile.versions['torch']}"
    )


def _notes(profile: StepProfile) -> list[str]:
    """The figures of the whole step, and what the columns need to be read."""
    growth = profile.growth
    memory = [f"{growth['tensor_bytes'] / 1e6:+.2f} MB in {growth['tensors']:+d} tensors"]
    names = {"resident_bytes": "resident", "requested_bytes": "requested"}
    names |= {"reserved_bytes": "reserved"}
    memory += [
        f"{growth[key] / 1e6:+.2f} MB {name}" for key, name in names.items() if key in growth
    ]
    waits = "not counted where blocks are compiled on a CPU"
    if profile.waits is not None:
        named = (f"{name} x{_count(count)}" for name, count in profile.waits.items())
        waits = ", ".join(named) or "none"
    lines = [
        f"{profile.images_per_s:.1f} images/s, {profile.images_per_cpu_s:.1f} per CPU-second; "
        f"{profile.step_ms:.1f} ms from step to step, {profile.wait_share:.1%} of it waiting for "
        f"data; peak {profile.peak_bytes / 2**20:.0f} MiB",
        f"recompilations: {profile.recompilations}; growth of memory over {profile.steps} steps: "
        + ", ".join(memory),
        f"host waits: {waits}",
        f"counted: {profile.counted}",
    ]
    lines += [f"{name}: {what}" for name, what in profile.chosen.items()]
    if OPTIMIZER in profile.parts and EMA not in profile.parts:
        lines.append(f"{OPTIMIZER} contains the {EMA}, if there is one: one sweep does both")
    if profile.threads > 1 and profile.device == "cpu":
        lines.append(f"{REST}: also the threads that torch and the decoder start")
    return lines


def _operators(profile: StepProfile) -> list[str]:
    """The largest operators, or kernels."""
    kind = "operators" if profile.device == "cpu" else "kernels"
    lines = [f"largest {kind}, ms a step by their own time in the trace:"]
    for name, ms, calls in profile.top:
        lines.append(f"{ms:>9.2f}  x{_count(calls):<7} {name[:70]}")
    return lines
