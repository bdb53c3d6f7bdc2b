"""Actions of all ranks: an error on one rank is raised on all, as is the loss
of a rank within a deadline.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar, cast

import torch.distributed as dist

from fastmoco.checkpoint.errors import CheckpointError

T = TypeVar("T")


def group_for_saving(deadline_s: float) -> dist.ProcessGroup | None:
    """A process group of all ranks for checkpoints only, on the CPU, usable
    from a thread during training.

    Args:
        deadline_s: seconds that ranks wait for each other in one phase of a save.

    Returns:
        None without a process group; this process then saves alone.
    """
    if not dist.is_initialized():
        return None
    group: dist.ProcessGroup = dist.new_group(backend="gloo", timeout=timedelta(seconds=deadline_s))
    return group


def rank_in(group: dist.ProcessGroup | None) -> int:
    """This process's number in the group, 0 without one."""
    return 0 if group is None else dist.get_rank(group)


def size_of(group: dist.ProcessGroup | None) -> int:
    """Number of ranks in the group, 1 without one."""
    return 1 if group is None else dist.get_world_size(group)


def on_every_rank(action: Callable[[], T], group: dist.ProcessGroup | None) -> list[T]:
    """Run an action that needs no communication on every rank.

    Returns:
        The results in rank order, the same list on all ranks.

    Raises:
        CheckpointError: on every rank, naming the ranks on which it failed, or if a rank does not
            take part in time. Without a group the error itself is raised.
    """
    if group is None:
        return [action()]
    result: T | None = None
    failure: Exception | None = None
    try:
        result = action()
    except Exception as error:  # of any kind, because the peers wait
        failure = error
    message = None if failure is None else f"rank {dist.get_rank(group)}: {failure}"
    answers: list[tuple[T, str | None] | None] = [None] * dist.get_world_size(group)
    try:
        dist.all_gather_object(answers, (result, message), group=group)
    except RuntimeError as error:
        lost = CheckpointError(f"a rank ended or did not answer in time: {message or error}")
        raise lost from (failure or error)
    complete = cast("list[tuple[T, str | None]]", answers)
    failures = [text for _, text in complete if text is not None]
    if failures:
        raise CheckpointError("; ".join(failures)) from failure
    return [answer for answer, _ in complete]


def on_first_rank(action: Callable[[], T], group: dist.ProcessGroup | None) -> T:
    """Run an action on rank 0 and return its result on every rank; errors as in `on_every_rank`."""
    results = on_every_rank(lambda: action() if rank_in(group) == 0 else None, group)
    return cast("T", results[0])
