"""`index_shards`: indexes for tars that were not packed by fastmoco, with labels numbered over the
whole set."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from fastmoco_pipelines.errors import LabelError, ShardError
from fastmoco_pipelines.files.whole import folder_for, hash_file
from fastmoco_pipelines.formats.index import (
    fits_tar,
    index_path,
    lost_entry,
    read_any_index,
    scan_tar,
    write_index,
    write_json_index,
)
from fastmoco_pipelines.formats.index_file import ShardIndex
from fastmoco_pipelines.formats.labels import (
    Found,
    LabelRule,
    NumberedLabels,
    Source,
    folder_of,
    has_label,
    number_labels,
)
from fastmoco_pipelines.formats.manifest import NAME as MANIFEST
from fastmoco_pipelines.formats.manifest import one_form, own_sets, read_sets, write_sets
from fastmoco_pipelines.formats.members import KeysAt, split_name
from fastmoco_pipelines.making.one_writer import one_writer
from fastmoco_pipelines.sets.folder_sets import is_part, set_name
from fastmoco_pipelines.sets.patterns import expand_shards, is_remote
from fastmoco_pipelines.sets.whole_tars import LocalTars, RemoteTars, whole_names
from fastmoco_pipelines.spec import CacheSpec
from fastmoco_pipelines.stores.retries import Limits
from fastmoco_pipelines.text import counted, escaped, redact

_ORIGIN = "indexed"  # marks the sets of a manifest that were written here


@dataclass(frozen=True, slots=True, kw_only=True)
class LostStretch:
    """A part of a damaged tar in which no member could be found.

    Attributes:
        shard: file name of the tar; `member`: that the damage cut off, escaped, where its name is
            known.
        offset, size: in bytes; a size of 0: the file ends here, and what was to follow is gone.
        reason: what is wrong there.
    """

    shard: str
    member: str
    offset: int
    size: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexReport:
    """What `index_shards` found.

    Attributes:
        shards, samples: how many were indexed.
        skipped: (tar, member, reason) of what was left out; like all tars here by file name, or by
            path where names repeat.
        labels: where the labels come from: "cls", "json", "txt" or None.
        classes: class names by label; empty where the labels are numbers or there are none.
        labelled: samples that have a label.
        note: for people; as a rule empty.
        warnings: sentences about images or labels that are left out; as a rule none.
        lost: what could not be salvaged of damaged tars, in file order.
        gone: (tar, samples) that an older index or the manifest promised of damaged tars and that
            are not found any more.
        uploads: URLs of the places to which the indexes belong, by the folder where they were
            written; of local shards none.
    """

    shards: int
    samples: int
    skipped: tuple[tuple[str, str, str], ...]
    labels: Source | None = None
    classes: tuple[str, ...] = ()
    labelled: int = 0
    note: str = ""
    warnings: tuple[str, ...] = ()
    lost: tuple[LostStretch, ...] = ()
    gone: tuple[tuple[str, int], ...] = ()
    uploads: dict[Path, str] = field(default_factory=dict)


def index_shards(
    pattern: str,
    progress: Callable[[int, int], None] | None = None,
    *,
    rule: LabelRule | None = None,
    salvage: bool = False,
    out: Path | None = None,
    cache: CacheSpec | None = None,
    transfers: Limits | None = None,
    json: bool = False,
    tell: Callable[[str], None] | None = None,
    keys: KeysAt = "first-dot",
) -> IndexReport:
    """Write the index of every shard; for tars that were not made by `fastmoco data pack`.

    Class names are sorted, numbered and kept in `manifest.json`; numbers are taken as they are.

    Args:
        pattern: as for `ShardSet.open`.
        progress: called with (shards done, shards in all).
        rule: where labels come from.
        salvage: index what is left of damaged tars, and report what is lost.
        out: folder for the indexes and the manifest of shards of a server; needed for these, and
            for these alone.
        cache: where copies of them are kept; None: the default folder and size.
        transfers: times and tries of each transfer.
        json: also write every index in its JSON form, for other programs.
        keys: where the key of a member ends in its file name: at the first dot, as webdataset has
            it, or at the last one, for names with dots of their own.
        tell: gets sentences about waiting for another process, and about what a killed one left.

    The sets of a folder are indexed together, so that they number their classes alike. One process
    at a time writes into a folder.

    Raises:
        ShardError: naming a tar that is damaged, holds no image or has labels that cannot be read,
            after all others have been indexed; or for class names that do not fit those of the
            folder's other sets; or, before anything is written, if `rule` names a source and no
            image of the set has a label there.
        ValueError: if the pattern names no shard, or `out` does not fit it.
    """
    if not is_remote(pattern):
        if out is not None:
            raise ValueError(
                f"out={str(out)!r}: is for shards of a server; the index of a local tar is beside "
                "it"
            )
        with ExitStack() as alone:
            # The tars may be others once the folders are this process's alone.
            for folder in sorted({path.parent for path in _expanded(pattern)}):
                alone.enter_context(one_writer(folder, f"data index {pattern}", tell))
            tars = LocalTars(pattern, several=True)
            return _index(tars, progress, rule or LabelRule(), salvage, json, keys)
    if out is None:
        raise ValueError(
            f"shards={redact(pattern)!r}: nothing is written to a server: give a folder for the "
            "indexes (--out FOLDER), and copy what is in it beside the shards afterwards"
        )
    task = f"data index {redact(pattern)}"
    limits = transfers or Limits()
    with (
        folder_for(out),
        one_writer(out, task, tell),
        closing(RemoteTars(pattern, out, cache or CacheSpec(), limits, indexes=False)) as remote,
    ):
        report = _index(remote, progress, rule or LabelRule(), salvage, json, keys)
        return replace(report, uploads={folder: redact(url) for folder, url in remote.urls.items()})


def _expanded(pattern: str) -> list[Path]:
    return expand_shards(pattern, several=True, moving=True)


def _index(
    tars: LocalTars | RemoteTars,
    progress: Callable[[int, int], None] | None,
    rule: LabelRule,
    salvage: bool,
    json: bool,
    keys: KeysAt,
) -> IndexReport:
    found: dict[Path, list[Found]] = {}
    left_out = 0
    shared: list[str] = []
    shared_keys = 0
    folders: set[str] = set()
    hashes: dict[Path, str] = {}
    samples = 0
    skipped = []
    failures = []
    lost: list[LostStretch] = []
    gone: list[tuple[str, int]] = []
    damaged: list[Path] = []

    names = whole_names(tars)
    # Not written unless the source that was asked for contains a label.
    held: dict[Path, ShardIndex] = {}
    labelled = rule.source in ("auto", "none")

    # Every tar is read once; its index is written as soon as labels need no other tar.
    for number, path in enumerate(tars.paths):
        name = names.get(path, path.name)
        with tars.at_hand(number):
            try:
                scan = scan_tar(path, rule, salvage=salvage, keys=keys)
                index, raw, damages = scan.index, scan.found, scan.damages
                index = _with_older_paths(path, index)
                missing = _gone(path, index) if damages else 0
            except ShardError as error:
                failures.append(ShardError(str(error).replace(path.name, name, 1)))
                continue
            if isinstance(tars, RemoteTars):  # it is gone when the manifest is written
                hashes[path] = hash_file(path)
        found[path] = raw
        held[path] = index
        damaged += [path] if damages else []
        left_out += scan.left_out
        shared += scan.shared[:1]
        shared_keys += len(scan.shared)
        folders |= {one_form(folder_of(key)) for key in index.keys}
        if labelled := labelled or has_label(raw):
            for ready in list(held):  # final already if the labels are numbers
                _label(ready, held.pop(ready), number_labels([found[ready]], rule).labels[0])
        samples += len(index)
        losses = {lost_entry(damage) for damage in damages}
        skipped += [(name, *entry) for entry in index.skipped if entry not in losses]
        lost += [
            LostStretch(
                shard=name,
                member=escaped(damage.member),
                offset=damage.position or 0,
                size=damage.lost,
                reason=escaped(damage.reason),
            )
            for damage in damages
        ]
        gone += [(name, missing)] if missing else []
        if progress is not None:
            progress(number + 1, len(tars.paths))

    if held:  # To continue would drop the labels of an earlier index.
        raise ShardError(rule.nothing_found(samples))

    # Class names are numbered over the whole set: some indexes change.
    numbered = _number(found, rule)
    for (path, raw), labels in zip(found.items(), numbered.labels, strict=True):
        if labels != number_labels([raw], rule).labels[0]:
            _label(path, read_any_index(path), labels)
    if json:
        for path in found:
            write_json_index(path, read_any_index(path))
    sizes = dict(zip(tars.paths, tars.sizes, strict=True))
    _write_manifests(list(found), numbered, sizes, hashes)
    counts = {path: len(raw) for path, raw in found.items()}
    _correct_packed(counts, damaged, sizes, hashes)

    # A damaged tar is reported after the others have been indexed.
    if failures:
        more = (
            f" And {len(failures) - 1} more of the {len(tars.paths)} tars failed."
            if len(failures) > 1
            else ""
        )
        raise ShardError(f"{failures[0]}{more}") from failures[0]
    return IndexReport(
        shards=len(tars.paths),
        samples=samples,
        skipped=tuple(skipped),
        labels=numbered.source,
        classes=numbered.classes,
        labelled=sum(label >= 0 for labels in numbered.labels for label in labels),
        note=numbered.note or _folders_note(numbered, rule, folders),
        warnings=(
            *_left_out(samples, left_out, shared_keys, shared),
            *_bad_labels([names.get(path, path.name) for path in found], numbered),
        ),
        lost=tuple(lost),
        gone=tuple(gone),
    )


def _left_out(samples: int, left_out: int, shared_keys: int, shared: list[str]) -> list[str]:
    """What is to be said about images that the indexes do not list."""
    said = []
    if shared_keys:
        member = escaped(shared[0])
        said.append(
            f"{shared_keys} of {samples + left_out} images are left out because they share a key "
            "with another one: by webdataset's rule a key ends at the first dot of the file name, "
            f"and that of {member} is {split_name(member)[0]}; --keys last-dot ends it at the last "
            "dot"
        )
    if left_out > samples:
        said.append(f"most of the images are left out: {left_out} of {samples + left_out}")
    return said


def _bad_labels(names: Sequence[str], numbered: NumberedLabels) -> list[str]:
    """What is to be said about texts that are no labels."""
    faults = [
        f"{name}: {fault}"
        for name, of_tar in zip(names, numbered.faults, strict=True)
        for fault in of_tar
    ]
    if not faults:
        return []
    what = "1 text is no label" if len(faults) == 1 else f"{len(faults)} texts are no labels"
    return [f"{what}, and such images have none: {escaped(faults[0])}"]


def _folders_note(numbered: NumberedLabels, rule: LabelRule, folders: set[str]) -> str:
    if numbered.source is not None or rule.source != "auto" or len(folders - {""}) < 2:
        return ""
    some = ", ".join(escaped(folder) for folder in sorted(folders - {""})[:3])
    return (
        f"the images are in {len(folders)} folders ({some}, ...): --labels folder makes their "
        "names the classes"
    )


def _gone(path: Path, index: ShardIndex) -> int:
    """Samples of a damaged tar that an older index or the manifest knows, and the new index does
    not.

    Raises:
        ShardError: if the older index was made for these very bytes, while they were whole: it is
            the better one.
    """
    listed = (shard for entry in read_sets(path.parent).values() for shard in entry["shards"])
    counts = [shard.get("samples") for shard in listed if shard["name"] == path.name]
    promised = max((count - len(index) for count in counts if isinstance(count, int)), default=0)
    try:
        old = read_any_index(path)
    except ShardError:
        return max(0, promised)
    if old.tar != path.name:
        return max(0, promised)
    missing = len(_rows(old) - _rows(index))
    if missing and fits_tar(old, path):
        raise ShardError(
            f"{path.name}: its index knows {counted(missing, 'sample')} more than can be found now: keep it, "
            "and let `fastmoco data check` find which of them are damaged. To salvage all the "
            f"same, delete {index_path(path).name} first."
        )
    return max(promised, missing)


def _with_older_paths(path: Path, index: ShardIndex) -> ShardIndex:
    """The index with the paths that an older one beside the tar has for the same images, where the
    tar itself has no list of them any more: of a salvaged tar the end may be lost."""
    if index.paths is not None:
        return index
    try:
        old = read_any_index(path)
    except ShardError:
        return index
    if old.paths is None:
        return index
    known = dict(zip(_places(old), old.paths, strict=True))
    if not known.keys() & set(_places(index)):
        return index
    paths = [known.get(place, index.member(row)) for row, place in enumerate(_places(index))]
    return replace(index, paths=paths)


def _rows(index: ShardIndex) -> set[tuple[int, int, int]]:
    return set(_places(index))


def _places(index: ShardIndex) -> list[tuple[int, int, int]]:
    columns = (index.columns[name] for name in ("offset", "size", "crc32"))
    return list(zip(*columns, strict=True))


def _label(path: Path, index: ShardIndex, labels: list[int]) -> None:
    index.columns["label"] = labels
    write_index(path, index)


def _number(found: dict[Path, list[Found]], rule: LabelRule) -> NumberedLabels:
    """Labels over all tars, by the numbering that other sets of the same folders have."""
    names = {path.name for path in found}
    known: tuple[str, ...] = ()
    for folder in sorted({path.parent for path in found}):
        for entry in read_sets(folder).values():
            if entry["classes"] and not names & {shard["name"] for shard in entry["shards"]}:
                known = tuple(entry["classes"])
    try:
        return number_labels(list(found.values()), rule, known)
    except LabelError as error:
        raise ShardError(str(error)) from error


def _write_manifests(
    paths: Sequence[Path], numbered: NumberedLabels, sizes: dict[Path, int], hashes: dict[Path, str]
) -> None:
    """Class names, and the counts of sets that were indexed with class names before."""
    labels = dict(zip(paths, numbered.labels, strict=True))
    for folder, group in groupby(sorted(paths), key=lambda path: path.parent):
        tars = list(group)
        names = {path.name for path in tars}
        sets = own_sets(folder) if numbered.classes else read_sets(folder)
        old = {
            name
            for name, entry in sets.items()
            if _is_from_here(entry) and names & {shard["name"] for shard in entry["shards"]}
        }
        if not numbered.classes and not old:
            continue
        for name in old:
            del sets[name]
        for name, part in _parts(tars).items() if numbered.classes else ():
            if name in sets:
                raise ShardError(
                    f"{folder / MANIFEST}: has another set {name!r}: index its shards together "
                    "with these."
                )
            sets[name] = _entry(part, [labels[path] for path in part], numbered, sizes, hashes)
        write_sets(folder, sets)


def _correct_packed(
    counts: dict[Path, int],
    damaged: Sequence[Path],
    sizes: dict[Path, int],
    hashes: dict[Path, str],
) -> None:
    """The entries of tars in the manifests of packed sets, where a tar was salvaged or is another
    than the one that is listed: what it holds now, so that a loader takes it for that shard.
    `counts`: samples of each tar."""
    for folder, group in groupby(sorted(counts), key=lambda path: path.parent):
        sets = read_sets(folder)
        listed = {
            shard["name"]: (shard.get("samples"), shard.get("bytes"))
            for entry in sets.values()
            for shard in entry["shards"]
        }
        salvaged = {
            path.name: path
            for path in group
            if path.name in listed
            and (path in damaged or listed[path.name] != (counts[path], sizes[path]))
        }
        packed = [entry for entry in sets.values() if not _is_from_here(entry)]
        packed = [e for e in packed if salvaged.keys() & {shard["name"] for shard in e["shards"]}]
        for entry in packed:
            labels: Counter[int] = Counter()
            for shard in entry["shards"]:
                path = salvaged.get(shard["name"])
                with suppress(ShardError):
                    labels.update(read_any_index(folder / shard["name"]).columns["label"])
                if path is not None:
                    shard["samples"] = counts[path]
                    shard["bytes"] = sizes[path]
                    shard["sha256"] = hashes.get(path) or hash_file(path)
            entry["samples"] = sum(shard.get("samples") or 0 for shard in entry["shards"])
            entry["class_counts"] = [labels[label] for label in range(len(entry["classes"]))]
        if packed:
            write_sets(folder, sets)


def _parts(tars: Sequence[Path]) -> dict[str, list[Path]]:
    """The tars of a folder by set: those named like parts, such as train and test, apart."""
    first = set_name(tars[0].name) or "shards"
    parts: dict[str, list[Path]] = {}
    for path in tars:
        name = set_name(path.name)
        parts.setdefault(name if is_part(name) else first, []).append(path)
    return parts


def _is_from_here(entry: dict[str, Any]) -> bool:
    options = entry.get("options")
    return isinstance(options, dict) and options.get(_ORIGIN) is True


def _entry(
    tars: Sequence[Path],
    labels: Sequence[list[int]],
    numbered: NumberedLabels,
    sizes: dict[Path, int],
    hashes: dict[Path, str],
) -> dict[str, Any]:
    counts = Counter(label for tar in labels for label in tar)
    shards = []
    for path, of_tar in zip(tars, labels, strict=True):
        sha256 = hashes.get(path) or hash_file(path)
        shards.append(
            {"name": path.name, "samples": len(of_tar), "bytes": sizes[path], "sha256": sha256}
        )
    return {
        "samples": sum(map(len, labels)),
        "classes": list(numbered.classes),
        "class_counts": [counts[label] for label in range(len(numbered.classes))],
        "shards": shards,
        "skipped": [],
        "options": {_ORIGIN: True, "labels": numbered.source},
    }
