"""Health of a run: signals that change before the accuracy does.

Chen, Xie, He 2021 found that contrastive training of ViTs has a hidden instability: no NaN, no
divergence, a normal loss, but one to three points less accuracy. It is visible in the gradient,
which jumps in the *first* layer some steps before it jumps in the last, and as dips of the kNN
curve. docs/stability.md explains how to read each signal.

`detectors` judges these figures.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.nn.functional import normalize

from fastmoco_kernels.tensors import norms_of

LARGEST_GRAM = 256
"""Rows of the largest matrix of which `effective_rank` computes eigenvalues: some milliseconds."""


def feature_std(features_BD: Tensor) -> Tensor:
    """Standard deviation over the batch of the L2-normalised rows, averaged over the dimensions.

    Directions spread evenly over the sphere give the maximum, 1/sqrt(D) (0.0625 at D = 256); one
    direction for every image (collapse) gives 0. Source: the collapse measure of Chen and He 2021
    (SimSiam), section 4.1.

    Args:
        features_BD: [B, D] outputs of a head or encoder, any floating dtype, any device, B >= 2.

    Returns:
        Scalar float32 on the same device, without gradient; no host sync.

    Raises:
        ValueError: if the shape is not [B >= 2, D].
    """
    deviation: Tensor = _unit_rows(features_BD).std(dim=0, unbiased=False)
    return deviation.mean()


def effective_rank(features_BD: Tensor) -> Tensor:
    """Effective number of directions of the L2-normalised, centred rows.

    It is exp of the entropy of their variance spectrum.

    Between 1 (all on a line: dimensional collapse) and min(B - 1, D). Source: Roy and Vetterli
    2007. The eigenvalues are those of a matrix of at most `LARGEST_GRAM` rows: where both B and D
    are larger, the first rows are a sample of the batch, and no value exceeds that number.

    Args:
        features_BD: [B, D] outputs of a head or encoder, any floating dtype, any device, B >= 2.

    Returns:
        Scalar float32 on the same device, without gradient; NaN if a feature is not finite, or if the
        solver does not converge. Waits for the device (an eigenvalue problem), so a run computes it
        in log steps, which wait anyway.

    Raises:
        ValueError: if the shape is not [B >= 2, D].
    """
    rows = _unit_rows(features_BD)
    if rows.shape[1] > LARGEST_GRAM:
        rows = rows[:LARGEST_GRAM]
    rows = rows.double()  # neither autocast nor TF32 rounds these products
    rows = rows - rows.mean(dim=0)
    gram = (rows @ rows.T if len(rows) < rows.shape[1] else rows.T @ rows).float()

    # The solver refuses what is not finite.
    finite = gram.isfinite().all()
    try:
        spectrum = torch.linalg.eigvalsh(torch.where(finite, gram, 0.0)).clamp_min(0)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # documented, not exported
        return gram.new_tensor(math.nan)
    shares = spectrum / spectrum.sum().clamp_min(1e-20)
    entropy: Tensor = torch.special.entr(shares).sum()
    return torch.where(finite, entropy.exp(), math.nan)


def pair_cosines(q_BD: Tensor, keys_BD: Tensor) -> Tensor:
    """Mean cosine similarity of the positive pairs and of all other pairs.

    The difference shows how well an image is distinguished from the others. A BatchNorm at the end
    of a head rescales even a collapsed encoder to a healthy `feature_std`; then the two figures
    here are equal and the loss is `chance_loss`.

    Args:
        q_BD: [B, D] raw queries of one view, B >= 2.
        keys_BD: [B, D] raw keys of the other view, row i of the same image.

    Returns:
        [2] float32 on the same device, (positives, others), without gradient; no host sync, 4 * B *
        D FLOPs.

    Raises:
        ValueError: if the shapes are not the same [B >= 2, D].
    """
    if q_BD.shape != keys_BD.shape:
        raise ValueError(
            f"q of shape {tuple(q_BD.shape)}, keys of shape {tuple(keys_BD.shape)}: "
            f"needs [B, D] twice"
        )
    q = _unit_rows(q_BD)
    keys = _unit_rows(keys_BD)
    same, count = (q * keys).sum(), len(q)
    every = (q.sum(dim=0) * keys.sum(dim=0)).sum()  # autocast would round a product of matrices
    return torch.stack([same / count, (every - same) / (count * (count - 1))])


def _unit_rows(features_BD: Tensor) -> Tensor:
    if features_BD.ndim != 2 or features_BD.shape[0] < 2:
        raise ValueError(f"features of shape {tuple(features_BD.shape)}: needs [B, D] with B >= 2")
    return normalize(features_BD.detach().float(), dim=1, eps=1e-12)


def chance_loss(*, temperature: float, keys: int) -> float:
    """The loss of an encoder that maps every image to one point: 4 * temperature * ln(keys).

    Both directions of InfoNCE scaled by 2 * temperature, with all `keys` logits equal: 6.654 for
    temperature 0.2 and 4096 keys. If the loss stays there, the encoder has learned nothing or has
    collapsed.
    """
    return 4 * temperature * math.log(keys)


def gradient_norms(
    named_parameters: Iterable[tuple[str, Tensor]], places: Mapping[str, tuple[str, ...]]
) -> dict[str, Tensor]:
    """L2 norms of the gradients, by place in the network, in one pass over them, accumulated in
    float32 or wider.

    Args:
        named_parameters: of the objective, after backward. Parameters without a gradient (frozen,
            momentum side) are omitted. For sharded ones the norm of the whole tensor counts; this
            takes one small collective per call, so all ranks must call.
        places: parameter name -> places in which it counts (`Objective.places`); a parameter
            without a place counts only in the total.

    Returns:
        Scalars, at least float32, on the parameters' device, no host sync: each place that has a
        gradient, in the order of the network (`patch_embed`, `first_block`, `last_block`, `heads`),
        and `total`. `first_block` is the first block of the ViT, the layer nearest to the input
        that is trained when the patch projection is frozen. `total` alone is a poor signal: early
        in a run the class token dominates it (it starts at 1e-6, and a LayerNorm divides by its
        deviation).
    """
    found = [(name, p.grad.detach()) for name, p in named_parameters if p.grad is not None]
    if not found:
        return {"total": torch.zeros(())}

    norms = norms_of([grad for _, grad in found])

    # By place, in the order of the network.
    groups: dict[str, list[int]] = {}
    for index, (name, _) in enumerate(found):
        for place in places.get(name, ()):
            groups.setdefault(place, []).append(index)
    last = ("first_block", "last_block", "heads")
    order = [place for place in groups if place not in last] + [
        place for place in last if place in groups
    ]

    # Stacked views: indexing by a list would copy the list to the device and wait for it.
    result = {
        group: torch.linalg.vector_norm(torch.stack([norms[i] for i in groups[group]]))
        for group in order
    }
    return {**result, "total": torch.linalg.vector_norm(norms)}


class GradientRecorder:
    """Gradient norms of *every* step, with one host sync per log interval.

    Spikes last one or a few steps; norms of log steps alone would miss most of them.
    """

    def __init__(self) -> None:
        self._steps: list[int] = []
        self._names: list[tuple[str, ...]] = []
        self._values: list[Tensor] = []

    def record(self, step: int, norms: Mapping[str, Tensor]) -> None:
        """Keep the norms of one step on their device."""
        self._steps.append(step)
        self._names.append(tuple(norms))
        self._values.append(torch.stack(list(norms.values())))

    def flush(self) -> list[tuple[int, dict[str, float]]]:
        """Return the recorded steps as floats, oldest first, and clear them. One host sync."""
        # Each step takes its values off the front: `zip` ends with its names, which come first.
        values = iter(torch.cat(self._values).tolist() if self._values else [])
        rows = [
            (step, dict(zip(names, values, strict=False)))
            for step, names in zip(self._steps, self._names, strict=True)
        ]
        self._steps = []
        self._names = []
        self._values = []
        return rows
