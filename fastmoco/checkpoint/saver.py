"""Save in the foreground, or copy the state and write the copy during training."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, cast

import torch
import torch.distributed as dist
from torch import Tensor

from fastmoco.checkpoint.ranks import on_every_rank
from fastmoco.checkpoint.store import JSON, save_checkpoint
from fastmoco.errors import RunError

if TYPE_CHECKING:
    from torch.distributed.checkpoint.staging import DefaultStager

_STAGES_ONCE = torch.__version__ < "2.13"
"""Before 2.13 torch's stager closes itself after its first copy, so each save
needs a new one and pins memory again."""
Check: TypeAlias = Callable[[Mapping[str, Tensor]], None]


class Saver:
    """Writes the checkpoints of one run, one at a time.

    A background save copies the tensors to the host before it returns, so that it writes the state
    at the time of the call. A thread then checks, writes, hashes and commits the copy. The memory
    of the copy is kept for the next save, so the host needs memory for one more state of its
    process. With a group, all ranks make the same calls in the same order.

    Args:
        root: folder of the run's checkpoints.
        keep: see `save_checkpoint`.
        keep_multiple: see `save_checkpoint`.
        keep_best: see `save_checkpoint`.
        group: see `save_checkpoint`; for saves only, so that they can run during training.
        check: called with this rank's tensors before they are written; raises a
            RunError to refuse them.

    Attributes:
        saved_step: step of the newest committed checkpoint; None before the first.
    """

    def __init__(
        self,
        root: Path,
        *,
        keep: int,
        keep_multiple: int = 0,
        keep_best: bool = False,
        group: dist.ProcessGroup | None = None,
        check: Check = lambda tensors: None,
    ) -> None:
        self.saved_step: int | None = None
        self._root = root
        self._keep = keep
        self._keep_multiple = keep_multiple
        self._keep_best = keep_best
        self._group = group
        self._check = check
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._stager: DefaultStager | None = None

    def save(self, *, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, JSON]) -> None:
        """Write a checkpoint and return when it is committed. Waits for a save
        in flight; its error is kept for `poll`.

        Raises:
            RunError: if the check refuses the tensors.
            CheckpointError: if it cannot be written.
        """
        self.settle()
        self._write(step, tensors, state)

    def save_in_background(
        self, *, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, JSON]
    ) -> None:
        """Copy the state and return; a thread writes the copy. `poll` and `wait`
        return the errors of the thread.

        Waits for a save in flight first, so that there is never more than one copy.
        """
        self.settle()
        if self._stager is None or _STAGES_ONCE:
            # Imported by the first save, not at the start of a run: it takes long.
            from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

            on_cuda = any(tensor.is_cuda for tensor in tensors.values())
            self._stager = DefaultStager(
                StagingOptions(
                    use_pinned_memory=on_cuda,
                    use_shared_memory=False,
                    use_async_staging=False,
                    use_non_blocking_copy=on_cuda,
                )
            )
        copy = cast(
            "dict[str, Tensor]",
            self._stager.stage({name: t.detach() for name, t in tensors.items()}),
        )

        def write() -> None:
            try:
                self._write(step, copy, state)
            except BaseException as error:  # of any kind: training must see it
                self._error = error

        # A daemon thread, so that the process can end while a peer hangs; a
        # folder without a marker is ignored.
        self._thread = threading.Thread(
            target=write, name=f"checkpoint of step {step}", daemon=True
        )
        self._thread.start()

    def poll(self) -> BaseException | None:
        """The error of a background save that failed since the last call, or None. Never blocks."""
        if self._thread is not None and not self._thread.is_alive():
            self.settle()
        error, self._error = (self._error, None) if self._thread is None else (None, self._error)
        return error

    def wait(self, timeout_s: float | None = None) -> BaseException | None:
        """Wait for the save in flight, if any, and return its error."""
        self.settle(timeout_s)
        return self.poll()

    def settle(self, timeout_s: float | None = None) -> None:
        """Wait for the save in flight, if any; its error stays for `poll`."""
        if self._thread is not None:
            self._thread.join(timeout_s)
            if not self._thread.is_alive():
                self._thread = None

    @torch.no_grad()
    def _write(self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, JSON]) -> None:
        try:
            on_every_rank(lambda: self._check(tensors), self._group)
        except RuntimeError as error:
            raise error if isinstance(error, RunError) else RunError(str(error)) from error
        save_checkpoint(
            self._root,
            step=step,
            tensors=tensors,
            state=state,
            keep=self._keep,
            keep_multiple=self._keep_multiple,
            keep_best=self._keep_best,
            group=self._group,
        )
        self.saved_step = step
