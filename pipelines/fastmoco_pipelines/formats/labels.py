"""Labels of shards that other programs packed: read from `.cls`, `.json` or `.txt` beside the
image, taken from its folder, or none.

Numbers are taken as they are, `3.0` as 3; -1, `nan`, `none`, `null` and nothing mean "no label".
Words are class names: they are sorted and numbered over the whole set at once, and the manifest
keeps the names. Captions are no labels: text of several lines, or nearly every sample with words of
its own. A text that is none of these is a fault: it costs one image its label, and is counted, or
refused where its source was asked for.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fastmoco_pipelines.errors import LabelError
from fastmoco_pipelines.formats.manifest import one_form
from fastmoco_pipelines.formats.members import TarSample
from fastmoco_pipelines.formats.tar import TarMember

Source = Literal["cls", "json", "txt", "folder"]


@dataclass(frozen=True, slots=True)
class NoLabel:
    """A text that is no label.

    Attributes:
        reason: with the name of the member.
        word: a class name, if a whole set of such words is a set of class names; else empty.
    """

    reason: str
    word: str = ""


RawLabel = int | str | NoLabel | None
"""A number, a class name, what should have been one of them, or nothing."""
Found = dict[Source, RawLabel]
"""The labels of one image by source."""

SOURCES: tuple[Source, ...] = ("cls", "json", "txt", "folder")
MAX_NAME = 100
"""Longest class name, in characters."""
MAX_LABEL = 2**24 - 1
"""Largest number of a class: ImageNet-21k has 21,841 classes, the largest sets of faces and of
products some millions. What counts classes has arrays of this length, so that a number in a file
must not choose it."""
_MAX_TEXT = {"cls": 4 * MAX_NAME + 2, "json": 1 << 20, "txt": 4 * MAX_NAME + 2}
_NOTHING = frozenset(("nan", "none", "null"))
_CAPTION = "\n"  # any text that is no class name


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelRule:
    """Where labels come from.

    Attributes:
        source: "cls", "json" or "txt" beside each image, "folder": the name of the folder that the
            image is in, "none", or "auto": the first of cls, json and txt that the set has.
        field: of a `.json`: a whole number or a class name.
    """

    source: Literal["auto", "cls", "json", "txt", "folder", "none"] = "auto"
    field: str = "label"

    def reads(self, source: Source) -> bool:
        """Whether labels of this source are looked for."""
        return source == self.source or (self.source == "auto" and source != "folder")

    def nothing_found(self, images: int) -> str:
        """The error if no image of the set has a label in the source that was asked for."""
        what = {
            "json": f"a .json beside it with the field {self.field!r} with a label",
            "folder": "a folder around it",
        }.get(self.source, f"a .{self.source} beside it with a label")
        return (
            f"labels={self.source!r}: none of the {images} images has {what}, and no "
            "index was written: --labels auto looks at .cls, .json and .txt, --labels none "
            "indexes without labels"
        )


def read_labels(descriptor: int, sample: TarSample, rule: LabelRule) -> Found:
    """The labels beside an image, by source; sources that are absent or empty are left out.

    Args:
        descriptor: the open tar.
    """
    found: Found = {}
    if sample.image is not None and rule.reads("folder"):
        folder = folder_of(sample.image.name)
        if folder and len(folder) <= MAX_NAME:
            found["folder"] = sys.intern(
                one_form(folder)
            )  # as text, as `pack_folder` numbers folders
    for source in SOURCES:
        member = sample.texts.get(source)
        if member is None or not rule.reads(source):
            continue
        text = os.pread(descriptor, min(member.size, _MAX_TEXT[source] + 1), member.offset)
        read = _of_json if source == "json" else _of_text
        label = read(member, text, source, rule)
        if label is not None:
            found[source] = label
    return found


def folder_of(member: str) -> str:
    """Name of the folder that a member is in; empty at the top of a tar."""
    folder = member.rpartition("/")[0].rpartition("/")[2]
    return "" if folder == "." else folder


def has_label(found: Iterable[Found]) -> bool:
    """Whether any of these images has a label in any source."""
    return any(
        not isinstance(label, NoLabel) or label.word
        for sample in found
        for label in sample.values()
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class NumberedLabels:
    """Labels of a whole set.

    Attributes:
        source: where they come from, or None.
        labels: one list a tar, one label a sample, -1 = none.
        classes: class names by label; empty where the labels are numbers.
        note: for people, if texts were skipped; else empty.
        faults: for each tar, why texts are no labels.
    """

    source: Source | None
    labels: list[list[int]]
    classes: tuple[str, ...]
    note: str
    faults: list[list[str]]


def number_labels(
    found: Sequence[Sequence[Found]], rule: LabelRule, known: tuple[str, ...] = ()
) -> NumberedLabels:
    """Choose one source for the whole set and turn its labels into numbers.

    Args:
        found: for each tar, for each sample: what `read_labels` gave.
        known: class names that other sets of the same folder number already.

    Raises:
        LabelError: for class names that `known` lacks.
    """
    source: Source | None = None
    values: list[list[RawLabel]] = []
    note = ""
    for candidate in SOURCES:
        values = _settled([[sample.get(candidate) for sample in tar] for tar in found])
        given = [value for tar in values for value in tar if isinstance(value, int | str)]
        if not given:
            continue
        if rule.source == candidate or candidate != "txt" or not _captions(given):
            source = candidate
            break
        note = "the .txt members look like captions, not labels; --labels txt takes them as names"
    if source is None:
        return NumberedLabels(
            source=None,
            labels=[[-1] * len(tar) for tar in found],
            classes=(),
            note=note,
            faults=[[fault for s in tar for fault in _reasons(s.values())] for tar in found],
        )

    # Numbers are taken as they are.
    faults = [list(_reasons(tar)) for tar in values]
    names = {value for tar in values for value in tar if isinstance(value, str)}
    if not names:
        return NumberedLabels(
            source=source,
            labels=[[value if isinstance(value, int) else -1 for value in tar] for tar in values],
            classes=(),
            note=note,
            faults=faults,
        )

    # Class names are numbered in sorted order, or as other sets number them.
    names |= {str(value) for tar in values for value in tar if isinstance(value, int)}
    if known and not names <= set(known):
        raise LabelError(
            f"classes={sorted(names - set(known))[:3]!r}: not among the {len(known)} classes that "
            "other shards of this folder have: keep sets with different classes in different "
            "folders"
        )
    classes = known or tuple(sorted(names))
    numbers = {name: i for i, name in enumerate(classes)}
    labels = [
        [numbers[str(value)] if isinstance(value, int | str) else -1 for value in tar]
        for tar in values
    ]
    return NumberedLabels(source=source, labels=labels, classes=classes, note=note, faults=faults)


def _settled(values: list[list[RawLabel]]) -> list[list[RawLabel]]:
    """The labels of one source, once the whole set is known: what a word means depends on the
    others."""
    flat = [value for tar in values for value in tar]
    numbers = any(isinstance(value, int) for value in flat)
    words = {value for value in flat if isinstance(value, str)}

    # Among numbers, and alone, such a word means that there is no label.
    if words and all(word.casefold() in _NOTHING for word in words):
        values = [[None if isinstance(value, str) else value for value in tar] for tar in values]
    # Words of a .cls are names where it has no number.
    if not numbers and any(isinstance(value, NoLabel) and value.word for value in flat):
        return [
            [value.word if isinstance(value, NoLabel) and value.word else value for value in tar]
            for tar in values
        ]
    return values


def _reasons(values: Iterable[RawLabel]) -> Iterable[str]:
    return (value.reason for value in values if isinstance(value, NoLabel))


def _of_text(member: TarMember, text: bytes, source: Source, rule: LabelRule) -> RawLabel:
    """The label in a `.cls` or `.txt`."""
    label = _parsed(_decoded(text))
    reason = f"{member.name}: {_no_label(label)}, not {text.strip()[:40]!r}"
    if source == "cls" and isinstance(label, str) and label.casefold() not in _NOTHING:
        return NoLabel(reason, "" if label == _CAPTION or _NUMBER.fullmatch(label) else label)
    # Under `auto` a text of any kind may be beside an image.
    if label == _CAPTION and rule.source == "auto":
        return label
    return NoLabel(reason) if _is_bad(label) else label


def _of_json(member: TarMember, text: bytes, _: Source, rule: LabelRule) -> RawLabel:
    """The label in a JSON object."""
    try:
        content: Any = json.loads(text) if len(text) <= _MAX_TEXT["json"] else None
    except (ValueError, RecursionError):
        return NoLabel(f"{member.name}: is no valid JSON")
    if not isinstance(content, dict):  # a source that was not given by name may hold anything
        reason = f"{member.name}: is no object of JSON with the field {rule.field!r}"
        return NoLabel(reason) if rule.source == "json" else None
    value: Any = content.get(rule.field)
    if isinstance(value, float):
        value = None if math.isnan(value) else int(value) if value.is_integer() else value
    label = _parsed(value) if isinstance(value, str) else value
    if label is None or (type(label) is int and label == -1):
        return None
    if type(label) not in (int, str) or _is_bad(label):
        what = _no_label(label if isinstance(label, int) else None)
        return NoLabel(f"{member.name}: field {rule.field!r}: {what}, not {value!a:.60}")
    return label


def _decoded(text: bytes) -> str:
    """UTF-8, or UTF-16 with its mark, as Windows writes it."""
    utf16 = text.startswith((b"\xff\xfe", b"\xfe\xff"))
    return text.decode("utf-16" if utf16 else "utf-8", "replace").strip("\ufeff\0")


_NUMBER = re.compile(r"[+-]?[0-9]+(\.[0-9]*)?")


def _parsed(text: str) -> int | str | None:
    """A number, words, or nothing; numbers that are no label stay words or are out of range."""
    words = one_form(text.strip())
    if not words or re.fullmatch(r"-1(\.0*)?", words):
        return None
    if number := re.fullmatch(r"\+?([0-9]+)(\.0*)?", words):
        return int(number[1].lstrip("0")[:20] or "0")
    name = len(words) <= MAX_NAME and words.isprintable() and "\ufffd" not in words
    return sys.intern(words) if name else _CAPTION


def _is_bad(label: int | str | None) -> bool:
    if isinstance(label, str):
        return label == _CAPTION or _NUMBER.fullmatch(label) is not None
    return label is not None and not 0 <= label <= MAX_LABEL


def _no_label(label: int | str | None) -> str:
    if isinstance(label, int) and label > MAX_LABEL:
        return f"the largest label is {MAX_LABEL}"
    return f"a label is a whole number from 0, or a class name of at most {MAX_NAME} characters"


def _captions(values: Sequence[int | str]) -> bool:
    words = {value for value in values if isinstance(value, str)}
    return _CAPTION in words or 2 * len(words) > len(values)
