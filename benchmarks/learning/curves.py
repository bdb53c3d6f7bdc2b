"""What the curves of the learning benchmark say: figures by images and by CPU-seconds, ratios of
two sides, and whether a new run has fallen below a stored one.

A curve is a dict of lists with one value for each point (`side.run_side`).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

import numpy as np

from benchmarks.measure import ratios

Curve = Mapping[str, Any]


def summary(values: Sequence[float]) -> dict[str, float]:
    """Mean, smallest and largest of the seeds."""
    return {name: round(f(values), 5) for name, f in (("mean", mean), ("min", min), ("max", max))}


def at_images(curve: Curve, images: int) -> float:
    """kNN at a point of the grid.

    Raises:
        ValueError: if the curve has no such point.
    """
    if images not in curve["images"]:
        raise ValueError(f"images={images}: the curve has points at {curve['images']}")
    return float(curve["knn"][curve["images"].index(images)])


def at_seconds(curve: Curve, seconds: float) -> float:
    """kNN after some CPU-seconds, between two points on a straight line; later, the last one."""
    return float(np.interp(seconds, curve["cpu_s"], curve["knn"]))


def seconds_to(curve: Curve, knn: float) -> float | None:
    """CPU-seconds until the curve first reaches a kNN; None if it does not."""
    points = list(zip(curve["cpu_s"], curve["knn"], strict=True))
    if points[0][1] >= knn:
        return float(points[0][0])
    for (start, low), (end, high) in itertools.pairwise(points):
        if high >= knn:
            return float(start + (end - start) * (knn - low) / (high - low))
    return None


def common_images(sides: Mapping[str, Sequence[Curve]], at_most: int) -> int:
    """The last point up to `at_most` images that every curve has."""
    every = [set(curve["images"]) for curves in sides.values() for curve in curves]
    return max(int(point) for point in set.intersection(*every) if point <= at_most)


def task_result(
    sides: Mapping[str, Sequence[Curve]], *, images: int, budget_s: float, agree: float = 0.02
) -> dict[str, Any]:
    """The figures of one task.

    Args:
        sides: curves of the seeds by side; the first side is the subject.
        images: at which `make learning` judges, or where the shortest curve ends before it.
        budget_s: CPU-seconds at which kNN is compared; 0: the sides are compared by images alone.
        agree: largest difference of the mean kNN of two sides after the same images.

    Returns:
        `sides`: for each its `curves`, and the seeds' mean, min and max of kNN at the `start`,
        after `images` and after `budget_s`, and `images_per_cpu_s`; `images`; `common_images`, at
        which sides are compared; `failed`, why the figures are not to be trusted, by side;
        `unstable`, signs of instability by run; unless a side has failed and for two sides
        `speedup` of the subject: `images`, images per CPU-second over the other's, and `same_knn`,
        CPU-seconds of the other to its kNN at the budget over those of the subject.
    """
    subject = next(iter(sides))
    common = common_images(sides, images)
    result: dict[str, Any] = {
        "images": images,
        "common_images": common,
        "budget_s": budget_s,
        "sides": {},
        "failed": {},
        "unstable": {},
    }
    for name, curves in sides.items():
        own: dict[str, Any] = {"start": summary([curve["knn"][0] for curve in curves])}
        reached = common_images({name: curves}, images)
        own["by_images"] = {
            "images": reached,
            **summary([at_images(curve, reached) for curve in curves]),
        }
        if budget_s:
            own["by_seconds"] = summary([at_seconds(curve, budget_s) for curve in curves])
        own["images_per_cpu_s"] = summary([_rate(curve) for curve in curves])
        result["sides"][name] = own | {"curves": list(curves)}

        # A side that does not learn is no side.
        for curve in curves:
            if not max(curve["knn"][1:]) > curve["knn"][0]:
                result["failed"][name] = (
                    f"seed {curve['seed']}: kNN {curve['knn'][-1]:.1%} is not above the "
                    f"{curve['knn'][0]:.1%} of random weights"
                )
            if curve["events"]:
                result["unstable"][f"{name}, seed {curve['seed']}"] = list(curve["events"])

    # Both see the same images, so they must learn the same.
    for name in list(sides)[1:]:
        means = [
            mean(at_images(curve, common) for curve in sides[each]) for each in (subject, name)
        ]
        if not abs(means[0] - means[1]) <= agree:
            result["failed"][name] = (
                f"kNN {means[1]:.1%} after {common} images, {subject} {means[0]:.1%}: they do not "
                "do the same"
            )
    if not result["failed"] and len(sides) > 1:
        result["speedup"] = {
            name: _speedup(sides[subject], sides[name], budget_s) for name in list(sides)[1:]
        }
    return result


def _rate(curve: Curve) -> float:
    return float(curve["images"][-1] / curve["cpu_s"][-1])


def _speedup(
    subject: Sequence[Curve], other: Sequence[Curve], budget_s: float
) -> dict[str, dict[str, float]]:
    """Ratios of the same seeds."""
    found = {"images": ratios([_rate(each) for each in subject], [_rate(each) for each in other])}
    if budget_s:
        levels = [at_seconds(each, budget_s) for each in other]
        own = [seconds_to(each, level) for each, level in zip(subject, levels, strict=True)]
        others = [seconds_to(each, level) for each, level in zip(other, levels, strict=True)]
        pairs = [(a, b) for a, b in zip(others, own, strict=True) if a and b]
        if len(pairs) == len(levels):
            found["same_knn"] = ratios([a for a, _ in pairs], [b for _, b in pairs])
    return {
        name: {kind: round(value, 3) for kind, value in each.items()}
        for name, each in found.items()
    }


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a mean of kNN holds against a stored one.

    Attributes:
        passed: whether it is at least `floor`.
        now: mean of the new run.
        stored: mean of the stored one.
        spread: largest minus smallest of the stored seeds.
    """

    passed: bool
    now: float
    stored: float
    spread: float

    @property
    def floor(self) -> float:
        """The least mean that passes."""
        return self.stored - self.spread

    def __str__(self) -> str:
        word = "passed" if self.passed else "FAILED"
        return (
            f"{word}: mean kNN {self.now:.2%}, stored {self.stored:.2%}, spread of its seeds "
            f"{100 * self.spread:.2f} points, so at least {self.floor:.2%}"
        )


def judge(now: Sequence[float], stored: Sequence[float]) -> Verdict:
    """Compare the kNN of some seeds with the stored ones: the mean may be lower by their spread."""
    spread, before, after = max(stored) - min(stored), mean(stored), mean(now)
    # Means of equal figures must be equal, whatever the rounding of their sums.
    return Verdict(after >= before - spread - 1e-12, after, before, spread)
