"""Training one model on several processes: ranks, gathered keys, synchronised batch statistics,
averaged gradients."""

from fastmoco.distributed.gather import gather_keys, gather_rows
from fastmoco.distributed.mesh import World, group_rank, group_size, start_world, stop_world
from fastmoco.distributed.parallelize import parallelize
from fastmoco.distributed.ring import start_ring
from fastmoco.distributed.sync_batch_norm import BatchNorm, local_statistics

__all__ = [
    "BatchNorm",
    "World",
    "gather_keys",
    "gather_rows",
    "group_rank",
    "group_size",
    "local_statistics",
    "parallelize",
    "start_ring",
    "start_world",
    "stop_world",
]
