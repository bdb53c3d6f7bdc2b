"""The check of one tar: walked strictly, compared with its index and the manifest, its images
decoded in a child process."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fastmoco_pipelines.errors import ShardError, TarError
from fastmoco_pipelines.formats.images import EXTENSIONS
from fastmoco_pipelines.formats.index import (
    fits_tar,
    index_file,
    index_name,
    lost_entry,
    read_any_index,
    read_paths,
    tar_hash,
)
from fastmoco_pipelines.formats.index_file import CURE, ShardIndex, records_of
from fastmoco_pipelines.formats.manifest import NAME as MANIFEST
from fastmoco_pipelines.formats.members import TarContent, group_members, split_name
from fastmoco_pipelines.formats.quarantine import NAME as LIST
from fastmoco_pipelines.formats.quarantine import CheckedTar, Quarantine, now
from fastmoco_pipelines.formats.tar import walk_damaged
from fastmoco_pipelines.inspecting.report import Fault, TarResult
from fastmoco_pipelines.views.decode_pool import Decoded, DecodePool, Item


@dataclass(slots=True)
class Candidate:
    """An image to decode: `row` is its place in the index and `shape` (height, width) by it; None
    where none lists it. `file` is the path of the original file, empty where it is not known."""

    key: str
    extension: str
    item: Item
    row: int | None = None
    shape: tuple[int, int] | None = None
    file: str = ""


@dataclass(slots=True)
class TarCheck:
    """The check of one tar.

    Attributes:
        path: of the tar.
        promise: samples that the manifest promises, or None.
        place: full name of the tar, if another one has the same file name; else empty.
        index: the index that lists its images, if there is one; `fits`: it is of this state of the
            tar.
        result: what was found; `quarantine`: its entries, each once.
    """

    path: Path
    promise: int | None = None
    place: str = ""
    index: ShardIndex | None = None
    fits: bool = False
    result: TarResult = field(default_factory=TarResult)
    quarantine: Quarantine = field(default_factory=Quarantine)

    def run(self, pool: DecodePool, advance: Callable[[Item], None]) -> TarResult:
        """Check all of it; `advance` is called, in any thread, as each image is done."""
        restarts = pool.restarts
        members, damages = walk_damaged(self.path)
        content = group_members(members)
        self._look_at_index(content)
        candidates = self._candidates(content)
        results = pool.run([candidate.item for candidate in candidates], advance)
        listed = {candidate.item.offset for candidate in candidates}
        for candidate, decoded in zip(candidates, results, strict=True):
            self.judge(candidate, decoded)
        self._look_at_names(
            content, listed, {split_name(damage.member)[0] for damage in damages if damage.member}
        )
        self._look_at_damages(damages)
        if not (content.samples or damages):
            self.fault("", "empty tar", "it holds no sample")
            self.result.refused |= self.index is None
        self._keep_promise()
        self.result.restarts = pool.restarts - restarts
        return self.result

    def candidate(self, row: int) -> Candidate:
        """The image at a place in the index, which must be there."""
        assert self.index is not None  # noqa: S101 - a type: its caller has one
        offset, size, crc32, height, width = (
            int(self.index.columns[name][row])
            for name in ("offset", "size", "crc32", "height", "width")
        )
        item = Item(str(self.path), offset, size, crc32)
        key, extension = self.index.keys[row], self.index.extensions[row]
        file = "" if self.index.paths is None else self.index.paths[row]
        return Candidate(key, extension, item, row, (height, width), file)

    def fault(
        self,
        member: str,
        kind: str,
        reason: str,
        offset: int | None = None,
        outcome: str = "noted",
        file: str = "",
    ) -> None:
        """Note a fault of the tar or of a member."""
        self.result.faults.append(
            Fault.of(
                self.path.name,
                member,
                kind,
                reason,
                offset=offset,
                outcome=outcome,
                path=self.place,
                file=file,
            )
        )

    def _look_at_index(self, content: TarContent) -> None:
        """Find out whether the index is of this tar: fully, of an earlier state of it, or of
        another one."""
        try:
            index = read_any_index(self.path)
        except ShardError as error:
            self.result.refused = True
            if index_file(self.path) is not None:
                self.fault("", "broken index", str(error))
            else:
                self.result.unindexed = True
                named = str(error).replace(self.path.name, self.place or self.path.name, 1)
                self.result.notes.append(f"{named} Until then only this check can read it.")
            return

        self.fits = fits_tar(index, self.path)
        if self.fits:
            self.index = index
            return

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
            self.result.checked = CheckedTar(
                shard=self.path.name,
                tar_bytes=os.path.getsize(self.path),
                tar_hash=tar_hash(self.path),
                records=hashlib.sha256(records_of(index).tobytes()).hexdigest(),
                when=now(),
            )
            what = (
                "was made for an earlier state of this tar; it still lists the samples that are "
                f"lost, and by {LIST} beside it training goes on without them: copy the tar again "
                "from its source to get them back. Only if the tar is to stay as it is, "
                f"{CURE}, for new runs"
            )
        else:
            self.result.refused = True
            what = (
                f"was made for another tar ({index.tar}) or a state that this one has nothing to "
                "do with; it is ignored: copy the tar again from its source, with its index. Only "
                f"if the tar is to stay as it is, {CURE}, for new runs"
            )
        self.fault("", "stale index", f"{index_name(self.path)} {what}")

    def _candidates(self, content: TarContent) -> list[Candidate]:
        path = str(self.path)
        rows = range(len(self.index)) if self.index is not None else ()
        candidates = [self.candidate(row) for row in rows]
        known = {candidate.item.offset for candidate in candidates}
        others = [
            (sample, sample.image)
            for sample in content.samples
            if sample.image is not None and not sample.kind and sample.image.offset not in known
        ]
        # Of what no index lists, the tar itself may know the original files.
        files = (read_paths(self.path, content) if others else None) or {}
        candidates += [
            Candidate(
                sample.key,
                sample.extension,
                Item(path, image.offset, image.size),
                file=files.get(sample.key, ""),
            )
            for sample, image in others
        ]
        return candidates

    def judge(self, candidate: Candidate, decoded: Decoded) -> None:
        """Count an image, and note what is wrong with it."""
        kind = decoded.kind
        reason = decoded.reason
        if candidate.shape is not None and decoded.shape != candidate.shape and not kind:
            height, width = candidate.shape
            kind = "wrong index"
            reason = f"its header declares another size than the index, {width}x{height} pixels"
        if candidate.row is None and self.fits and not kind:
            kind = "not indexed"
            reason = f"is a good image that the index does not list: {CURE}"

        # The account: an image counts if an index lists it, or would list it.
        counted = candidate.row is not None or (not self.fits and decoded.listed)
        self.result.promised += counted
        self.result.delivered += counted and not kind
        self.result.quarantined += counted and bool(kind)
        self.result.left_out += not counted
        if not kind:
            return
        item = candidate.item

        outcome = "quarantined" if counted else "left out"
        member = f"{candidate.key}.{candidate.extension}"
        self.fault(member, kind, reason, item.offset, outcome, candidate.file)
        crc32 = item.crc32 if item.crc32 is not None else decoded.crc32
        if counted and crc32 is not None:
            entry = self.quarantine.add(
                shard=self.path.name,
                key=candidate.key,
                extension=candidate.extension,
                offset=item.offset,
                size=item.size,
                crc32=crc32,
                reason=reason,
                file=candidate.file,
            )
            if entry is not None:
                self.result.entries.append(entry)

    def _look_at_names(self, content: TarContent, listed: set[int], cut: set[str]) -> None:
        """Samples that cannot be used by their names; not those that the index lists or a damage
        accounts for."""
        known = cut.union(self.index.keys if self.index is not None else ())
        for sample in content.samples:
            counted = sample.key in known if sample.image is None else sample.image.offset in listed
            if sample.kind and not counted:
                offset = None if sample.image is None else sample.image.offset
                self.result.left_out += 1
                self.fault(sample.member, sample.kind, sample.fault, offset, "left out")
        for key in content.scattered:
            self.fault(
                key,
                "scattered sample",
                "its members are not adjacent: readers that stream lose it",
            )

    def _look_at_damages(self, damages: Sequence[TarError]) -> None:
        allowed = self.index.skipped if self.index is not None and self.fits else []
        for damage in damages:
            outcome = "allowed for by its index" if lost_entry(damage) in allowed else "noted"
            self.fault("", "damaged tar", str(damage), damage.position, outcome)
            extension = split_name(damage.member)[1].rpartition(".")[2].lower()
            if self.index is None and extension in EXTENSIONS:
                self.result.left_out += 1
                self.fault(
                    damage.member, "cut off", "the tar ends inside it", damage.position, "left out"
                )

    def _keep_promise(self) -> None:
        """What the manifest promises and nothing else accounts for is lost."""
        result = self.result
        lost = self.compare_promise(result.promised)
        if lost > 0:
            result.promised += lost
            result.quarantined += lost
            result.left_out = max(0, result.left_out - lost)

    def compare_promise(self, known: int) -> int:
        """Note a fault where the manifest promises more or fewer samples than are known; returns
        how many more."""
        if self.promise is None or self.promise == known:
            return 0
        lost = self.promise - known
        self.fault(
            "",
            "lost samples" if lost > 0 else "wrong manifest",
            f"{MANIFEST} promises {self.promise} samples, {known} are known",
            outcome="lost" if lost > 0 else "noted",
        )
        return lost
