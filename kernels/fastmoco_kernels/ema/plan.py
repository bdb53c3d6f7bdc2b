"""What calls with the same tensors reuse: the checks, and which tensors share a launch."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from fastmoco_kernels._unchanged import Unchanged
from fastmoco_kernels.ema.reference import ema_update_foreach_
from fastmoco_kernels.tables import PointerTable, pointer_table
from fastmoco_kernels.tensors import same_layout

SOURCES = (torch.float32, torch.bfloat16, torch.float16)
"""Types of the sources that the kernel reads."""
_KEPT_PLANS = 64


class Launch:
    """Averages and sources of one type that one launch takes.

    Attributes:
        rows: their indexes among all tensors; None for all of them.
        table: their addresses; made by the first run.
    """

    def __init__(self, rows: list[int] | None) -> None:
        self.rows = rows
        self.table: PointerTable | None = None

    def pick(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """This launch's part of all tensors."""
        return tensors if self.rows is None else [tensors[row] for row in self.rows]


class Plan:
    """The launches that update some averages, valid while tensors keep their types and layouts.

    Args:
        averages: checked, without DTensors, at least one.
        sources: as many.
    """

    def __init__(self, averages: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
        self._unchanged = Unchanged([*averages, *sources])
        by_type: dict[torch.dtype | None, list[int]] = {}
        for row, (average, source) in enumerate(zip(averages, sources, strict=True)):
            flat = (
                average.dtype == torch.float32
                and source.dtype in SOURCES
                and same_layout(average, source)
            )
            by_type.setdefault(source.dtype if flat else None, []).append(row)
        self._rest = by_type.pop(None, [])
        whole = len(by_type) == 1 and not self._rest
        self._launches = [Launch(None if whole else rows) for rows in by_type.values()]

    def holds(self, averages: Sequence[Tensor], sources: Sequence[Tensor]) -> bool:
        """Whether the plan fits these types, shapes and layouts; addresses may differ."""
        return len(averages) == len(sources) and self._unchanged.holds([*averages, *sources])

    def run(
        self, averages: Sequence[Tensor], sources: Sequence[Tensor], momentum: float | Tensor
    ) -> None:
        """One update: a launch a source type, foreach for what a table of addresses cannot hold."""
        from fastmoco_kernels.ema.launch import launch_

        if self._rest:
            ema_update_foreach_(
                [averages[i] for i in self._rest], [sources[i] for i in self._rest], momentum
            )
        for launch in self._launches:
            own, their = launch.pick(averages), launch.pick(sources)
            if launch.table is None:
                launch.table = pointer_table("ema_update_", [own, their])
            else:
                launch.table.refresh([own, their])
            launch_(launch.table, own, their[0].dtype, momentum)


_plans: OrderedDict[tuple[int, int], Plan] = OrderedDict()


def known_plan(averages: Sequence[Tensor], sources: Sequence[Tensor]) -> Plan | None:
    """The plan of an earlier call that fits these tensors, checks included; None without one.

    Found by the address of the first average and the number of averages, then compared tensor by
    tensor.
    """
    plan = _plans.get((averages[0].data_ptr(), len(averages)))
    return plan if plan is not None and plan.holds(averages, sources) else None


def new_plan(averages: Sequence[Tensor], sources: Sequence[Tensor]) -> Plan:
    """A plan for checked tensors, at least one. The last 64 plans are kept."""
    key = (averages[0].data_ptr(), len(averages))
    plan = _plans[key] = Plan(averages, sources)
    _plans.move_to_end(key)
    if len(_plans) > _KEPT_PLANS:
        _plans.popitem(last=False)
    return plan
