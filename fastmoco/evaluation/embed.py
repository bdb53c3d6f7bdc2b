"""Compute the features and labels of a set, ready for `knn`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from fastmoco.evaluation.rows import MemoryRows, Rows, new_rows
from fastmoco_pipelines import EvalLoader
from fastmoco_pipelines.loading.batch import EvalBatch


@dataclass(frozen=True, slots=True)
class LabelledRows:
    """Features of images, their labels [n] int64, and, where they come from a loader, their numbers
    in the set [n] int64."""

    rows: Rows
    labels: Tensor
    sample_ids: Tensor | None = None


def embed(encode: Callable[[Tensor], Tensor], loader: Iterable[EvalBatch]) -> tuple[Tensor, Tensor]:
    """Features of all images of a loader, in its order, in eval mode and without gradient.

    Args:
        encode: a module, a method of one, or any function: images [B, 3, H, W] on the loader's
            device -> features [B, E]. A module, or the module of a method, is put into eval mode,
            and afterwards each of its parts gets its previous mode back. A function that hides its
            module (a lambda) must set the mode itself.
        loader: yields `EvalBatch`.

    Returns:
        Features [n, E] float32 and labels [n] int64, on the CPU.

    Raises:
        ValueError: if the loader yields nothing, or `encode` does not return one row per image.
    """
    module = encode if isinstance(encode, nn.Module) else getattr(encode, "__self__", None)
    with eval_mode(module if isinstance(module, nn.Module) else None), torch.no_grad():
        return _collect(encode, loader)


def raw_pixels(loader: Iterable[EvalBatch]) -> tuple[Tensor, Tensor]:
    """The pixels themselves as features: the baseline for any encoder.

    Args:
        loader: yields `EvalBatch`.

    Returns:
        Features [n, 3 * H * W] float32 (normalised as the encoder sees them) and labels [n] int64,
        on the CPU.

    Raises:
        ValueError: if the loader yields nothing.
    """
    return _collect(lambda images: images.flatten(1), loader)


def embed_part(
    encode: Callable[[Tensor], Tensor],
    loader: EvalLoader,
    *,
    memory_bytes: int | None = None,
    folder: Path | None = None,
) -> LabelledRows:
    """Features of this rank's part of a set, in memory or in a temporary file.

    Args:
        encode: as of `embed`, but its module must be in eval mode already.
        loader: of a rank, whose part may be empty.
        memory_bytes: largest size of the features in memory; None: any.
        folder: of the file; None: that of `TMPDIR`.

    Returns:
        Features [n, E] float32 and labels. E is 0 if the part is empty. Close the rows.

    Raises:
        ValueError: if `encode` does not return one row per image.
        RunError: if the disk has no room.
    """
    with torch.no_grad():
        return _fill(encode, loader, loader.part, memory_bytes=memory_bytes, folder=folder)


def _collect(
    encode: Callable[[Tensor], Tensor], loader: Iterable[EvalBatch]
) -> tuple[Tensor, Tensor]:
    found = _fill(encode, loader, loader.part if isinstance(loader, EvalLoader) else 0)
    if not len(found.rows):
        raise ValueError("the loader yields no images; is the set empty?")
    assert isinstance(found.rows, MemoryRows)  # noqa: S101 - a type: kept in memory, as asked
    return found.rows.tensor, found.labels


def _fill(
    encode: Callable[[Tensor], Tensor],
    loader: Iterable[EvalBatch],
    capacity: int,
    *,
    memory_bytes: int | None = None,
    folder: Path | None = None,
) -> LabelledRows:
    """Write the features of every batch into one table, whose width the first batch gives."""
    table: Rows | None = None
    labels = []
    sample_ids = []
    try:
        for batch in loader:
            rows = encode(batch.images)
            if rows.ndim != 2 or len(rows) != len(batch.images):
                raise ValueError(
                    f"encode returned {tuple(rows.shape)} for {len(batch.images)} images: "
                    f"needs one row per image"
                )
            if table is None:
                table = new_rows(
                    rows.shape[1],
                    torch.float32,
                    capacity=max(capacity, len(rows)),
                    memory_bytes=memory_bytes,
                    folder=folder,
                )
            table.append(rows.detach())
            labels.append(torch.from_numpy(batch.labels).to(torch.int64))
            sample_ids.append(torch.from_numpy(batch.sample_ids))
    except BaseException:
        if table is not None:
            table.close()
        raise
    if table is None:
        none = torch.empty(0, dtype=torch.int64)
        return LabelledRows(MemoryRows(torch.empty(0, 0)), none, none)
    return LabelledRows(table, torch.cat(labels), torch.cat(sample_ids))


def encoder_function(
    encoder: Callable[[Tensor], Tensor], device: torch.device, precision: str
) -> Callable[[Tensor], Tensor]:
    """A function from images on any device to features, as evaluations compute them.

    Args:
        encoder: a module in eval mode on `device`, or a method of one.
        device: of the computation.
        precision: "bf16" (autocast), "fp32" or "fp64".
    """
    dtype = torch.float64 if precision == "fp64" else torch.float32

    def encode(images: Tensor) -> Tensor:
        images = images.to(device, dtype)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
            return encoder(images)

    return encode


@contextmanager
def eval_mode(module: nn.Module | None) -> Iterator[None]:
    """A context in eval mode; afterwards every submodule gets its previous mode back."""
    before = [(part, part.training) for part in module.modules()] if module is not None else []
    try:
        for part, _ in before:
            part.training = False
        yield
    finally:
        for part, training in before:
            part.training = training
