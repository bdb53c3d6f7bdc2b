"""What objectives that compare views of an image share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from fastmoco.objectives.interface import Inputs


def two_views(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """The views of an objective that compares two.

    Raises:
        ValueError: if there are not two, or they differ in shape.
    """
    if len(inputs.views) != 2:
        raise ValueError(f"views: {len(inputs.views)} of them; this objective compares 2")
    view1, view2 = inputs.views
    if view1.shape != view2.shape:
        raise ValueError(
            f"view1 shape={tuple(view1.shape)}, view2 shape={tuple(view2.shape)}: must be equal"
        )
    return view1, view2


def by_size(inputs: Inputs, encode: Callable[..., Tensor], *, least: int = 1) -> Tensor:
    """Features [b, V, E] of all views; neighbouring views of one size pass as one batch.

    Args:
        inputs: any number of views of any sizes.
        encode: an encoder, or its plain forward; one that trains gets `Inputs.paths`.
        least: views that there must be.

    Raises:
        ValueError: if there are fewer.
    """
    passed = [_by_view(rows, inputs) for rows in each_size(inputs, encode, least)]
    return torch.cat(passed).transpose(0, 1)


def each_size(inputs: Inputs, encode: Callable[..., Any], least: int) -> Iterator[Any]:
    """What an encoder makes of neighbouring views of one size, as one batch [n * b, 3, H, W]; one
    after the other. Arguments and errors as of `by_size`."""
    views = inputs.views
    if len(views) < least:
        raise ValueError(f"views: {len(views)} of them; this objective compares at least {least}")
    for _, numbers in groupby(range(len(views)), key=lambda number: views[number].shape[1:]):
        group = tuple(numbers)
        yield encode(torch.cat([views[number] for number in group]), *inputs.paths_of(*group))


def by_image(rows: Tensor, inputs: Inputs) -> Tensor:
    """[n * b, ...] of n views of the images -> [b, n, ...]."""
    return _by_view(rows, inputs).transpose(0, 1)


def _by_view(rows: Tensor, inputs: Inputs) -> Tensor:
    """The same -> [n, b, ...]."""
    return rows.view(-1, len(inputs.views[0]), *rows.shape[1:])


def encoded_views(encode: Callable[..., Tensor], inputs: Inputs, *, together: bool) -> Tensor:
    """[2, b, E]: both views through a trunk, as one batch or each alone.

    Raises:
        ValueError: if the views differ in shape, or are not two.
    """
    views = two_views(inputs)
    if together:
        rows = encode(torch.cat(views), *inputs.paths_of(0, 1))
    else:
        rows = torch.cat([encode(view, *inputs.paths_of(i)) for i, view in enumerate(views)])
    return rows.view(2, len(views[0]), -1)


def by_view(features: Tensor) -> Tensor:
    """[B, V, E] -> [V, B, E], of which batch norms take the statistics of each view alone."""
    return features.transpose(0, 1).contiguous()


def plain_projection(encoder: Any, view: Tensor, *paths: Tensor | None) -> Tensor:
    """The projection of one view alone, by plain operations with nothing fused: for references.

    `paths`: of `Inputs.paths_of` this view, for the encoder that trains.
    """
    projected: Tensor = encoder.head(encoder.plain(view, *paths))
    return projected
