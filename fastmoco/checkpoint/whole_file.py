"""Tensors in one safetensors file, written by a single process. It contains no
pickle, and other tools can read it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from fastmoco.checkpoint.errors import CheckpointError
from fastmoco.checkpoint.folder import flush
from fastmoco.checkpoint.safetensors_file import opened, read_header
from fastmoco_kernels.tensors import is_dtensor


def storable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the host, contiguous, no two in one storage, because
    safetensors stores each as its own run of bytes.

    Raises:
        CheckpointError: if a tensor has the name that the format reserves.
    """
    ready: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        if name == "__metadata__":
            raise CheckpointError(
                "a tensor cannot be called '__metadata__': safetensors reserves that name"
            )
        host = tensor.detach().to("cpu").resolve_conj().resolve_neg().contiguous()
        if host.untyped_storage().data_ptr() in seen:
            host = host.clone()
        seen.add(host.untyped_storage().data_ptr())
        ready[name] = host
    return ready


def write_whole(
    path: Path, tensors: Mapping[str, Tensor], notes: Mapping[str, str] | None = None
) -> None:
    """Write tensors to a new file (mode 0600) and flush it to the disk.

    Args:
        path: must not exist.
        tensors: dense, on any device.
        notes: written into the header of the file.

    Raises:
        CheckpointError: naming tensors of a dtype that safetensors cannot store.
        OSError: if the file system fails.
        SafetensorError: likewise.
    """
    ready = storable(tensors)
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    try:
        save_file(ready, path, metadata=dict(notes or {}) or None)
    except KeyError as error:  # from the table of dtypes in safetensors
        names = [name for name, tensor in ready.items() if str(tensor.dtype) == str(error.args[0])]
        raise CheckpointError(
            f"tensors {names[:5]} are {error.args[0]}, which safetensors cannot store"
        ) from error
    path.chmod(0o600)
    flush(path)


def whole_entries(path: Path) -> dict[str, Tensor]:
    """Shapes and dtypes by name, as tensors on the meta device; no data is read.

    Raises:
        ValueError: if the header of the file is damaged or forged.
        OSError: if the file cannot be read.
    """
    return read_header(path, follow=False).entries


def read_whole_into(path: Path, targets: Mapping[str, Tensor]) -> None:
    """Fill tensors in place; of a sharded tensor only this rank's part."""
    with opened(path) as file:
        for name, target in targets.items():
            tensor = file.get_tensor(name)
            if tensor.shape != target.shape:
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}")
            if is_dtensor(target):
                from torch.distributed.tensor import distribute_tensor

                # Every rank has read the same bytes, so each takes its own part
                # and nothing is sent.
                tensor = tensor.to(target.device)
                part = distribute_tensor(
                    tensor, target.device_mesh, target.placements, src_data_rank=None
                )
                target, tensor = target.to_local(), part.to_local()
            target.copy_(tensor)
