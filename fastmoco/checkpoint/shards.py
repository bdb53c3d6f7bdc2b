"""Tensors in the format of torch.distributed.checkpoint: each rank writes its
shards, any number of ranks reads them.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.futures import Future

from fastmoco.checkpoint.torch_file import torch_content
from fastmoco_pipelines.files.small import open_regular
from fastmoco_pipelines.files.whole import read_at


class _Writer(FileSystemWriter):
    """Omits the folder's path and a random number from the metadata, so that
    equal states give equal bytes.
    """

    def storage_meta(self) -> StorageMeta:
        return StorageMeta()


class _Reader(FileSystemReader):
    """Uses metadata that `dcp_metadata.read_metadata` has checked, and reads each piece, which is a
    file of `torch.save`, by `torch_file`.
    """

    def __init__(self, folder: Path, metadata: Metadata) -> None:
        super().__init__(folder)
        self._folder = folder
        self._checked = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._checked

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        pieces = self._checked.storage_data
        with ExitStack() as stack:
            files: dict[str, int] = {}
            for item in plan.items:
                place = pieces[item.storage_index]
                if place.relative_path not in files:
                    name = self._folder / place.relative_path
                    descriptor = open_regular(name, follow=False)
                    stack.callback(os.close, descriptor)
                    files[place.relative_path] = descriptor
                piece = read_at(files[place.relative_path], place.length, place.offset)
                target = planner.resolve_tensor(item).detach()
                target.copy_(self._part(item, piece))
                planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _part(self, item: ReadItem, piece: bytes) -> Tensor:
        """The part of a piece that is asked for, if it is the tensor of the metadata."""
        index = item.storage_index
        try:
            tensor = torch_content(bytearray(piece))
        except (ValueError, MemoryError) as error:
            raise ValueError(f"the bytes of {index.fqn} are refused: {error}") from error
        entry = self._checked.state_dict_metadata[index.fqn]
        assert isinstance(entry, TensorStorageMetadata)  # noqa: S101 - a type: checked when the metadata was read
        chunk = next(c for c in entry.chunks if c.offsets == index.offset)
        kind = entry.properties.dtype, chunk.sizes
        if not isinstance(tensor, Tensor) or (tensor.dtype, tensor.shape) != kind:
            raise ValueError(f"the bytes of {index.fqn} are no {kind[0]} of {tuple(kind[1])}")
        return narrow_tensor_by_index(tensor, item.storage_offsets, item.lengths)


def write_shards(
    folder: Path, tensors: Mapping[str, Tensor], group: dist.ProcessGroup | None
) -> None:
    """Write tensors into an existing empty folder and flush them to the disk.
    Call it on every rank of `group`.

    Each rank writes its parts of a sharded tensor. A tensor that all ranks hold must be equal on
    all of them; one rank writes it, and the work is spread evenly. A tensor that a single rank has
    is written by that rank.

    Raises:
        torch.distributed.checkpoint.CheckpointException: on every rank, if one of them fails.
        RuntimeError: if a rank ends or hangs meanwhile.
    """
    _quietly(
        save,
        {name: tensor.detach() for name, tensor in tensors.items()},
        # No copies ahead: in the thread of a background save they would open
        # CUDA device 0 on every rank.
        storage_writer=_Writer(folder, sync_files=True, overwrite=False, per_thread_copy_ahead=0),
        planner=DefaultSavePlanner(flatten_state_dict=False),
        process_group=group,
        no_dist=group is None,
    )


def read_shards_into(folder: Path, metadata: Metadata, targets: Mapping[str, Tensor]) -> None:
    """Fill tensors in place; of a sharded tensor this rank's part. Every rank
    reads for itself, and nothing is sent.
    """
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
    # `read_metadata` has accepted tensors only; the check is for the type checker.
    return {
        name: torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
        for name, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata)
    }


def _quietly(action: Any, *arguments: Any, **options: Any) -> None:
    """Suppress DCP's warning that it works without a process group, which is intended here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*assuming the intent is to")
        action(*arguments, **options)
