"""Figures of features that several objectives put into `Output.watch`."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import normalize


def feature_deviation(rows: Tensor) -> Tensor:
    """Standard deviation of the unit rows over a batch, averaged over channels and other axes.

    Rows in all directions alike have 1/sqrt(D); rows that no longer depend on the image have 0
    (Chen and He 2021, SimSiam, section 4.1).

    Args:
        rows: [..., B, D] raw features, any floating dtype.

    Returns:
        Scalar float32 or wider, without gradient.
    """
    wide = rows.detach()
    wide = wide if wide.element_size() >= 4 else wide.float()
    deviation: Tensor = normalize(wide, dim=-1).std(dim=-2, correction=0).mean()
    return deviation
