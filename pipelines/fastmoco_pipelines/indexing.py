"""`index_shards`: indexes for tars that nobody packed with fastmoco, with labels numbered over the whole set."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from fastmoco_pipelines.index import ShardError, ShardIndex, read_any_index, scan_tar, write_index
from fastmoco_pipelines.labels import LabelError, LabelRule, NumberedLabels, RawLabel, Source, number_labels
from fastmoco_pipelines.manifest import NAME as MANIFEST
from fastmoco_pipelines.manifest import read_sets, write_sets

_ORIGIN = "indexed"  # marks the sets of a manifest that were written here


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexReport:
    """What ``index_shards`` found.

    Attributes:
        shards, samples: how many were indexed.
        skipped: (tar, member, reason) of what was left out.
        labels: where the labels come from: "cls", "json", "txt" or None.
        classes: class names by label; empty where the labels are numbers or there are none.
        labelled: samples that have a label.
        note: for people; as a rule empty.
    """

    shards: int
    samples: int
    skipped: tuple[tuple[str, str, str], ...]
    labels: Source | None = None
    classes: tuple[str, ...] = ()
    labelled: int = 0
    note: str = ""


def index_shards(
    pattern: str, progress: Callable[[int, int], None] | None = None, *, rule: LabelRule | None = None
) -> IndexReport:
    """Write the index of every shard; for tars that were not made by ``fastmoco data pack``.

    Class names are sorted, numbered and kept in ``manifest.json``; numbers are taken as they are.

    Args:
        pattern: as for ``expand_shards``.
        progress: called with (shards done, shards in all).
        rule: where labels come from.

    Raises:
        ShardError: naming a tar that is damaged, holds no image or has labels that cannot be read, after all others
            have been indexed; or for class names that do not fit those of the folder's other sets.
        ValueError: if the pattern names no shard.
    """
    from fastmoco_pipelines.shards import expand_shards  # shards.py reads what this file writes

    rule = rule or LabelRule()
    paths = expand_shards(pattern)
    found: dict[Path, list[dict[Source, RawLabel]]] = {}
    samples, skipped, failures = 0, [], []
    for done, path in enumerate(paths, start=1):
        try:
            index, found[path] = scan_tar(path, rule)
        except ShardError as error:
            failures.append(error)
            continue
        _label(path, index, number_labels([found[path]], rule).labels[0])  # right already where labels are numbers
        samples += len(index)
        skipped += [(path.name, member, reason) for member, reason in index.skipped]
        if progress is not None:
            progress(done, len(paths))
    numbered = _number(found, rule)
    for (path, raw), labels in zip(found.items(), numbered.labels, strict=True):
        if labels != number_labels([raw], rule).labels[0]:
            _label(path, read_any_index(path), labels)
    _write_manifests(list(found), numbered)
    if failures:
        more = f" And {len(failures) - 1} more of the {len(paths)} tars failed." if len(failures) > 1 else ""
        raise ShardError(f"{failures[0]}{more}") from failures[0]
    return IndexReport(
        shards=len(paths),
        samples=samples,
        skipped=tuple(skipped),
        labels=numbered.source,
        classes=numbered.classes,
        labelled=sum(label >= 0 for labels in numbered.labels for label in labels),
        note=numbered.note,
    )


def _label(path: Path, index: ShardIndex, labels: list[int]) -> None:
    index.columns["label"] = labels
    write_index(path, index)


def _number(found: dict[Path, list[dict[Source, RawLabel]]], rule: LabelRule) -> NumberedLabels:
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


def _write_manifests(paths: Sequence[Path], numbered: NumberedLabels) -> None:
    """Class names, and the counts of sets that were indexed with class names before."""
    labels = dict(zip(paths, numbered.labels, strict=True))
    for folder, group in groupby(sorted(paths), key=lambda path: path.parent):
        tars = list(group)
        names = {path.name for path in tars}
        sets = read_sets(folder)
        old = {
            name
            for name, entry in sets.items()
            if _is_from_here(entry) and names & {shard["name"] for shard in entry["shards"]}
        }
        if not numbered.classes and not old:
            continue
        if not sets and (folder / MANIFEST).exists():
            raise ShardError(
                f"{folder / MANIFEST}: was written by another program, and the class names need this place: move it "
                "away, or index with --labels none."
            )
        for name in old:
            del sets[name]
        if numbered.classes:
            name = re.sub(r"[-_.]?\d+$", "", tars[0].stem) or "shards"
            if name in sets:
                raise ShardError(
                    f"{folder / MANIFEST}: has another set {name!r}: index its shards together with these."
                )
            sets[name] = _entry(tars, [labels[path] for path in tars], numbered)
        write_sets(folder, sets)


def _is_from_here(entry: dict[str, Any]) -> bool:
    options = entry.get("options")
    return isinstance(options, dict) and options.get(_ORIGIN) is True


def _entry(tars: Sequence[Path], labels: Sequence[list[int]], numbered: NumberedLabels) -> dict[str, Any]:
    counts = Counter(label for tar in labels for label in tar)
    shards = []
    for path, of_tar in zip(tars, labels, strict=True):
        with open(path, "rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        shards.append({"name": path.name, "samples": len(of_tar), "bytes": path.stat().st_size, "sha256": sha256})
    return {
        "samples": sum(map(len, labels)),
        "classes": list(numbered.classes),
        "class_counts": [counts[label] for label in range(len(numbered.classes))],
        "shards": shards,
        "skipped": [],
        "options": {_ORIGIN: True, "labels": numbered.source},
    }
