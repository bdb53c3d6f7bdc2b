"""What `fastmoco data check` found: faults by file, member and reason, and the account of every
sample."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from fastmoco_pipelines.files.whole import write_json
from fastmoco_pipelines.formats.quarantine import CheckedTar, QuarantineEntry, checked_of, entry_of
from fastmoco_pipelines.text import escaped

FORMAT = "fastmoco-check"
VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One thing that is wrong.

    Attributes:
        shard: file name of the tar.
        member: name inside it, escaped; empty where the fault is the tar's or its index's.
        kind: in two or three words, for counting: "damaged image", "stale index", "unsafe name",
            ...
        reason: in a sentence.
        offset: of the member's first byte in the tar, or None.
        outcome: "quarantined" (an index lists it, loaders pass it over), "left out" (no index lists
            it), "lost" (promised and gone), "noted" (no sample suffers), or "allowed for by its
            index" (made with `salvage`, it knows of this damage).
        path: of the tar, or its URL without secrets, where another tar has the same file name; else
            empty.
        file: path of the member's original file below the folder that was packed, escaped; empty
            where it is not known.
    """

    shard: str
    member: str
    kind: str
    reason: str
    offset: int | None = None
    outcome: str = "noted"
    path: str = ""
    file: str = ""

    @classmethod
    def of(
        cls,
        shard: str,
        member: str,
        kind: str,
        reason: str,
        *,
        offset: int | None = None,
        outcome: str = "noted",
        path: str = "",
        file: str = "",
    ) -> Self:
        """A fault whose text, which may be from a tar, is escaped."""
        return cls(
            shard=escaped(shard),
            member=escaped(member),
            kind=kind,
            reason=escaped(reason),
            offset=offset,
            outcome=outcome,
            path=escaped(path),
            file=escaped(file),
        )


@dataclass(slots=True, kw_only=True)
class TarResult:
    """What the check of one tar adds to the report and to the list beside it; the attributes are
    those of `CheckReport`.

    Attributes:
        refused: loaders refuse the tar as it is; `unindexed`: it has no index.
        restarts: decoding processes that ended at work on it.
        entries: of the quarantine list.
        checked: the tar's own line in that list, if its index is of an earlier state of it.
    """

    promised: int = 0
    delivered: int = 0
    quarantined: int = 0
    left_out: int = 0
    refused: bool = False
    unindexed: bool = False
    restarts: int = 0
    faults: list[Fault] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    entries: list[QuarantineEntry] = field(default_factory=list)
    checked: CheckedTar | None = None

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Self:
        """The result that `asdict` made these objects of.

        Raises:
            ValueError, TypeError, KeyError: if they are not those of a result, or do not add up.
        """
        faults = [_fault_of(fault) for fault in content["faults"]]
        entries = [entry_of(entry) for entry in content["entries"]]
        checked = content.get("checked")
        own = None if checked is None else checked_of(checked)
        result = cls(**(content | {"faults": faults, "entries": entries, "checked": own}))
        counts = ("promised", "delivered", "quarantined", "left_out", "restarts")
        if not all(type(getattr(result, name)) is int for name in counts):
            raise TypeError("a count is no whole number")
        if type(result.refused) is not bool or type(result.unindexed) is not bool:
            raise TypeError("a flag is no truth value")
        if not isinstance(result.notes, list) or not all(isinstance(t, str) for t in result.notes):
            raise TypeError("a note is no text")
        if min(getattr(result, name) for name in counts) < 0:
            raise ValueError("a count is negative")
        if result.promised != result.delivered + result.quarantined:
            raise ValueError("promised is not the sum of delivered and quarantined")
        return result


def _fault_of(content: dict[str, Any]) -> Fault:
    fault = Fault(**content)
    texts = {name: value for name, value in content.items() if name != "offset"}
    if not all(isinstance(value, str) for value in texts.values()):
        raise TypeError("a fault is no text")
    if fault.offset is not None and type(fault.offset) is not int:
        raise TypeError("an offset is no whole number")
    return Fault.of(**(texts | {"offset": fault.offset}))


@dataclass(slots=True, kw_only=True)
class CheckReport:
    """The outcome of a check. `promised == delivered + quarantined` holds always; after the check
    of a sample these three, and `left_out`, count what was drawn.

    Attributes:
        pattern: what was checked; `shards`: how many tars; `total_bytes`: their size.
        promised: samples that index or manifest promise; for a tar without either, those that an
            index would list.
        delivered: those that a loader can deliver, once its indexes are in order.
        quarantined: those that it cannot, the lost ones among them.
        left_out: further members that would be samples but that no index lists, for the reason
            given.
        refused_shards: tars that loaders refuse as they are, because index or tar is damaged, and
            the list, if it is written, does not make up for it.
        unindexed: tars without an index, which count as refused too; no fault.
        restarts: decoding processes that ended at work.
        faults: in the order of the shards.
        notes: for people; no faults.
        quarantine_files: lists that were written; `uploads`: the URL where each belongs, for shards
            of a server.
        seconds: the check took.
        sample: images that were drawn and checked; None where everything was. The next five fields
            describe a sample, and are None without one.
        population: images that it was drawn from: those that a fitting index lists.
        sampled_shards: tars with a drawn image.
        seed: of the draw.
        bad: drawn images that are bad.
        bad_share_bound: with 95 % confidence, at most this share of `population` is bad.
    """

    pattern: str
    shards: int = 0
    total_bytes: int = 0
    promised: int = 0
    delivered: int = 0
    quarantined: int = 0
    left_out: int = 0
    refused_shards: int = 0
    unindexed: int = 0
    restarts: int = 0
    faults: list[Fault] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    quarantine_files: list[Path] = field(default_factory=list)
    uploads: list[str] = field(default_factory=list)
    seconds: float = 0.0
    sample: int | None = None
    population: int | None = None
    sampled_shards: int | None = None
    seed: int | None = None
    bad: int | None = None
    bad_share_bound: float | None = None

    @property
    def clean(self) -> bool:
        """Whether everything was checked, nothing is wrong, and nothing left to do before
        training."""
        return not self.faults and not self.unindexed and self.sample is None

    def counts(self) -> dict[str, int]:
        """Faults by kind, most frequent first."""
        return dict(Counter(fault.kind for fault in self.faults).most_common())

    def take(self, result: TarResult) -> None:
        """Add what was found in one tar."""
        self.promised += result.promised
        self.delivered += result.delivered
        self.quarantined += result.quarantined
        self.left_out += result.left_out
        self.refused_shards += result.refused
        self.unindexed += result.unindexed
        self.restarts += result.restarts
        self.faults += result.faults
        self.notes += result.notes

    def write(self, path: Path) -> Path:
        """Write the report as JSON: the fields of this class, the faults as objects, and `counts`.
        `clean` is null after a sample without faults: the rest may have some."""
        content: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "clean": None if self.sample is not None and not self.faults else self.clean,
            "counts": self.counts(),
        }
        return write_json(
            path,
            content
            | asdict(self)
            | {"quarantine_files": [str(file) for file in self.quarantine_files]},
        )
