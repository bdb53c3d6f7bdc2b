"""`fastmoco plan`: memory and FLOPs of a recipe on given GPUs, the largest batch of each setting, and
a model of the time of a step, without a GPU.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from fastmoco.config import Config
from fastmoco.config.limits import require_limits
from fastmoco.config.model import Recompute
from fastmoco.config.phases import Phase, Phases
from fastmoco.errors import EXIT_FINISHED, EXIT_REFUSED, one_line, say

if TYPE_CHECKING:
    from fastmoco.errors.terminal import Terminal
    from fastmoco.planning.costs import StepCosts
    from fastmoco.planning.plan import StateBytes, StepPlan
    from fastmoco_pipelines.loading.memory import LoaderBytes

PLANNED_THREADS = 14
"""Assumed threads of DALI per GPU, for the memory of its decoder."""
UNITS = {"": 1, "MB": 10**6, "GB": 10**9, "MiB": 2**20, "GiB": 2**30}


PARTS = {
    "state": "weights and optimizer",
    "kept activations": "activations stored for the backward",
    "temporary": "work space",
}
"""Parts of the memory as they are shown."""
LEGEND = """\
recompute  --model.checkpointing: what the backward computes again instead of storing it
copy over  GPUs that share one copy of weights, gradients and optimizer state
state      GiB of a GPU for that copy, with what FSDP2 gathers for a time
MB/image   activations of an image that the backward needs
passes     how the batch of a GPU goes through the encoder: passes x images, or whole
stored     images whose activations stay in memory; those of the others are computed again
repeated   FLOPs that are computed again, relative to the step
peak       GiB of a GPU in a step (! does not fit)
largest    largest batch over all GPUs that fits whole, and in passes of this size"""


@dataclass(frozen=True, kw_only=True)
class PlanArguments:
    """Parameters, FLOPs, memory, micro-batches and largest batches of a recipe, and a model of the
    time of a step on many GPUs, without a GPU and without data.
    """

    gpus: int = 1
    """Training processes, one per GPU."""
    memory: str = "80GiB"
    """Memory of each GPU, e.g. 80GiB or 24GB."""
    json: bool = False
    """Print JSON instead of tables."""
    nodes: int = 0
    """Machines that the GPUs are in; 0: at most 8 in each."""
    network: str = "400Gbit"
    """Network of a machine in one direction, all its cards together, e.g. 50GB/s."""
    chip: str = "H100"
    """GPU whose rates are used: A100, H100, H200 or B200."""
    link: str = ""
    """Link of a GPU in its machine, e.g. 450GB/s; empty: its NVLink."""
    network_latency_us: float = 5.0
    """Microseconds of a message through the network."""
    link_latency_us: float = 2.0
    """Microseconds of a message inside a machine."""
    storage: str = "2GB/s"
    """Reading of images by one machine."""
    writing: str = "2GB/s"
    """Writing of checkpoints by all ranks."""
    image_kb: float = 110.0
    """Kilobytes of an image as stored."""
    decode_ms: float = 0.0
    """Core-milliseconds of an image on the CPU. 0: 1.7 if views are made on the GPU, else 5, as
    measured at 224 pixels."""
    cores: int = 16
    """CPU cores for each GPU."""
    scale: bool = False
    """Print tables for 8 to 4096 GPUs instead, and what breaks first."""
    config: Annotated[Config, tyro.conf.arg(name="")]

    def __post_init__(self) -> None:
        require_limits(self)


def plan(options: PlanArguments) -> int:
    """Print memory, FLOPs and seconds of a recipe; returns 0."""
    from fastmoco.cli.plan_scale import (
        cluster_of,
        describe_scale,
        describe_step,
        print_scale,
        print_step,
    )

    with one_line(EXIT_REFUSED, ValueError):
        memory = memory_of(options.memory)
        if options.scale:
            say(
                f"{options.config.recipe}: importing torch, then counting a step for each number "
                "of GPUs, up to a minute"
            )
            found = describe_scale(options, memory)
        else:
            # Refuse wrong words before seconds of counting.
            cluster = cluster_of(options, options.gpus)
            require_divided(options.config, options.gpus)
            say(
                f"{options.config.recipe}: importing torch, then counting the operations and the "
                "memory of a step without computing it, some ten seconds"
            )
            counted = count(options.config)
            found = describe(counted, options.gpus, memory, cluster.gpus_per_node)
            if options.config.device != "cpu":
                found["step"] = describe_step(counted, cluster, memory)
    if options.json:
        print(json.dumps(found, indent=2))
    elif options.scale:
        print_scale(found)
    else:
        _print_tables(found)
        if options.gpus > 1 and "step" in found:
            print_step(found["step"])
    return EXIT_FINISHED


def parse_bytes(text: str) -> int:
    """Bytes of a size such as `80GiB`.

    Raises:
        ValueError: if the text is not a size.
    """
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2] not in UNITS or float(match[1]) <= 0:
        raise ValueError(
            f"memory={text!r}: must be a number with one of {', '.join(filter(None, UNITS))}, "
            "e.g. 80GiB"
        )
    return int(float(match[1]) * UNITS[match[2]])


def memory_of(text: str) -> int:
    """Bytes of the memory of a GPU.

    Raises:
        ValueError: if the text is not a size, or less than any GPU has, as `80` without its unit.
    """
    memory = parse_bytes(text)
    if memory < 2**20:
        raise ValueError(f"memory={text!r}: is {memory} bytes; give a unit, e.g. 80GiB")
    return memory


@dataclass(frozen=True, kw_only=True)
class Counted:
    """The counted costs of a step of a config, and what they were counted for."""

    config: Config
    precision: str
    on_cpu: bool
    levels: bool
    """Whether views are uint8."""
    compiled: bool
    by_setting: dict[Recompute, dict[float, StepCosts]]
    """By recomputation setting and by activation budget of compiled blocks."""
    by_phase: dict[Phase, StepCosts]
    """Of each kind of phase of tokens and patches, as `plain`; empty where the run is one phase."""
    mean_share: float = 1.0
    """FLOPs of a mean step of the run over those of `plain`, which is that of the largest phase."""

    @property
    def plain(self) -> StepCosts:
        """With everything kept that the first setting keeps."""
        return next(iter(next(iter(self.by_setting.values())).values()))


def count(config: Config, *, configured_only: bool = False) -> Counted:
    """Count the costs of a step.

    Args:
        config: the run.
        configured_only: without settings of recomputation that the config does not use, but for
            `none`.
    """
    import torch

    from fastmoco.models.precision import choose_precision
    from fastmoco.planning.costs import measure_costs

    # Every current GPU has bf16 products; for a CPU, ask this machine.
    on_cpu = config.device == "cpu"
    precision = (
        choose_precision(config.precision, torch.device("cpu"))
        if on_cpu
        else config.precision.replace("auto", "bf16")
    )
    levels = config.data.view_dtype == "uint8" or (config.data.view_dtype == "auto" and not on_cpu)
    automatic = config.model.compile == "auto" and not on_cpu and precision != "fp64"
    compilable = config.model.blocks != "fused" and config.model.family == "vit"
    compiled = compilable and (config.model.compile is True or automatic)
    by_setting = _costs(
        config,
        precision,
        on_cpu=on_cpu,
        compiled=compiled,
        levels=levels,
        configured_only=configured_only,
    )

    # Each phase alone, with everything kept; the largest is counted already.
    attention = "explicit" if on_cpu and precision == "bf16" else config.model.attention
    phases, plain = config.model.phases, next(iter(next(iter(by_setting.values())).values()))
    largest = phases.largest(config.model.patch_size)
    by_phase = {
        phase: plain
        if largest == (phase,)
        else measure_costs(
            config,
            precision,
            attention=attention,
            recompute="none",
            compiled=compiled,
            levels=levels,
            phase=phase,
        )
        for phase in (() if phases.plain else phases.distinct())
    }
    return Counted(
        config=config,
        precision=precision,
        on_cpu=on_cpu,
        levels=levels,
        compiled=compiled,
        by_setting=by_setting,
        by_phase=by_phase,
        mean_share=_mean_share(phases, by_phase, plain),
    )


def _mean_share(phases: Phases, by_phase: dict[Phase, StepCosts], plain: StepCosts) -> float:
    """FLOPs of a mean step of the run over those of the largest phase."""
    if not by_phase:
        return 1.0
    flops = {(one.keep, one.patch_size): costs.step_flops for one, costs in by_phase.items()}
    shares = zip(phases.shares(), phases.items, strict=True)
    return sum(s * flops[one.keep, one.patch_size] for s, one in shares) / plain.step_flops


def describe(counted: Counted, gpus: int, memory: int, gpus_per_node: int) -> dict[str, Any]:
    """All figures of `fastmoco plan` but those of time, as JSON values.

    Args:
        counted: the run.
        gpus: processes, each with its own device.
        memory: bytes of each device.
        gpus_per_node: devices of one machine.

    Raises:
        ValueError: if the processes cannot divide the batch, or the config sets micro-batches and
            the trunk couples samples.
    """
    from fastmoco.planning.plan import HEADROOM

    config, plain = counted.config, counted.plain
    require_divided(config, gpus)
    shared = shared_by(config, plain, gpus, memory, gpus_per_node)
    loader = loader_of(counted, gpus)
    usable = (memory - loader.beside_batch_bytes) * HEADROOM

    # One row for each setting and number of shards.
    rows = [
        _row(config, by_budget, setting, gpus, usable, shards)
        for shards in sorted({1, shared, gpus})
        for setting, by_budget in counted.by_setting.items()
    ]
    asked = (config.model.checkpointing, shared)
    chosen = next(row for row in rows if (row["checkpointing"], row["state_over"]) == asked)
    return {
        "recipe": config.recipe,
        "gpus": gpus,
        "memory_bytes": memory,
        "usable_share": HEADROOM,
        "precision": counted.precision,
        "global_batch_size": config.global_batch_size,
        "local_batch_size": config.global_batch_size // gpus,
        "parameters": plain.parameters,
        "trainable_parameters": plain.trainable,
        "flops_per_image": plain.step_flops * counted.mean_share,
        "flops_per_step": plain.step_flops * counted.mean_share * config.global_batch_size,
        "coupling_reason": plain.coupling_reason,
        "compiled": counted.compiled,
        "views": "uint8" if counted.levels else "float32",
        "loader_bytes": asdict(loader) | {"beside_batch_bytes": loader.beside_batch_bytes},
        "settings": rows,
        "chosen": chosen,
        "phases": _phases(counted, chosen, gpus),
    }


def _phases(counted: Counted, chosen: dict[str, Any], gpus: int) -> list[dict[str, Any]]:
    """Each phase of tokens and patches in the order of the run; empty where the run is one.

    `step_bytes` is the peak of its steps in the chunks of the chosen plan with everything kept,
    besides the state; `flops_share` is relative to a step with all tokens and the encoder's own
    patches, which measures time where products take it.
    """
    from fastmoco.planning.costs import measure_costs
    from fastmoco.planning.plan import chunked_bytes, whole_bytes

    if not counted.by_phase:
        return []
    config, plan = counted.config, chosen["plan"]
    phases, images = config.model.phases, config.global_batch_size // gpus
    same = {(phase.keep, phase.patch_size): costs for phase, costs in counted.by_phase.items()}
    whole = same.get((1.0, 0))
    if whole is None:
        whole = measure_costs(config, counted.precision, recompute="none", phase=Phase())
    found = []
    for share, phase in zip(phases.shares(), phases.items, strict=True):
        costs = same[phase.keep, phase.patch_size]
        patch = phase.patch_size or config.model.patch_size
        tokens = (config.model.image_size // patch) ** 2
        step_bytes = (
            chunked_bytes(costs, images, plan["chunk"], plan["kept_images"], gpus)
            if plan["chunk"]
            else whole_bytes(costs, images, gpus)
        )
        found.append(
            {
                "start": phase.start,
                "share": share,
                "keep_tokens": phase.keep,
                "patch_size": patch,
                "patch_tokens": tokens,
                "kept_patch_tokens": phase.kept(tokens),
                "flops_per_image": costs.step_flops,
                "flops_share": costs.step_flops / whole.step_flops,
                "activation_bytes_per_image": costs.graph.per_image,
                "step_bytes": step_bytes,
            }
        )
    return found


def require_divided(config: Config, gpus: int) -> None:
    """Refuse processes that do not divide the batch.

    Raises:
        ValueError: with both numbers.
    """
    if gpus < 1 or config.global_batch_size % gpus:
        raise ValueError(f"gpus={gpus}: must divide global_batch_size={config.global_batch_size}")


def _costs(
    config: Config,
    precision: str,
    *,
    on_cpu: bool,
    compiled: bool,
    levels: bool,
    configured_only: bool,
) -> dict[Recompute, dict[float, StepCosts]]:
    """Costs of a step by recomputation setting and by activation budget of compiled blocks."""
    from fastmoco.models.compiled import BUDGETS
    from fastmoco.planning.costs import measure_costs

    attention = "explicit" if on_cpu and precision == "bf16" else config.model.attention
    settings: tuple[Recompute, ...] = ("none", "selective", "full")
    model = config.model
    if model.linears == "float8" or model.blocks == "fused" or model.family != "vit":
        settings = ("none", "full")  # all refuse "selective"
    if configured_only:  # and what keeps everything, which is compared with
        settings = tuple(
            setting for setting in settings if setting in ("none", model.checkpointing)
        )
    wanted = config.batch.activation_budget
    budgets = (BUDGETS if wanted == "auto" else (float(wanted),)) if compiled else (1.0,)

    def costs_of(setting: Recompute, budget: float) -> StepCosts:
        how = {"attention": attention, "compiled": compiled, "levels": levels}
        return measure_costs(config, precision, recompute=setting, budget=budget, **how)  # type: ignore[arg-type]

    return {
        setting: {
            budget: costs_of(setting, budget)
            for budget in (budgets if setting == "none" else (1.0,))
        }
        for setting in settings
    }


def loader_of(counted: Counted, gpus: int) -> LoaderBytes:
    """Memory of a loader that makes its views on the device of the model; with
    synthetic images only the batch.
    """
    from dataclasses import replace

    from fastmoco_pipelines.loading.memory import LoaderBytes, loader_bytes

    config = counted.config
    shards = config.data.shards or "not read"
    named = replace(config, data=replace(config.data, shards=shards))
    spec = named.loader_spec(
        device="cpu" if counted.on_cpu else "gpu", threads=config.data.threads or PLANNED_THREADS
    )
    held = loader_bytes(replace(spec, view_dtype="uint8" if counted.levels else "float32"), gpus)
    if config.data.synthetic:
        return LoaderBytes(batch_bytes=held.batch_bytes, ready_bytes=0, scratch_bytes=0)
    return held


def shared_by(config: Config, costs: StepCosts, gpus: int, memory: int, gpus_per_node: int) -> int:
    """Number of GPUs that share a copy of the state under `parallel.strategy`
    (`choose_strategy`).

    Raises:
        ValueError: if groups of this size do not divide the GPUs.
    """
    from fastmoco.distributed.parallelize import STATE_SHARE
    from fastmoco.planning.plan import state_bytes

    if config.parallel.strategy == "auto":
        # With two moments, as in `choose_strategy`.
        state = state_bytes(costs, "adamw", _element(config)).total
        return gpus if config.device != "cpu" and state > STATE_SHARE * memory else 1
    if gpus == 1:
        return 1
    size = config.parallel.shard_size or gpus_per_node
    if config.parallel.strategy == "hsdp" and (gpus % size or not 1 < size < gpus):
        raise ValueError(
            f"parallel.shard_size={size}: must divide gpus={gpus} into several groups of at least "
            "2, or take parallel.strategy fsdp"
        )
    return {"ddp": 1, "fsdp": gpus, "hsdp": size}[config.parallel.strategy]


def _element(config: Config) -> int:
    """Bytes per element of the state."""
    return 8 if config.precision == "fp64" else 4


def _row(
    config: Config,
    by_budget: dict[float, StepCosts],
    setting: str,
    gpus: int,
    usable: float,
    shards: int,
) -> dict[str, Any]:
    """One setting: the plan for the batch of the recipe, and the largest batches."""
    from fastmoco.planning.plan import busy_chunk, largest_batch, parts_of

    chosen, costs, state = plan_of(config, by_budget, gpus, usable, shards)
    budget = usable - state.total
    images = config.global_batch_size // gpus
    tokens = _tokens(config)
    chunk = chosen.chunk or busy_chunk(tokens)
    in_chunks = (
        0
        if costs.coupling_reason
        else gpus * largest_batch(costs, budget, chunk=chunk, world_size=gpus)
    )
    return {
        "checkpointing": setting,
        "state_over": shards,
        "state_bytes": asdict(state) | {"total": state.total},
        "activation_bytes_per_image": costs.graph.per_image,
        "step_bytes": chosen.peak_bytes,
        "parts_bytes": parts_of(costs, chosen, images, gpus),
        "fits": chosen.fits,
        "plan": chosen.to_json(),
        "largest_batch_whole": gpus * largest_batch(costs, budget, world_size=gpus),
        "largest_batch_in_chunks": in_chunks,
    }


def plan_of(
    config: Config, by_budget: dict[float, StepCosts], gpus: int, usable: float, shards: int
) -> tuple[StepPlan, StepCosts, StateBytes]:
    """The plan for the batch of the recipe, the costs that it was made with, and the state.

    Args:
        config: the run.
        by_budget: costs by activation budget.
        gpus: processes.
        usable: bytes of a device for state and step.
        shards: GPUs that share a copy of the state.
    """
    from dataclasses import replace

    from fastmoco.planning.keys import choose_keys, ring_above
    from fastmoco.planning.plan import best_plan, plan_step, sharded, state_bytes

    element = _element(config)
    costs = next(iter(by_budget.values()))
    state = state_bytes(costs, config.optim.name, element, shards=shards)
    by_budget = {
        share: sharded(costs, element) if shards > 1 else costs
        for share, costs in by_budget.items()
    }
    budget = usable - state.total
    tokens = _tokens(config)
    if costs.coupling_reason and isinstance(config.batch.chunk, int):
        raise ValueError(
            f"batch.chunk={config.batch.chunk}: this trunk needs the whole batch, "
            f"because {costs.coupling_reason}"
        )
    images = config.global_batch_size // gpus

    # How the keys of other GPUs come to the loss, where the objective has a choice.
    wanted = getattr(config.objective, "keys", None) if gpus > 1 else None
    keys: dict[str, Any] = {}
    if wanted is not None:
        ring, reason = choose_keys(wanted, costs.key_bytes, images, gpus, usable)
        keys = {"keys": "ring" if ring else "gathered", "keys_reason": reason}
        above = ring_above(wanted, usable)
        by_budget = {s: replace(costs, ring_above=above) for s, costs in by_budget.items()}

    def planned(share: float, costs: StepCosts) -> StepPlan:
        plan = plan_step(
            costs,
            images=images,
            budget=budget,
            tokens=tokens,
            chunk=config.batch.chunk,
            kept=config.batch.kept,
            world_size=gpus,
        )
        return replace(plan, activation_budget=share, **keys)

    chosen = best_plan(planned(share, costs) for share, costs in by_budget.items())
    return chosen, by_budget[chosen.activation_budget], state


def _tokens(config: Config) -> int:
    """Half of the token rows of all views of an image."""
    from fastmoco.planning.plan import tokens_of_views
    from fastmoco_pipelines.spec import each_view

    sides = [view.size for view in each_view(config.data.views)]
    return tokens_of_views(sides, config.model.patch_size)


def _print_tables(found: dict[str, Any]) -> None:
    from rich.box import SIMPLE
    from rich.table import Table

    from fastmoco.errors.terminal import Terminal

    # Wide enough for the largest batches: rich shortens numbers that do not fit.
    console = Terminal(highlight=False, width=max(100, Terminal().width))
    gib = 2**30
    print(
        f"{found['recipe']}: batch {found['global_batch_size']} on {found['gpus']} x "
        f"{found['memory_bytes'] / gib:.4g} GiB, "
        f"{found['precision']}; the plan fills at most {found['usable_share']:.0%} of the memory"
    )
    print(
        f"{found['parameters'] / 1e6:.1f} M parameters, {found['trainable_parameters'] / 1e6:.1f} "
        "M of them trainable; "
        f"{_figure(found['flops_per_image'] / 1e9)} GFLOP per image, "
        f"{_figure(found['flops_per_step'] / 1e12)} TFLOP per step"
    )
    if found["coupling_reason"]:
        print(f"no chunks: {found['coupling_reason']}")
    if found["phases"]:
        _print_phases(console, found["phases"])
    heading = (
        "recompute",
        "copy over",
        "state",
        "MB/image",
        "passes",
        "stored",
        "repeated",
        "peak",
        "largest",
        "in passes",
    )

    table = Table(*heading, box=SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
    for row in found["settings"]:
        plan, state = row["plan"], row["state_bytes"]["total"]
        table.add_row(
            row["checkpointing"],
            f"{row['state_over']}",
            f"{state / gib:.2f}",
            f"{row['activation_bytes_per_image'] / 1e6:.1f}",
            f"{plan['chunks']} x {plan['chunk']}" if plan["chunk"] else "whole",
            f"{plan['kept_images']}" if plan["chunk"] else "all",
            f"{plan['overhead']:+.1%}",
            f"{(row['step_bytes'] + state) / gib:.1f}" + ("" if row["fits"] else " !"),
            f"{row['largest_batch_whole']}",
            f"{row['largest_batch_in_chunks']}" if row["largest_batch_in_chunks"] else "-",
        )
    console.print(table)

    # The setting of the config, in parts.
    chosen = found["chosen"]
    parts = {"state": chosen["state_bytes"]["total"], **chosen["parts_bytes"]}
    parts |= {"loader": found["loader_bytes"]["beside_batch_bytes"]}
    print(
        "as configured, GiB of a GPU: "
        + ", ".join(f"{PARTS.get(name, name)} {size / gib:.2f}" for name, size in parts.items())
    )
    budget = chosen["plan"]["activation_budget"]
    stored = "all activations" if budget == 1 else f"{budget:.0%} of the activations"
    blocks = f"compiled, storing {stored}" if found["compiled"] else "not compiled"
    print(f"blocks {blocks}; views as {found['views']}")
    if chosen["plan"]["keys"]:
        way = "in a ring" if chosen["plan"]["keys"] == "ring" else "gathered"
        print(f"keys of the other GPUs {way} ({chosen['plan']['keys_reason']})")
    print(LEGEND)


def _print_phases(console: Terminal, phases: list[dict[str, Any]]) -> None:
    """The phases of a run, one a row. FLOPs above are those of a mean step."""
    from rich.box import SIMPLE
    from rich.table import Table

    heading = ("from", "of run", "keep", "patch", "tokens", "GFLOP/img", "share", "MB/img", "peak")
    table = Table(*heading, box=SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
    for row in phases:
        table.add_row(
            f"{row['start']:.1%}",
            f"{row['share']:.1%}",
            f"{row['keep_tokens']:.4g}",
            f"{row['patch_size']}",
            f"{row['kept_patch_tokens']} of {row['patch_tokens']}",
            _figure(row["flops_per_image"] / 1e9),
            f"{row['flops_share']:.1%}",
            f"{row['activation_bytes_per_image'] / 1e6:.1f}",
            f"{row['step_bytes'] / 2**30:.1f}",
        )
    mean = sum(row["share"] * row["flops_share"] for row in phases)
    console.print(table)
    print(
        f"phases: the run computes {mean:.1%} of the FLOPs of one with all tokens. tokens: patch "
        "tokens of a view that\nthe trained encoder sees. share: FLOPs of a step relative to all "
        "tokens. peak: GiB besides the state with\neverything kept; the plan holds what the "
        "largest phase needs.\n"
    )


def _figure(value: float) -> str:
    return f"{value:.1f}" if value >= 1 else f"{value:.2g}"
