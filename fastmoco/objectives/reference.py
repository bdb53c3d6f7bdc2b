"""An objective's forward by plain operations: what tests compare the fast path with."""

from __future__ import annotations

from torch import Tensor

from fastmoco.objectives.interface import START, Objective, Output, Progress


def plain_forward(
    objective: Objective,
    *views: Tensor,
    labels: Tensor | None = None,
    at: Progress = START,
    accuracy: bool = False,
) -> Output:
    """What `objective(*views)` computes, with nothing shared, saved or fused.

    Args:
        objective: in training mode; the running averages of its batch norms move, as in any
            forward.
        views: [B, 3, H, W] each.
        labels: [B], where the objective needs them.
        at: the step.
        accuracy: whether the output has one.
    """
    inputs = objective.resized(objective.inputs(views, at=at, labels=labels), at)
    return objective.reference(inputs, at, accuracy=accuracy)
