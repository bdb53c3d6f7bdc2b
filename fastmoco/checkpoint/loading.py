"""Verify and read checkpoints of both formats on any number of ranks.

torch.distributed.checkpoint is imported for its own format only: that takes half as long as the
import of torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from fastmoco.checkpoint.errors import (
    CheckpointError,
    DamagedCheckpointError,
    DamageError,
    storage_errors,
)
from fastmoco.checkpoint.folder import (
    METADATA,
    TENSORS,
    list_checkpoints,
    state_of,
    step_of,
    verify,
)
from fastmoco.checkpoint.whole_file import read_whole_into, whole_entries

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint whose bytes were all verified; its tensors are read on demand.

    Attributes:
        step: number of optimizer steps finished when it was saved.
        state: the JSON part; tuples come back as lists.
        path: its folder.
        entries: shape and dtype of every tensor by name, as tensors on the meta device.
        run_id: of the run that wrote it; "" if it was saved outside a run.
        skipped: newer committed folders that could not be trusted, newest first, each with the
            reason, to be printed.
        kept: those of them whose damage is not proven, e.g. of a later version, or unreadable for a
            moment. A run that continues must keep them (`folder.keep`).
        metadata: DCP's table of the pieces of each tensor; None for the file of a single process.
    """

    step: int
    state: dict[str, Any]
    path: Path
    entries: Mapping[str, Tensor]
    run_id: str = ""
    skipped: tuple[tuple[Path, str], ...] = ()
    kept: tuple[Path, ...] = ()
    metadata: Metadata | None = None

    @property
    def warnings(self) -> list[str]:
        """What a run that continues says about newer checkpoints, a sentence each."""
        kept = " It is kept: no save removes it."
        return [
            f"passed over {path.name}: {reason}{kept if path in self.kept else ''}"
            for path, reason in self.skipped
        ]

    @property
    def cure(self) -> str:
        """What to do where its tensors do not fit the model, in sentences."""
        return (
            f"Was the model changed since the save? If not, restore {self.path.name} from a copy, or "
            "remove it to continue from an earlier checkpoint."
        )

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Every tensor, unsharded, on the CPU, contiguous, in the dtype in which
        it was saved; each owns its memory.

        Raises:
            CheckpointError: if the files have changed since they were verified.
        """
        whole = {
            name: torch.empty_like(entry, device="cpu") for name, entry in self.entries.items()
        }
        self.read_into(whole)
        return whole

    def read_into(self, targets: Mapping[str, Tensor]) -> None:
        """Fill tensors in place; of a sharded tensor this rank reads its own
        part only. Nothing is sent.

        Args:
            targets: by name, plain or sharded over any number of ranks, on any device; values of
                another dtype are converted. Entries without a target are not read.

        Raises:
            CheckpointError: naming entries that are missing or have another
                shape, or if the files have changed.
        """
        missing = [name for name in targets if name not in self.entries]
        if missing:
            raise CheckpointError(f"{self.path} has no {missing[:5]}. {self.cure}")
        for name, target in targets.items():
            entry = self.entries[name]
            if (entry.shape, entry.dtype) != (target.shape, target.dtype):
                raise CheckpointError(
                    f"{self.path}: {name} is {entry.dtype} of shape {tuple(entry.shape)}, the model "
                    f"has {target.dtype} of shape {tuple(target.shape)}. {self.cure}"
                )
        plain = {name: target.detach() for name, target in targets.items()}
        try:
            if self.metadata is None:
                read_whole_into(self.path / TENSORS, plain)
            else:
                from fastmoco.checkpoint.shards import read_shards_into

                read_shards_into(self.path, self.metadata, plain)
        except storage_errors() as error:
            raise CheckpointError(
                f"{self.path} cannot be read any more: {error}. Run the same command again."
            ) from error


Admit: TypeAlias = Callable[[Path, str], None]
"""Called with a verified folder and the id of the run that wrote it; raises
an error to refuse it."""


def load_latest(
    root: Path,
    *,
    among: Callable[[int], bool] = lambda step: True,
    admit: Admit = lambda path, run_id: None,
) -> Checkpoint | None:
    """The newest checkpoint that verifies, or None if nothing was ever committed.

    Every rank hashes every file itself, so that it reads only what it has checked.

    Args:
        root: folder of the run's checkpoints.
        among: selects steps; folders of other steps are not opened.
        admit: its errors are raised here; a refused checkpoint does not lead to the previous one.

    Returns:
        The checkpoint; `skipped` lists every newer one that failed to verify, with the reason.

    Raises:
        CheckpointError: if committed folders exist and none verifies, because only the user can
            decide to start from scratch.
    """
    skipped: list[tuple[Path, str]] = []
    kept: list[Path] = []
    for path in reversed([path for path in list_checkpoints(root) if among(step_of(path))]):
        try:
            loaded = load_checkpoint(path, admit=admit)
        except CheckpointError as error:
            skipped.append((path, str(error)))
            if not isinstance(error, DamagedCheckpointError):
                kept.append(path)
            continue
        return replace(loaded, skipped=tuple(skipped), kept=tuple(kept))
    if not skipped:
        return None
    reasons = "\n  ".join(reason for _, reason in skipped)
    raise CheckpointError(
        f"{root}: {len(skipped)} checkpoint(s) exist and none can be trusted:\n  {reasons}\n"
        f"  Put back an intact copy of one of these folders, or move {root} away to start from "
        "scratch."
    )


def load_checkpoint(path: Path, *, admit: Admit = lambda path, run_id: None) -> Checkpoint:
    """Verify one committed folder, call `admit`, and open the folder. Nothing
    is parsed before `admit` returns.

    Raises:
        CheckpointError: naming the file that is missing, changed, unreadable or
            hostile, and the cure; a `DamagedCheckpointError` where the damage is proven.
    """
    cure = f"Restore {path.name} from a copy, or remove it to continue from an earlier checkpoint."
    again = "Make it readable and run the same command again."
    lack = "its files need more memory than there is. Free some and run the same command again."
    try:
        promised = verify(path)
    except DamageError as error:
        raise DamagedCheckpointError(f"{path}: {error}. {cure}") from error
    except OSError as error:
        raise CheckpointError(f"{path}: {error}. {again}") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}. {cure}") from error
    except MemoryError as error:
        raise CheckpointError(f"{path}: {lack}") from error
    run_id = promised["run_id"]
    admit(path, run_id)
    try:
        state = state_of(path, run_id)
        metadata = None
        if METADATA in promised["files"]:
            from fastmoco.checkpoint.dcp_metadata import read_metadata
            from fastmoco.checkpoint.shards import shard_entries

            metadata = read_metadata(path / METADATA, promised["files"])
            entries = shard_entries(metadata)
        else:
            entries = whole_entries(path / TENSORS)
    except MemoryError as error:
        raise CheckpointError(f"{path}: {lack}") from error
    except OSError as error:
        raise CheckpointError(f"{path}: {error}. {again}") from error
    except (ValueError, RuntimeError, OverflowError) as error:
        raise CheckpointError(f"{path}: {error}. {cure}") from error
    return Checkpoint(
        step=promised["step"],
        state=state,
        path=path,
        entries=entries,
        run_id=run_id,
        metadata=metadata,
    )
