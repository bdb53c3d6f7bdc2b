"""Health of a run: signals that change before the accuracy does.

Chen, Xie, He 2021 found that contrastive training of ViTs has a hidden instability: no NaN, no
divergence, a normal loss, but one to three points less accuracy. It is visible in the gradient,
which jumps in the *first* layer some steps before it jumps in the last, and as dips of the kNN
curve. docs/stability.md explains how to read each signal.

Detectors only return events, with the numbers in them; the caller prints them.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from fastmoco_kernels.tensors import norms_of


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
    2007.

    Args:
        features_BD: [B, D] outputs of a head or encoder, any floating dtype, any device, B >= 2.

    Returns:
        Scalar float32 on the same device, without gradient. Waits for the device (an eigenvalue
        problem of size D).

    Raises:
        ValueError: if the shape is not [B >= 2, D].
    """
    rows = _unit_rows(features_BD)
    rows = rows - rows.mean(dim=0)
    spectrum = torch.linalg.eigvalsh(rows.T @ rows).clamp_min(0)
    shares = spectrum / spectrum.sum().clamp_min(1e-20)
    entropy: Tensor = torch.special.entr(shares).sum()
    return entropy.exp()


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
    every = q.sum(dim=0) @ keys.sum(dim=0)
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Spike:
    """One value far above its history, or a non-finite one."""

    step: int
    name: str
    value: float
    median: float

    def __str__(self) -> str:
        if not math.isfinite(self.value):
            return f"step {self.step}: gradient of {self.name} is {self.value}"
        ratio = self.value / self.median if self.median else math.inf
        return (
            f"step {self.step}: gradient spike in {self.name}, "
            f"{self.value:.3g} is {ratio:.0f} x its median"
        )


class SpikeDetector:
    """Event when a gradient norm exceeds `factor` times its running median, or is not finite.

    The median over the last `window` steps follows a slow drift, and a spike in it does not move
    it. Finite spikes are added to the history, so that a lasting new level causes no more events
    after 50 % of a window.
    """

    def __init__(self, *, factor: float = 5.0, window: int = 100, warmup: int = 20) -> None:
        """Set the rule.

        Args:
            factor: multiple of the median above which a value is a spike, > 1.
            window: steps of history.
            warmup: steps of history before the first event of a finite value; at most `window`.

        Raises:
            ValueError: if a number is out of its range.
        """
        if not factor > 1:
            raise ValueError(f"factor={factor}: a spike is more than 1 x the median")
        if not 1 <= warmup <= window:
            raise ValueError(f"warmup={warmup}: needs 1 <= warmup <= window={window}")
        self._factor = factor
        self._window = window
        self._warmup = warmup
        self._history: dict[str, deque[float]] = {}

    def observe(self, step: int, norms: Mapping[str, float]) -> list[Spike]:
        """Take the norms of one step and return the spikes. Each name has its own history."""
        spikes = []
        for name, value in norms.items():
            history = self._history.setdefault(name, deque(maxlen=self._window))
            median = statistics.median(history) if history else 0.0
            finite = math.isfinite(value)
            if not finite or (len(history) >= self._warmup and value > self._factor * median):
                spikes.append(Spike(step=step, name=name, value=value, median=median))
            if finite:
                history.append(value)
        return spikes


class CollapseDetector:
    """Event when `feature_std` stays below a share of its healthy value 1/sqrt(D)."""

    def __init__(self, *, dim: int, floor: float = 0.1, patience: int = 3) -> None:
        """Set the rule: an event after `patience` consecutive values below `floor / sqrt(dim)`."""
        self._healthy = dim**-0.5
        self._floor = floor
        self._patience = patience
        self._low = 0

    def observe(self, step: int, std: float) -> str | None:
        """Take one value; return the event's text when the patience ends, once until recovery."""
        low = not std >= self._floor * self._healthy  # NaN counts as low
        self._low = self._low + 1 if low else 0
        if self._low != self._patience:
            return None
        return (
            f"step {step}: features are collapsing, their deviation over the batch is {std:.2g} "
            f"and would be {self._healthy:.2g} if they were evenly spread"
        )


class ForgettingDetector:
    """Event when an encoder no longer distinguishes images after it did: collapse before the heads.

    Watches the gap of `pair_cosines`, which no BatchNorm can restore.
    """

    def __init__(self, *, learned: float = 0.1, lost: float = 0.02, patience: int = 3) -> None:
        """Set the rule: an event after `patience` consecutive gaps below `lost`.

        It applies once the gap has exceeded `learned`.
        """
        self._learned = learned
        self._lost = lost
        self._patience = patience
        self._armed = False
        self._low = 0

    def observe(self, step: int, positive: float, other: float) -> str | None:
        """Take both mean cosines; return the event's text as the other detectors do."""
        gap = positive - other
        self._armed = self._armed or gap > self._learned
        # NaN counts as low.
        self._low = self._low + 1 if self._armed and not gap >= self._lost else 0
        if self._low != self._patience:
            return None
        return (
            f"step {step}: the encoder has collapsed, the two views of an image are no more alike "
            f"than two images (cosines {positive:.3f} and {other:.3f})"
        )


class UninformedDetector:
    """Event when the loss has not left that of knowing nothing at the end of the warm-up."""

    def __init__(
        self, value: float | None, *, after: int, margin: float = 0.02, patience: int = 3
    ) -> None:
        """Set the rule.

        Args:
            value: `Objective.uninformed_loss`; None: no events.
            after: first step that is judged; earlier ones only tell whether the loss has left.
            margin: share of the value by which a loss has left it.
            patience: logged steps from `after` on that must all be at the value.
        """
        self._value = value
        self._after = after
        self._margin = margin
        self._patience = patience

    def observe(self, step: int, loss: float) -> str | None:
        """Take one loss; return the text of the event, once."""
        if self._value is None:
            return None
        if loss < (1 - self._margin) * self._value:
            self._value = None
            return None
        if step < self._after or not math.isfinite(loss):
            return None
        self._patience -= 1
        if self._patience > 0:
            return None
        value, self._value = self._value, None
        return (
            f"step {step}: after the warm-up the loss is {loss:.3f}, still that of an encoder that "
            f"knows nothing ({value:.3f}). Look at the views (fastmoco data views), and change "
            "--optim.lr"
        )


class DipDetector:
    """Event when an accuracy falls more than `tolerance` below its best: the visible sign of
    instability in the paper."""

    def __init__(self, label: str, *, tolerance: float = 0.02) -> None:
        """Set the rule.

        Args:
            label: of the accuracy.
            tolerance: a share; should exceed the noise of the held-out set, at most 2/sqrt(n).
        """
        self._label = label
        self._tolerance = tolerance
        self._best = -math.inf
        self._inside = False

    def observe(self, step: int, accuracy: float) -> str | None:
        """Take one accuracy (a share); return the text of the event when a dip begins."""
        best = self._best
        was_inside = self._inside
        self._best = max(best, accuracy)
        self._inside = accuracy < best - self._tolerance
        if not self._inside or was_inside:
            return None
        points = 100 * (best - accuracy)
        return (
            f"step {step}: {self._label} fell to {accuracy:.1%}, {points:.1f} points below its best"
        )
