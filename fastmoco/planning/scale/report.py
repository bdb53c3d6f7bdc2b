"""The time of a step of a config on a cluster of GPUs, and what limits it: a model, not measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from fastmoco.config import Config
from fastmoco.models.vit import ARCHITECTURES
from fastmoco.planning.chips import Chip
from fastmoco.planning.costs import StepCosts
from fastmoco.planning.plan import StepPlan
from fastmoco.planning.scale.key_exchange import key_costs
from fastmoco.planning.scale.layout import Layout
from fastmoco.planning.scale.messages import Ranks, step_messages
from fastmoco.planning.scale.network import Fabric, Link
from fastmoco.planning.scale.step import Work, gpu, step_time
from fastmoco_pipelines.spec import each_view

LABEL = "model, not measured"
LAUNCHES_PER_BLOCK = 74
LAUNCHES_BESIDES = 63
"""Kernels of a chunk of compiled blocks with its second forward: 951 with 12 blocks, 1,839 with 24,
counted by `benchmarks.roofline`."""
HOST_COPY_BYTES_PER_S = 25e9
"""From a GPU to the memory of its host."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """Nodes of equal GPUs. Rates are in bytes per second, of one node unless noted."""

    gpus: int
    nodes: int
    chip: Chip
    network: Link
    """Of a node, all its cards together."""
    link: Link
    """Of a GPU to the others of its node."""
    storage_bytes_per_s: float
    """Reading of images."""
    write_bytes_per_s: float
    """Writing of checkpoints, all ranks together."""
    image_bytes: float
    """Of an image as stored."""
    decode_s: float
    """Core-seconds that the CPU needs for an image."""
    cores: int
    """Of a node."""

    def __post_init__(self) -> None:
        if self.nodes < 1 or self.gpus % self.nodes:
            raise ValueError(f"nodes={self.nodes}: must divide gpus={self.gpus}")

    @property
    def gpus_per_node(self) -> int:
        """GPUs of one node."""
        return self.gpus // self.nodes

    @property
    def fabric(self) -> Fabric:
        """What connects the GPUs."""
        return Fabric(
            nodes=self.nodes,
            gpus_per_node=self.gpus_per_node,
            link=self.link,
            network=self.network,
        )


class Planned(NamedTuple):
    """A step of a rank as planned."""

    costs: StepCosts
    """With nothing recomputed."""
    plan: StepPlan
    shards: int
    """GPUs that share a copy of the state."""
    state_bytes: float
    """Of a rank."""
    beside_bytes: float
    """Of the loader."""
    usable_bytes: float
    """Of a GPU."""


def attention_share(config: Config) -> float:
    """Share of attention in the FLOPs of a trunk: T / (T + 6 E) with T tokens of width E, over all
    views of an image."""
    if config.model.family != "vit":
        return 0.0
    width = ARCHITECTURES[config.model.architecture].width
    sides = [view.size for view in each_view(config.data.views)]
    tokens = [(side // config.model.patch_size) ** 2 + 1 for side in sides]
    attention = sum(some**2 for some in tokens)
    return attention / (attention + 6 * width * sum(tokens))


def step_report(
    config: Config,
    layout: Layout,
    planned: Planned,
    cluster: Cluster,
    precision: str,
    *,
    ring: bool = False,
) -> dict[str, Any]:
    """Seconds of a step by part, and the shares of what it needs, as JSON values.

    Args:
        config: of the run; its batch is divided among the GPUs.
        layout: of its objective.
        planned: the step of one GPU.
        cluster: the GPUs.
        precision: of the run.
        ring: whether keys come in a ring.
    """
    costs, plan = planned.costs, planned.plan
    images = config.global_batch_size // cluster.gpus
    ranks = Ranks(total=cluster.gpus, shards=planned.shards, ring=ring)
    machine = gpu(cluster.chip, attention_share(config))
    blocks = max(len(network.trunk) for network in layout.networks)
    work = Work(
        images=images,
        flops=costs.step_flops,
        activation_bytes=costs.graph.per_image,
        again=plan.overhead,
        forward_share=2 * costs.query_flops / costs.step_flops,
        parameters=costs.trainable / planned.shards,
        launches=plan.chunks * (LAUNCHES_PER_BLOCK * blocks + LAUNCHES_BESIDES),
    )
    fabric = cluster.fabric
    messages = step_messages(config, layout, ranks, plan, precision)
    time = step_time(work, machine, messages, fabric, ranks)

    # What runs beside the step: the loader of a node, and the checkpoints.
    per_node = images * cluster.gpus_per_node
    loader = {
        "storage": per_node * cluster.image_bytes / cluster.storage_bytes_per_s,
        "decoding": per_node * cluster.decode_s / cluster.cores,
    }
    if config.data.synthetic:
        loader = dict.fromkeys(loader, 0.0)
    step_s = max(time.seconds, *loader.values())
    saved = _checkpoint(config, layout, planned, cluster, step_s)
    step_s += saved["per_step_s"]

    compute = time.parts["compute"].seconds
    seconds = {name: part.seconds for name, part in time.parts.items()}
    memory = planned.state_bytes + plan.peak_bytes + planned.beside_bytes
    limits = {
        "memory": memory / planned.usable_bytes,
        "network": (seconds["weights"] + seconds["gradients"]) / compute,
        "batch norms": seconds["batch norms"] / compute,
        "keys": seconds["keys"] / compute,
        "launches": work.launches * machine.launch_s / compute,
        **{name: one / compute for name, one in loader.items()},
        "checkpoint": saved["write_s"] / saved["interval_s"],
    }
    keys = key_costs(
        images,
        config.model.projection_dim,
        ranks,
        fabric,
        element=2 if precision == "bf16" else layout.element,
        s_per_flop=machine.s_per_flop,
        launch_s=machine.launch_s,
        key_bytes=costs.key_bytes,
    )
    return {
        "label": LABEL,
        "gpus": cluster.gpus,
        "nodes": cluster.nodes,
        "batch": config.global_batch_size,
        "images_per_gpu": images,
        "shards": planned.shards,
        "parts": {name: part._asdict() for name, part in time.parts.items()},
        "loader_s": loader,
        "checkpoint": saved,
        "step_s": step_s,
        "images_per_s": config.global_batch_size / step_s,
        "efficiency": compute / step_s,
        "communication_share": time.communication_share,
        "memory_bytes": memory,
        "fits": plan.fits,
        "keys": keys._asdict() | {"ring": ring} if hasattr(config.objective, "keys") else None,
        "limits": limits,
        "first_limit": max(limits, key=lambda name: limits[name]),
    }


def _checkpoint(
    config: Config, layout: Layout, planned: Planned, cluster: Cluster, step_s: float
) -> dict[str, float]:
    """Seconds of a checkpoint, and what a step waits for it on average."""
    whole = planned.costs.parameters + 2 * planned.costs.trainable  # two moments
    size = whole * layout.element
    write_s = size / cluster.write_bytes_per_s
    copy_s = size / planned.shards / HOST_COPY_BYTES_PER_S
    rules = config.checkpoint
    interval_s = rules.every_steps * step_s if rules.every_steps else 60 * rules.every_minutes
    stall = max(copy_s, write_s - interval_s) if rules.async_save else copy_s + write_s
    return {
        "bytes": size,
        "write_s": write_s,
        "copy_s": copy_s,
        "interval_s": interval_s,
        "per_step_s": stall * step_s / interval_s,
    }
