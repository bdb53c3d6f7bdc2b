"""The identity of a run: it continues from its own checkpoints and from those that the user trusts.

A valid checkpoint of another run, copied into the folder by mistake or planted there, is refused,
because it would silently change the results. The id does not protect from an attacker who can write
the whole folder.
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
"""Length of a run id, which fits into an int64."""


@dataclass(frozen=True, kw_only=True)
class RunIdentity:
    """The id of a run, and the ids of runs whose checkpoints it has taken over.

    Attributes:
        run_id: 14 hexadecimal digits, drawn at the first start of the run and
            stored in its `config.json`.
        trusted: ids of other runs whose checkpoints it may continue from.
        trust_all: whether the user trusts every checkpoint in the folder.
        new: whether the id was drawn at this start.
    """

    run_id: str
    trusted: tuple[str, ...] = ()
    trust_all: bool = False
    new: bool = False

    def admit(self, path: Path, run_id: str) -> None:
        """Refuse a checkpoint of another run.

        Args:
            path: its folder, verified.
            run_id: from its marker; "" if it was saved outside a run.

        Raises:
            RunError: naming the file, both ids and the cure.
        """
        if not self.trust_all and run_id not in (self.run_id, *self.trusted):
            raise RunError(
                f"{path / 'COMMITTED'}: this checkpoint was written by "
                f"{f'run {run_id}' if run_id else 'a run without an id'}, "
                f"and {self._owner(path.parent.parent)}. If you know its origin, add --trust to "
                "continue from it "
                "(its SHA-256 is still checked), or choose another --out"
            )

    def _owner(self, folder: Path) -> str:
        return (
            f"{folder} has no config.json with a run's id"
            if self.new
            else f"{folder} is the folder of run {self.run_id}"
        )

    def taking_over(self, run_id: str) -> RunIdentity:
        """The identity after continuing from a checkpoint of that id, which is
        trusted from then on.
        """
        return (
            self
            if run_id in (self.run_id, *self.trusted)
            else replace(self, trusted=(*self.trusted, run_id))
        )

    def to_json(self) -> dict[str, Any]:
        """The entries of `config.json`."""
        return {"run_id": self.run_id, "trusted_run_ids": list(self.trusted)}


def identify(folder: RunFolder, world: World, *, trust_all: bool) -> RunIdentity:
    """The identity of the run in a folder, equal on all ranks, which call it
    together; draws an id if there is none.

    A folder whose `config.json` has no id owns none of its checkpoints.

    Args:
        folder: of the run.
        world: this process among its peers.
        trust_all: as for `RunIdentity`.
    """
    saved = folder.read_config()
    new = False
    known = saved.get("run_id")
    trusted = saved.get("trusted_run_ids")
    if not isinstance(known, str) or not re.fullmatch(f"[0-9a-f]{{{2 * BYTES}}}", known):
        new = True
        known = secrets.token_hex(BYTES)
        trusted = []
    first = int(gather_rows(torch.tensor([int(known, 16)]), world.device)[0])
    others = tuple(str(other) for other in trusted) if isinstance(trusted, list) else ()
    return RunIdentity(
        run_id=f"{first:0{2 * BYTES}x}", trusted=others, trust_all=trust_all, new=new
    )
