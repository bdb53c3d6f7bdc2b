"""Lists of tensors: shards, memory layouts, sums over shards, and checks of lists that pair up."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

Column = Sequence[Tensor | None]


def traced() -> bool:
    """Whether something watches torch calls: torch.compile, fake tensors, a counting mode.

    Then ops go through the dispatcher as registered. Otherwise they run directly, because
    dispatching lists of hundreds of tensors costs more than the launch.
    """
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


_PLAIN = frozenset((Tensor, torch.nn.Parameter))


def all_plain(tensors: Iterable[Tensor]) -> bool:
    """Whether there are only tensors and parameters, and no DTensor or other subclass."""
    return _PLAIN.issuperset(map(type, tensors))


def runs_directly(tensors: Iterable[Tensor]) -> bool:
    """Whether an op may bypass the dispatcher: plain tensors, and nothing that watches or traces."""
    return not traced() and not torch._C._is_tracing() and all_plain(tensors)


def is_dtensor(tensor: object) -> TypeGuard[DTensor]:
    """Whether an object is a DTensor.

    It does not import DTensors, which takes half as long as the import of torch: before their
    module is imported there are none.
    """
    kind = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)
    return kind is not None and isinstance(tensor, kind)


def local(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors, DTensors replaced by this rank's shards: the same memory, no communication."""
    if all_plain(tensors):
        return list(tensors)
    return [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors]


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on a device; the host does not wait.

    On CUDA it goes through pinned memory: a copy from other memory would wait for the device.
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device, non_blocking=True)


def sums_over_shards(sums: Sequence[Tensor], owners: Sequence[Tensor]) -> list[Tensor]:
    """Sums over whole tensors from sums over this rank's shards, one collective per sharding.

    Args:
        sums: vectors on any devices, together one number for each owner, in their order; not
            changed where there are shards.
        owners: plain tensors, whose numbers stay, or DTensors; dimensions that are replicated
            (HSDP) take no part.

    Returns:
        As `sums`, the same on all ranks that share a tensor. All ranks must call it with the same
        owners.

    Raises:
        ValueError: for an owner that is a partial sum itself.
    """
    shardings: dict[tuple[Any, tuple[int, ...]], list[int]] = {}
    for row, owner in enumerate(owners):
        placements = getattr(owner, "placements", ())
        if any(placement.is_partial() for placement in placements):
            raise ValueError(
                f"a tensor has placements {placements}: a partial sum has no shards to add"
            )
        dims = tuple(
            dim for dim, placement in enumerate(placements) if not placement.is_replicate()
        )
        if dims:
            shardings.setdefault((getattr(owner, "device_mesh"), dims), []).append(row)  # noqa: B009
    if not shardings:
        return list(sums)
    whole = torch.cat([rows.to(sums[0].device) for rows in sums])
    for (mesh, dims), chosen in shardings.items():
        part = whole if len(chosen) == len(whole) else whole[chosen]
        for dim in dims:
            torch.distributed.all_reduce(part, group=mesh.get_group(dim))
        if part is not whole:
            whole[chosen] = part
    pieces: tuple[Tensor, ...] = torch.split(whole, [len(rows) for rows in sums])
    return [piece.to(rows.device) for piece, rows in zip(pieces, sums, strict=True)]


def norms_of(tensors: Sequence[Tensor]) -> Tensor:
    """The L2 norm of each tensor, [n], at least float32 and accumulated so; no host sync.

    For shards it is the norm of the whole tensor: one small collective for each call, so all ranks
    must call it with the same tensors.

    Args:
        tensors: at least one; plain, or DTensors.
    """
    wide = torch.promote_types(tensors[0].dtype, torch.float32)
    norms = torch.stack(torch._foreach_norm(local(tensors), 2, wide))
    if not all_plain(tensors):
        norms = sums_over_shards([norms.double().square()], tensors)[0].sqrt().to(wide)
    return norms


def same_layout(*tensors: Tensor | None) -> bool:
    """Whether flat memory order pairs up the elements: equal strides, no gaps or overlaps.

    True of contiguous tensors, and of dense ones whose dimensions are permuted alike
    (channels_last). None is skipped.
    """
    present = [tensor for tensor in tensors if tensor is not None]
    if all(tensor.is_contiguous() for tensor in present):
        return True
    first = present[0]
    expected = 1
    for stride, size in sorted(
        (st, n) for st, n in zip(first.stride(), first.shape, strict=True) if n != 1
    ):
        if stride != expected:
            return False
        expected *= size
    return all(tensor.stride() == first.stride() for tensor in present)


def check_lists(
    op: str, name: str, leaders: Sequence[Tensor], others: Mapping[str, Column]
) -> None:
    """Refuse lists of tensors that do not pair up.

    Args:
        op: name of the op, for the error text.
        name: name of the first list.
        leaders: the first list; all on one device.
        others: further lists by name, of its length; each tensor of its leader's shape and device,
            or None.

    Raises:
        ValueError: naming both lists, the index and both values.
    """
    for other, column in others.items():
        if len(column) != len(leaders):
            raise ValueError(f"{op}: {len(leaders)} {name} but {len(column)} {other}")

    for i, leader in enumerate(leaders):
        if leader.device != leaders[0].device:
            raise ValueError(
                f"{op}: {name}[{i}] is on {leader.device} but {name}[0] is on {leaders[0].device}"
            )
        for other, column in others.items():
            tensor = column[i]
            if tensor is None:
                continue
            if tensor.shape != leader.shape:
                raise ValueError(
                    f"{op}: {other}[{i}] is {tuple(tensor.shape)} but {name}[{i}] is "
                    f"{tuple(leader.shape)}"
                )
            if tensor.device != leader.device:
                raise ValueError(
                    f"{op}: {other}[{i}] is on {tensor.device} but {name}[{i}] is on "
                    f"{leader.device}"
                )
