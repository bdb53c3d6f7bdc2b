"""Skip steps whose loss or gradients are not finite, without a host sync.

One NaN pixel makes the statistics of batch norms NaN for all images, in the forward. If the
optimizer alone skipped such a step, training would continue and look healthy, but the model would
return NaN in eval mode. Therefore the buffers are copied at the start of a step and restored by a
select on the device, and the optimizer gets a flag on the device (`optim/averaged.py`). All ranks
use the maximum of their flags. A forward draws no random numbers, so there are none to restore.

A model has tens of small buffers. Those of one type are copied and selected as one flat tensor:
four operators per type and step, not two per buffer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from fastmoco.distributed.agree import largest
from fastmoco.distributed.mesh import World
from fastmoco.errors import RunError
from fastmoco_kernels.tensors import local
from fastmoco_pipelines.text import counted


class BufferCopy:
    """A copy of tensors of one type and device, to restore them under a flag on the device.

    Args:
        buffers: of any shapes; DTensors are copied shard by shard.
    """

    def __init__(self, buffers: Sequence[Tensor]) -> None:
        self._buffers = local(buffers)
        self._before = torch.cat([buffer.detach().reshape(-1) for buffer in self._buffers])
        self._now = self._before.clone()

        # The same two in the shapes of the buffers. Views made once: they cost the host more than
        # the operators.
        self._pieces_before = self._pieces(self._before)
        self._pieces_now = self._pieces(self._now)

    def take(self) -> None:
        """Copy the tensors."""
        torch._foreach_copy_(self._pieces_before, self._buffers)

    def restore(self, flag: Tensor) -> None:
        """Set the tensors back to the copy if a flag is true, without a host sync.

        It selects, because no arithmetic would remove a NaN.
        """
        torch._foreach_copy_(self._pieces_now, self._buffers)
        torch.where(flag, self._before, self._now, out=self._now)
        torch._foreach_copy_(self._buffers, self._pieces_now)

    def _pieces(self, flat: Tensor) -> list[Tensor]:
        """Views of a flat tensor in the shapes of the tensors."""
        parts = flat.split([buffer.numel() for buffer in self._buffers])  # type: ignore[no-untyped-call]
        return [part.view(buffer.shape) for part, buffer in zip(parts, self._buffers, strict=True)]


def copies_of(buffers: Iterable[Tensor]) -> list[BufferCopy]:
    """One copy for each type and device among tensors."""
    alike: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for buffer in buffers:
        alike.setdefault((buffer.dtype, buffer.device), []).append(buffer)
    return [BufferCopy(group) for group in alike.values()]


class StepGuard:
    """Skips bad steps. Call `begin` before a forward, `judge` after its backward, and `report` at
    log steps.

    Args:
        objective: its buffers are restored after a bad step.
        world: this process's rank and device.
        patience: consecutive bad steps that end the run.

    Attributes:
        skipped: steps skipped until the last `report`.
    """

    def __init__(self, objective: nn.Module, world: World, *, patience: int) -> None:
        self._patience = patience
        self._copies = copies_of(objective.buffers())
        self.skipped = 0
        # Bad steps: all, the current number in a row, the most in a row since the last report.
        self._counts = torch.zeros(3, dtype=torch.int64, device=world.device)

    @torch.no_grad()
    def begin(self) -> None:
        """Copy the buffers that a forward writes."""
        for copy in self._copies:
            copy.take()

    @torch.no_grad()
    def judge(self, loss: Tensor, gradient_norm: Tensor) -> Tensor:
        """Decide whether a step is skipped; if so, restore the buffers that its forward has
        written.

        Args:
            loss: of this rank, a scalar.
            gradient_norm: of all gradients together, after averaging over ranks.

        Returns:
            One float32 on the device, the same on all ranks: 1 for a step to skip, else 0. No host
            sync.
        """
        # Zero times a finite number is 0, else it is NaN, which differs from 0: half the operators
        # of two calls of `isfinite`.
        bad = (0 * loss.detach() + 0 * gradient_norm) != 0
        found = largest(bad.to(torch.float32))
        bad = found > 0

        # Restore the buffers, and count in place.
        for copy in self._copies:
            copy.restore(bad)
        every, row, longest = self._counts.unbind()
        every += bad
        row.add_(1).mul_(bad)
        torch.maximum(longest, row, out=longest)
        return found

    def forget(self) -> None:
        """Reset the count of consecutive bad steps after a rollback. No host sync."""
        self._counts[1:].zero_()

    def report(self, step: int) -> list[str]:
        """Log lines on the steps skipped since the last call; one host sync.

        Args:
            step: steps done.

        Raises:
            RunError: if too many consecutive steps were skipped.
        """
        total, _, longest = self._counts.tolist()
        new = total - self.skipped
        self.skipped = total
        self._counts[2] = self._counts[1]
        if longest >= self._patience:
            raise RunError(
                f"{counted(longest, 'step')} in a row up to step {step} had a non-finite loss or "
                f"gradients (faults.max_skipped_steps={self._patience}); none of them changed the model. "
                "Lower --optim.lr, lengthen --optim.warmup-epochs or set --optim.clip-norm, "
                "in a new --out"
            )
        if not new:
            return []
        return [
            f"warning: {counted(new, 'step')} up to step {step} skipped, "
            f"loss or gradients not finite ({total} so far)"
        ]
