"""Whose checkpoints a run continues from: its own, and those it was told to trust.

A checkpoint becomes weights, and weights become results: one that somebody else has put into a run's folder, or that was copied
there by mistake, is refused however sound it is. The id protects from mistakes and from planted checkpoints, not from
somebody who may write the whole folder.
"""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fastmoco.distributed.gather import gather_rows
from fastmoco.distributed.mesh import World
from fastmoco.errors import RunError
from fastmoco.run.folder import RunFolder

BYTES = 7
"""Of a run id; as a whole number it fits into an int64."""


@dataclass(frozen=True, kw_only=True)
class RunIdentity:
    """The id of a run, and which others it has taken over checkpoints from.

    Attributes:
        run_id: 14 hexadecimal digits, drawn at the run's first start and kept in its `config.json`.
        trusted: ids of other runs whose checkpoints it may continue from.
        trust_all: whether the user trusts whatever lies in the folder.
        new: whether the id is of this start.
    """

    run_id: str
    trusted: tuple[str, ...] = ()
    trust_all: bool = False
    new: bool = False

    def admit(self, path: Path, run_id: str) -> None:
        """Refuse a checkpoint of another run.

        Args:
            path: its folder, verified.
            run_id: what its marker says; "" for nothing.

        Raises:
            RunError: naming the file, both ids and the cure.
        """
        if not self.trust_all and run_id not in (self.run_id, *self.trusted):
            raise RunError(
                f"{path / 'COMMITTED'}: this checkpoint was written by {f'run {run_id}' if run_id else 'a run without an id'}, "
                f"and {self._owner(path.parent.parent)}. If you know where it comes from, give --trust "
                "to take it over; its SHA-256 is checked all the same. Or choose another --out"
            )

    def _owner(self, folder: Path) -> str:
        return (
            f"{folder} has no config.json with a run's id"
            if self.new
            else f"{folder} is the folder of run {self.run_id}"
        )

    def taking_over(self, run_id: str) -> RunIdentity:
        """The identity of a run that has continued from a checkpoint of that id, and need not be told again."""
        return self if run_id in (self.run_id, *self.trusted) else replace(self, trusted=(*self.trusted, run_id))

    def to_json(self) -> dict[str, Any]:
        """The entries of `config.json`."""
        return {"run_id": self.run_id, "trusted_run_ids": list(self.trusted)}


def identify(folder: RunFolder, world: World, *, trust_all: bool) -> RunIdentity:
    """Who the run of a folder is, the same on all ranks, who call it together; a folder without an id gets one.

    A folder whose `config.json` holds no id owns none of the checkpoints that it holds.

    Args:
        folder: of the run.
        world: this process among its peers.
        trust_all: as for `RunIdentity`.
    """
    saved, new = folder.read_config(), False
    known, trusted = saved.get("run_id"), saved.get("trusted_run_ids")
    if not isinstance(known, str) or not re.fullmatch(f"[0-9a-f]{{{2 * BYTES}}}", known):
        new = True
        known, trusted = secrets.token_hex(BYTES), []
    first = int(gather_rows(torch.tensor([int(known, 16)]), world.device)[0])
    others = tuple(str(other) for other in trusted) if isinstance(trusted, list) else ()
    return RunIdentity(run_id=f"{first:0{2 * BYTES}x}", trusted=others, trust_all=trust_all, new=new)
