"""Shards of images -> augmented views of every image, on the device.

Pack images into shards with `pack_folder`, describe the views with `ViewSpec` and the batches with
`LoaderSpec`, and iterate over `build_loader(spec)`. A name is imported when it is first used:
describing views needs no torch, DALI is imported when a loader begins, webdataset when shards are packed.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from importlib import import_module
from typing import TYPE_CHECKING

OPENMP_SPINS = "10000"
"""How often a waiting thread of OpenMP looks before it sleeps."""


def limit_spinning(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set `GOMP_SPINCOUNT`, unless the user has set it or `OMP_WAIT_POLICY`. Called before torch
    is imported.

    By default a waiting thread of libgomp spins for milliseconds. If other threads, such as those
    of a loader or of another process, need the cores, a small model becomes several times slower
    and takes more than twice the processor time. No number depends on it.

    libgomp reads the variable when it is loaded, which is with torch, and has no function to change
    it later: a program that imports torch first sets the variable itself.
    """
    if "OMP_WAIT_POLICY" not in environment:
        environment.setdefault("GOMP_SPINCOUNT", OPENMP_SPINS)


limit_spinning()

if TYPE_CHECKING:
    from fastmoco_pipelines.errors import BadImageError, ShardError
    from fastmoco_pipelines.loading.batch import Batch, EvalBatch
    from fastmoco_pipelines.loading.eval_loader import EvalLoader, build_eval_loader
    from fastmoco_pipelines.loading.loader import Loader, build_loader
    from fastmoco_pipelines.loading.memory import LoaderBytes, loader_bytes
    from fastmoco_pipelines.loading.synthetic import SyntheticLoader
    from fastmoco_pipelines.making.digits import pack_digits
    from fastmoco_pipelines.making.indexing import IndexReport, index_shards
    from fastmoco_pipelines.making.pack import PackReport, pack_folder
    from fastmoco_pipelines.sampling.order import (
        epoch_order,
        rank_slice,
        samples_at,
        steps_per_epoch,
    )
    from fastmoco_pipelines.sets.shard_set import ShardSet, expand_shards
    from fastmoco_pipelines.spec import (
        EvalLoaderSpec,
        EvalSpec,
        LoaderSpec,
        ViewSpec,
        cmae_views,
        dino_views,
        extrema_views,
        moco_v1_views,
        moco_v2_views,
        moco_v3_views,
        simsiam_views,
        swav_views,
    )
    from fastmoco_pipelines.views.levels import normalise

__all__ = [
    "BadImageError",
    "Batch",
    "EvalBatch",
    "EvalLoader",
    "EvalLoaderSpec",
    "EvalSpec",
    "IndexReport",
    "Loader",
    "LoaderBytes",
    "LoaderSpec",
    "PackReport",
    "ShardError",
    "ShardSet",
    "SyntheticLoader",
    "ViewSpec",
    "build_eval_loader",
    "build_loader",
    "cmae_views",
    "dino_views",
    "epoch_order",
    "expand_shards",
    "extrema_views",
    "index_shards",
    "loader_bytes",
    "moco_v1_views",
    "moco_v2_views",
    "moco_v3_views",
    "normalise",
    "pack_digits",
    "pack_folder",
    "rank_slice",
    "samples_at",
    "simsiam_views",
    "steps_per_epoch",
    "swav_views",
]

_ROOMS = {
    "BadImageError": "errors",
    "Batch": "loading.batch",
    "EvalBatch": "loading.batch",
    "EvalLoader": "loading.eval_loader",
    "EvalLoaderSpec": "spec",
    "EvalSpec": "spec",
    "IndexReport": "making.indexing",
    "Loader": "loading.loader",
    "LoaderBytes": "loading.memory",
    "LoaderSpec": "spec",
    "PackReport": "making.pack",
    "ShardError": "errors",
    "ShardSet": "sets.shard_set",
    "SyntheticLoader": "loading.synthetic",
    "ViewSpec": "spec",
    "build_eval_loader": "loading.eval_loader",
    "build_loader": "loading.loader",
    "cmae_views": "spec",
    "dino_views": "spec",
    "epoch_order": "sampling.order",
    "expand_shards": "sets.shard_set",
    "extrema_views": "spec",
    "index_shards": "making.indexing",
    "loader_bytes": "loading.memory",
    "moco_v1_views": "spec",
    "moco_v2_views": "spec",
    "moco_v3_views": "spec",
    "normalise": "views.levels",
    "pack_digits": "making.digits",
    "pack_folder": "making.pack",
    "rank_slice": "sampling.order",
    "samples_at": "sampling.order",
    "simsiam_views": "spec",
    "steps_per_epoch": "sampling.order",
    "swav_views": "spec",
}
"""Public name -> the module that has it."""


def __getattr__(name: str) -> object:
    if name in _ROOMS:
        return getattr(import_module(f"{__name__}.{_ROOMS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
