"""Tensors by torch.distributed.checkpoint: every rank writes its shards, and any number of ranks reads them again."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save


class _Writer(FileSystemWriter):
    """Leaves out of the metadata the path of the folder and a random number: the same state gives the same bytes."""

    def storage_meta(self) -> StorageMeta:
        return StorageMeta()


class _Reader(FileSystemReader):
    """Uses metadata that `dcp_metadata.read_metadata` has let through, and never opens the file itself."""

    def __init__(self, folder: Path, metadata: Metadata) -> None:
        super().__init__(folder)
        self._checked = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._checked


def write_shards(folder: Path, tensors: Mapping[str, Tensor], group: dist.ProcessGroup | None) -> None:
    """Write tensors into an existing empty folder, through to the disk. Call it on every rank of `group`.

    A sharded tensor is written by the ranks that hold its parts. One that all ranks hold is written by one of them, the
    load spread evenly; all must hold the same numbers. One that a single rank knows is written by that rank.

    Raises:
        torch.distributed.checkpoint.CheckpointException: on every rank, if one of them fails.
        RuntimeError: if a rank ends or hangs on the way.
    """
    _quietly(
        save,
        {name: tensor.detach() for name, tensor in tensors.items()},
        # Nothing copied ahead: that would open CUDA's first device in the thread of a background save, on every rank.
        storage_writer=_Writer(folder, sync_files=True, overwrite=False, per_thread_copy_ahead=0),
        planner=DefaultSavePlanner(flatten_state_dict=False),
        process_group=group,
        no_dist=group is None,
    )


def read_shards_into(folder: Path, metadata: Metadata, targets: Mapping[str, Tensor]) -> None:
    """Fill tensors in place, of a sharded one this rank's part. Every rank reads for itself; nothing is sent."""
    _quietly(
        load,
        {name: tensor.detach() for name, tensor in targets.items()},
        storage_reader=_Reader(folder, metadata),
        planner=DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
        no_dist=True,
    )


def shard_entries(metadata: Metadata) -> dict[str, Tensor]:
    """Shapes and dtypes of the whole tensors by name, as tensors on the meta device."""
    entries = metadata.state_dict_metadata
    # `read_metadata` let tensors through alone
    return {
        name: torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
        for name, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata)
    }


def _quietly(action: Any, *arguments: Any, **options: Any) -> None:
    """DCP warns where it works without a process group, which is what is asked of it here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*assuming the intent is to")
        action(*arguments, **options)
