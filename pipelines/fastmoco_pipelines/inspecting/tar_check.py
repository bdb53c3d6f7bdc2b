"""The check of one tar: walked strictly, compared with its index and the manifest, its images
decoded in a child process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fastmoco_pipelines.errors import ShardError, TarError
from fastmoco_pipelines.formats.images import EXTENSIONS
from fastmoco_pipelines.formats.index import (
    fits_tar,
    index_path,
    json_path,
    lost_entry,
    read_any_index,
)
from fastmoco_pipelines.formats.index_file import ShardIndex
from fastmoco_pipelines.formats.manifest import NAME as MANIFEST
from fastmoco_pipelines.formats.members import TarContent, group_members, split_name
from fastmoco_pipelines.formats.quarantine import Quarantine
from fastmoco_pipelines.formats.tar import walk_damaged
from fastmoco_pipelines.inspecting.decode_pool import Decoded, DecodePool, Item
from fastmoco_pipelines.inspecting.report import CheckReport


@dataclass(slots=True)
class _Candidate:
    """An image to decode: `row` is its place in the index, None where none lists it."""

    key: str
    extension: str
    item: Item
    row: int | None


@dataclass(slots=True)
class TarCheck:
    """The check of one tar, which adds to a report and a list.

    Attributes:
        path: of the tar.
        promise: samples that the manifest promises, or None.
        report, quarantine: what is added to.
        place: full name of the tar, if another one has the same file name; else empty.
    """

    path: Path
    promise: int | None
    report: CheckReport
    quarantine: Quarantine
    place: str = ""
    index: ShardIndex | None = None
    fits: bool = False
    promised: int = 0
    delivered: int = 0
    quarantined: int = 0
    left_out: int = 0
    refused: bool = field(default=False)

    def run(self, pool: DecodePool, advance: Callable[[Item], None]) -> None:
        """Check it; `advance` is called, in any thread, as each image is done."""
        members, damages = walk_damaged(self.path)
        content = group_members(members)
        self._look_at_index(content)
        candidates = self._candidates(content)
        results = pool.run([candidate.item for candidate in candidates], advance)
        listed = {candidate.item.offset for candidate in candidates}
        for candidate, decoded in zip(candidates, results, strict=True):
            self._judge(candidate, decoded)
        self._look_at_names(
            content, listed, {split_name(damage.member)[0] for damage in damages if damage.member}
        )
        self._look_at_damages(damages)
        if not (content.samples or damages):
            self._fault("", "empty tar", "it holds no sample")
            self.refused = True
        self._keep_promise()
        report = self.report
        report.promised += self.promised
        report.delivered += self.delivered
        report.quarantined += self.quarantined
        report.left_out += self.left_out
        report.refused_shards += self.refused

    def _fault(
        self, member: str, kind: str, reason: str, offset: int | None = None, outcome: str = "noted"
    ) -> None:
        self.report.add(
            self.path.name, member, kind, reason, offset=offset, outcome=outcome, path=self.place
        )

    def _look_at_index(self, content: TarContent) -> None:
        """Find out whether the index is of this tar: fully, of an earlier state of it, or of
        another one."""
        try:
            index = read_any_index(self.path)
        except ShardError as error:
            self.refused = True
            if index_path(self.path).exists() or json_path(self.path).exists():
                self._fault("", "broken index", str(error))
            else:
                self.report.unindexed += 1
                named = str(error).replace(self.path.name, self.place or self.path.name, 1)
                self.report.notes.append(f"{named} Until then only this check can read it.")
            return

        self.fits = fits_tar(index, self.path)
        if self.fits:
            self.index = index
            return
        self.refused = True

        # A stale index: of an earlier state if it lists half of the images at their places.
        places = set(zip(index.columns["offset"], index.columns["size"], index.keys, strict=True))
        tried = [
            (s.image.offset, s.image.size, s.key)
            for s in content.samples
            if s.image is not None and not s.kind
        ]
        known = sum(place in places for place in tried)
        # Without images there is nothing to compare: the name decides.
        if index.tar == self.path.name and 2 * known >= len(tried):
            self.index = index
            what = (
                "was made for an earlier state of this tar; it still lists the samples that are "
                "lost"
            )
        else:
            what = (
                f"was made for another tar ({index.tar}) or a state that this one has nothing to "
                "do with; it is ignored"
            )
        self._fault(
            "",
            "stale index",
            f"{index_path(self.path).name} {what}: run `fastmoco data index` on the shards",
        )

    def _candidates(self, content: TarContent) -> list[_Candidate]:
        path = str(self.path)
        candidates = []
        if self.index is not None:
            columns = self.index.columns
            places = zip(
                self.index.keys,
                self.index.extensions,
                columns["offset"],
                columns["size"],
                strict=True,
            )
            for row, (key, extension, offset, size) in enumerate(places):
                item = Item(path, offset, size, columns["crc32"][row])
                candidates.append(_Candidate(key, extension, item, row))
        known = {candidate.item.offset for candidate in candidates}
        for sample in content.samples:
            image = sample.image
            if image is not None and not sample.kind and image.offset not in known:
                candidates.append(
                    _Candidate(
                        sample.key, sample.extension, Item(path, image.offset, image.size), None
                    )
                )
        return candidates

    def _judge(self, candidate: _Candidate, decoded: Decoded) -> None:
        kind = decoded.kind
        reason = decoded.reason
        if candidate.row is not None and self.index is not None and not kind:
            size = (
                self.index.columns["height"][candidate.row],
                self.index.columns["width"][candidate.row],
            )
            if decoded.shape != size:
                kind = "wrong index"
                reason = (
                    f"its header declares another size than the index, {size[1]}x{size[0]} pixels"
                )
        if candidate.row is None and self.fits and not kind:
            kind = "not indexed"
            reason = (
                "is a good image that the index does not list: run `fastmoco data index` on the "
                "shards"
            )

        # The account: an image counts if an index lists it, or would list it.
        counted = candidate.row is not None or (not self.fits and decoded.listed)
        self.promised += counted
        self.delivered += counted and not kind
        self.quarantined += counted and bool(kind)
        self.left_out += not counted
        if not kind:
            return
        item = candidate.item

        outcome = "quarantined" if counted else "left out"
        self._fault(f"{candidate.key}.{candidate.extension}", kind, reason, item.offset, outcome)
        crc32 = item.crc32 if item.crc32 is not None else decoded.crc32
        if counted and crc32 is not None:
            self.quarantine.add(
                shard=self.path.name,
                key=candidate.key,
                extension=candidate.extension,
                offset=item.offset,
                size=item.size,
                crc32=crc32,
                reason=reason,
            )

    def _look_at_names(self, content: TarContent, listed: set[int], cut: set[str]) -> None:
        """Samples that cannot be used by their names; not those that the index lists or a damage
        accounts for."""
        known = cut.union(self.index.keys if self.index is not None else ())
        for sample in content.samples:
            counted = sample.key in known if sample.image is None else sample.image.offset in listed
            if sample.kind and not counted:
                offset = None if sample.image is None else sample.image.offset
                self.left_out += 1
                self._fault(sample.member, sample.kind, sample.fault, offset, "left out")
        for key in content.scattered:
            self._fault(
                key,
                "scattered sample",
                "its members are not adjacent: readers that stream lose it",
            )

    def _look_at_damages(self, damages: Sequence[TarError]) -> None:
        allowed = self.index.skipped if self.index is not None and self.fits else []
        for damage in damages:
            outcome = "allowed for by its index" if lost_entry(damage) in allowed else "noted"
            self._fault("", "damaged tar", str(damage), damage.position, outcome)
            extension = split_name(damage.member)[1].rpartition(".")[2].lower()
            if self.index is None and extension in EXTENSIONS:
                self.left_out += 1
                self._fault(
                    damage.member, "cut off", "the tar ends inside it", damage.position, "left out"
                )

    def _keep_promise(self) -> None:
        """What the manifest promises and nothing else accounts for is lost."""
        if self.promise is None or self.promise == self.promised:
            return
        lost = self.promise - self.promised
        self._fault(
            "",
            "lost samples" if lost > 0 else "wrong manifest",
            f"{MANIFEST} promises {self.promise} samples, {self.promised} are known",
            outcome="lost" if lost > 0 else "noted",
        )
        if lost > 0:
            self.promised += lost
            self.quarantined += lost
            self.left_out = max(0, self.left_out - lost)
