"""The part of `fastmoco plan` on time: a step on many GPUs, and what breaks first."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fastmoco.cli.plan import (
    Counted,
    PlanArguments,
    count,
    loader_of,
    plan_of,
    require_divided,
    shared_by,
)

if TYPE_CHECKING:
    from fastmoco.config import Config
    from fastmoco.planning.scale.layout import Layout
    from fastmoco.planning.scale.report import Cluster, Planned

RATES = {
    "Mbit": 1e6 / 8,
    "Gbit": 1e9 / 8,
    "Tbit": 1e12 / 8,
    "MB/s": 1e6,
    "GB/s": 1e9,
    "TB/s": 1e12,
}
"""Bytes per second by unit; `Gbit/s` is `Gbit`."""
GPUS_PER_NODE = 8
DECODE_MS = {"gpu": 1.7, "cpu": 5.0}
"""Core-milliseconds of an image of 224 pixels by where views are made: decoding alone, or all."""
SCALE_GPUS = (8, 64, 512, 4096)
SHOWN_GPUS = (64, 4096)
"""Those of `SCALE_GPUS` whose limits are printed; JSON has all of them."""
SCALE_BATCHES = (32_768, 2**20)
SETS = (1_281_167, 100_000_000)


def parse_rate(text: str, field: str) -> float:
    """Bytes per second of a rate such as `400Gbit` or `50GB/s`.

    Raises:
        ValueError: if the text is not a rate, with the field.
    """
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z/]+)\s*", text)
    unit = match[2] if match else ""
    unit = unit.removesuffix("/s") if unit.endswith("bit/s") else unit
    if match is None or unit not in RATES or float(match[1]) <= 0:
        raise ValueError(
            f"{field}={text!r}: must be a number with one of {', '.join(RATES)}, e.g. 400Gbit"
        )
    return float(match[1]) * RATES[unit]


def cluster_of(options: PlanArguments, gpus: int, nodes: int | None = None) -> Cluster:
    """The GPUs of the options.

    Args:
        options: of the command.
        gpus: instead of those of the options.
        nodes: instead of those of the options.

    Raises:
        ValueError: naming the field that is wrong.
    """
    from fastmoco.planning.chips import chip_named
    from fastmoco.planning.scale.network import Link
    from fastmoco.planning.scale.report import Cluster

    if gpus < 1:
        raise ValueError(f"gpus={gpus}: must be at least 1")
    nodes = options.nodes if nodes is None else nodes
    if nodes < 0:
        raise ValueError(f"nodes={nodes}: must not be negative")
    chip = chip_named(options.chip)
    link = parse_rate(options.link, "link") if options.link else chip.link_bytes_per_s
    network = parse_rate(options.network, "network")
    for field in ("network_latency_us", "link_latency_us", "decode_ms"):
        if not 0 <= getattr(options, field) < math.inf:
            raise ValueError(f"{field}={getattr(options, field)}: must be finite, 0 or above")
    for field in ("image_kb", "cores"):
        if not 0 < getattr(options, field) < math.inf:
            raise ValueError(f"{field}={getattr(options, field)}: must be finite and above 0")
    nodes = nodes or _nodes_of(gpus)
    place = "cpu" if options.config.data.device == "cpu" else "gpu"
    return Cluster(
        gpus=gpus,
        nodes=nodes,
        chip=chip,
        network=Link(network, 1e-6 * options.network_latency_us),
        link=Link(link, 1e-6 * options.link_latency_us),
        storage_bytes_per_s=parse_rate(options.storage, "storage"),
        write_bytes_per_s=parse_rate(options.writing, "writing"),
        image_bytes=1e3 * options.image_kb,
        decode_s=1e-3 * (options.decode_ms or DECODE_MS[place]),
        cores=options.cores * gpus // nodes,
    )


def _nodes_of(gpus: int) -> int:
    """The fewest equal machines of at most `GPUS_PER_NODE`."""
    return next(n for n in range(-(-gpus // GPUS_PER_NODE), gpus + 1) if gpus % n == 0)


def planned_on(counted: Counted, config: Config, cluster: Cluster, memory: int) -> Planned:
    """The step of one GPU, with the setting of recomputation of the config.

    Raises:
        ValueError: if the GPUs do not divide the batch.
    """
    from fastmoco.planning.plan import HEADROOM
    from fastmoco.planning.scale.report import Planned

    require_divided(config, cluster.gpus)
    shards = shared_by(config, counted.plain, cluster.gpus, memory, cluster.gpus_per_node)
    loader = loader_of(replace(counted, config=config), cluster.gpus)
    usable = (memory - loader.beside_batch_bytes) * HEADROOM
    by_budget = counted.by_setting[config.model.checkpointing]
    plan, _, state = plan_of(config, by_budget, cluster.gpus, usable, shards)

    # The time is that of a mean step of the run.
    plain, mean = counted.plain, counted.mean_share
    flops = {"step_flops": plain.step_flops * mean, "query_flops": plain.query_flops * mean}
    return Planned(
        costs=replace(plain, **flops),  # type: ignore[arg-type]
        plan=plan,
        shards=shards,
        state_bytes=state.total,
        beside_bytes=loader.beside_batch_bytes,
        usable_bytes=memory * HEADROOM,
    )


def describe_step(counted: Counted, cluster: Cluster, memory: int) -> dict[str, Any]:
    """The model of a step, as JSON values."""
    from fastmoco.planning.scale.layout import layout_of
    from fastmoco.planning.scale.report import step_report

    config = counted.config
    layout = layout_of(config, counted.precision)
    planned = planned_on(counted, config, cluster, memory)
    return _cluster_json(cluster) | step_report(
        config, layout, planned, cluster, counted.precision, ring=_in_ring(config, planned)
    )


def describe_scale(options: PlanArguments, memory: int) -> dict[str, Any]:
    """The step on several numbers of GPUs at several batches, and what breaks first, as JSON."""
    from fastmoco.planning.scale.layout import layout_of

    if options.config.device == "cpu":
        raise ValueError("scale=True: is for GPUs, and device='cpu'; take device auto or cuda")
    cluster_of(options, options.gpus, 1)  # refuses wrong rates before it counts
    counted = count(options.config, configured_only=True)
    layout = layout_of(options.config, counted.precision)
    batches = sorted({options.config.global_batch_size, *SCALE_BATCHES})
    steps = []
    limits = {}
    for batch in batches:
        config = replace(options.config, global_batch_size=batch)
        for gpus in SCALE_GPUS:
            if batch % gpus:
                continue
            cluster = cluster_of(options, gpus, -(-gpus // GPUS_PER_NODE))
            found = _at_scale(counted, config, layout, cluster, memory)
            steps.append(found["step"])
            limits[f"batch {batch} on {gpus} GPUs"] = found["limits"]
    return {
        "recipe": options.config.recipe,
        "label": steps[0]["label"],
        "memory_bytes": memory,
        **_cluster_json(cluster_of(options, GPUS_PER_NODE, 1)),
        "steps": steps,
        "limits": limits,
        "sets": _sets(options, layout, steps),
    }


def _at_scale(
    counted: Counted, config: Config, layout: Layout, cluster: Cluster, memory: int
) -> dict[str, Any]:
    from fastmoco.planning.scale.limits import batch_limits
    from fastmoco.planning.scale.report import step_report

    planned = planned_on(counted, config, cluster, memory)
    how = counted.precision
    step = step_report(config, layout, planned, cluster, how, ring=_in_ring(config, planned))
    rows = batch_limits(config, layout, planned, cluster, step, how)
    return {"step": step, "limits": [row._asdict() for row in rows]}


def _sets(
    options: PlanArguments, layout: Layout, steps: list[dict[str, Any]]
) -> dict[str, list[dict[str, Any]]]:
    """Figures of sets, at the recipe's batch on 64 GPUs or the nearest number."""
    from fastmoco.planning.scale.limits import set_limits

    config = options.config
    own = [step for step in steps if step["batch"] == config.global_batch_size]
    step = min(own or steps, key=lambda step: abs(step["gpus"] - 64))
    config = replace(config, global_batch_size=step["batch"])
    cluster = cluster_of(options, step["gpus"], step["nodes"])
    return {
        f"{images} images, {step['gpus']} GPUs": [
            row._asdict()
            for row in set_limits(images, config, layout.width, cluster, step["images_per_s"])
        ]
        for images in SETS
    }


def _in_ring(config: Config, planned: Planned) -> bool:
    """Whether keys come in a ring."""
    return getattr(planned.plan, "keys", "") == "ring"


def _cluster_json(cluster: Cluster) -> dict[str, Any]:
    return {
        "chip": cluster.chip.name,
        "chip_source": cluster.chip.source,
        "network_bytes_per_s": cluster.network.bytes_per_s,
        "link_bytes_per_s": cluster.link.bytes_per_s,
        "storage_bytes_per_s": cluster.storage_bytes_per_s,
        "writing_bytes_per_s": cluster.write_bytes_per_s,
    }


def print_step(step: dict[str, Any]) -> None:
    """Print the model of a step as a table."""
    from rich.box import SIMPLE
    from rich.table import Table

    from fastmoco.errors.terminal import Terminal

    console = Terminal(highlight=False)
    print(
        f"\none step on {step['gpus']} x {step['chip']} in {step['nodes']} x "
        f"{step['network_bytes_per_s'] * 8e-9:g} Gbit, {step['images_per_gpu']} images each "
        f"({step['label']}):"
    )
    if not step["fits"]:
        print(
            f"does not fit: {step['memory_bytes'] / 2**30:.1f} GiB per GPU, so there is no time of "
            "a step; take more GPUs, more --memory or model.checkpointing"
        )
        return
    heading = ("part", "ms", "not hidden, ms", "messages", "GB")
    table = Table(*heading, box=SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
    for name, part in step["parts"].items():
        table.add_row(
            name,
            f"{1e3 * part['seconds']:.2f}",
            f"{1e3 * part['exposed_s']:.2f}",
            f"{part['messages']:g}" if part["messages"] else "",
            f"{1e-9 * part['bytes']:.3g}" if part["messages"] else "",
        )
    for name, seconds in step["loader_s"].items():
        hidden = max(0.0, seconds - sum(p["exposed_s"] for p in step["parts"].values()))
        table.add_row(name, f"{1e3 * seconds:.2f}", f"{1e3 * hidden:.2f}", "", "")
    saved = step["checkpoint"]
    table.add_row("checkpoint, of each step", "", f"{1e3 * saved['per_step_s']:.2f}", "", "")
    console.print(table)
    print(
        "ms: of the part alone. not hidden: what it adds to the step. messages, GB: collectives of a "
        "step and their contents.\nweights: gathered from shards. agreement: ranks compare what "
        "they have in common. storage, decoding: images of one machine."
    )
    print(
        f"step {1e3 * step['step_s']:.1f} ms, {step['images_per_s']:.0f} images/s, efficiency "
        f"{step['efficiency']:.1%}, communication {step['communication_share']:.1%}, "
        f"{step['memory_bytes'] / 2**30:.1f} GiB per GPU"
    )
    if (keys := step["keys"]) is not None:
        print(
            f"keys: gathered {1e3 * keys['gathered_s']:.2f} ms and "
            f"{keys['gathered_bytes'] / 2**20:.1f} MiB, in a ring {1e3 * keys['ring_s']:.2f} ms "
            f"and {keys['ring_bytes'] / 2**20:.1f} MiB"
        )
    limits = sorted(step["limits"].items(), key=lambda item: -item[1])
    print(
        "nearest limits (memory: share in use; checkpoint: writing over interval; others: seconds "
        "over those of compute): " + ", ".join(f"{name} {share:.2g}" for name, share in limits[:4])
    )


def print_scale(found: dict[str, Any]) -> None:
    """Print the Markdown tables of `--scale`."""
    print(
        f"{found['recipe']} on {found['chip']} of {found['memory_bytes'] / 2**30:.3g} GiB, "
        f"{GPUS_PER_NODE} in a machine, {found['network_bytes_per_s'] * 8e-9:g} Gbit each "
        f"({found['label']})\n"
        "efficiency: compute over the step. !: does not fit. first limit: memory: share in use; "
        "checkpoint: writing over interval;\nothers: seconds over those of compute.\n"
    )
    print(
        "| batch | GPUs | images each | step, ms | images/s | efficiency | communication "
        "| GiB a GPU | extra FLOPs | first limit |\n|---|---|---|---|---|---|---|---|---|---|"
    )
    for step in found["steps"]:
        first = step["first_limit"]
        extra = next(
            row["value"]
            for row in found["limits"][f"batch {step['batch']} on {step['gpus']} GPUs"]
            if row["what"] == "FLOPs computed twice"
        )
        # A plan that does not fit has chunks of one image: its time means nothing.
        times = (
            f"{1e3 * step['step_s']:.1f} | {step['images_per_s']:,.0f} "
            f"| {step['efficiency']:.0%} | {step['communication_share']:.0%}"
            if step["fits"]
            else "- | - | - | -"
        )
        print(
            f"| {step['batch']:,} | {step['gpus']:,} | {step['images_per_gpu']:,} | {times} "
            f"| {step['memory_bytes'] / 2**30:.1f}{'' if step['fits'] else ' !'} | {extra:+.1%} "
            f"| {first} {step['limits'][first]:.2g} |"
        )
    ends = tuple(f"on {gpus} GPUs" for gpus in SHOWN_GPUS)
    shown = {name: rows for name, rows in found["limits"].items() if name.endswith(ends)}
    _print_limits("of one GPU", shown or found["limits"])
    _print_limits("of a set", found["sets"])


def _print_limits(of: str, columns: dict[str, list[dict[str, Any]]]) -> None:
    """One table: a row for each figure, a column for each case."""
    rows = next(iter(columns.values()))
    print(f"\n| {of} | {' | '.join(columns)} | |\n|{'---|' * (len(columns) + 2)}")
    for number, row in enumerate(rows):
        values = [_amount(limits[number]["value"], row["unit"]) for limits in columns.values()]
        print(f"| {row['what']} | {' | '.join(values)} | {row['note']} |")


def _amount(value: float, unit: str) -> str:
    """A number with its unit, rounded."""
    if unit == "B":
        for name, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
            if value >= size:
                return f"{value / size:.3g} {name}"
    if unit == "share":
        return f"{value:.1%}"
    return f"{value:,.0f} {unit}" if value >= 1e3 else f"{value:.3g} {unit}".rstrip()
