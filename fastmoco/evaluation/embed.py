"""Compute the features and labels of a set, ready for `knn`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fastmoco_pipelines.loading.batch import EvalBatch


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


def _collect(
    encode: Callable[[Tensor], Tensor], loader: Iterable[EvalBatch]
) -> tuple[Tensor, Tensor]:
    features = []
    labels = []
    for batch in loader:
        rows = encode(batch.images)
        if rows.ndim != 2 or len(rows) != len(batch.images):
            raise ValueError(
                f"encode returned {tuple(rows.shape)} for {len(batch.images)} images: "
                f"needs one row per image"
            )
        # Copied even if the images already are float32 on the CPU: raw pixels would otherwise keep
        # the memory of every batch.
        features.append(rows.detach().to("cpu", torch.float32, copy=True))
        labels.append(torch.from_numpy(batch.labels).to(torch.int64))
    if not features:
        raise ValueError("the loader yields no images; is the set empty?")
    return torch.cat(features), torch.cat(labels)


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
