"""Labels of shards that other programs packed: read from `.cls`, `.json` or `.txt` beside the
image, or none.

Numbers are taken as they are. Words are class names: they are sorted and numbered over the whole
set at once, and the manifest keeps the names. Captions are no labels: text of several lines, or
nearly every sample with words of its own.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from fastmoco_pipelines.errors import LabelError
from fastmoco_pipelines.formats.manifest import one_form
from fastmoco_pipelines.formats.members import TarSample
from fastmoco_pipelines.formats.tar import TarMember

Source = Literal["cls", "json", "txt"]
RawLabel = int | str | None
"""A number, a class name, or nothing."""

SOURCES: tuple[Source, ...] = ("cls", "json", "txt")
MAX_NAME = 100
"""Longest class name, in characters."""
_MAX_TEXT = {"cls": 64, "json": 1 << 20, "txt": 4 * MAX_NAME + 2}
_LIMIT = 10**9
_CAPTION = "\n"  # any text that is no class name


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelRule:
    """Where labels come from.

    Attributes:
        source: "cls", "json" or "txt" beside each image, "none", or "auto": the first of these
            three that the set has.
        field: of a `.json`: a whole number or a class name.
    """

    source: Literal["auto", "cls", "json", "txt", "none"] = "auto"
    field: str = "label"

    def reads(self, source: Source) -> bool:
        """Whether members of this extension are looked into."""
        return self.source in ("auto", source)

    def nothing_found(self, images: int) -> str:
        """The error if no image of the set has a label in the source that was asked for."""
        what = (
            f"a .json beside it with the field {self.field!r}"
            if self.source == "json"
            else f"a .{self.source} beside it"
        )
        return (
            f"labels={self.source!r}: none of the {images} images has {what} with a label, and no "
            "index was written: --labels auto looks at .cls, .json and .txt, --labels none "
            "indexes without labels"
        )


def read_labels(descriptor: int, sample: TarSample, rule: LabelRule) -> dict[Source, RawLabel]:
    """The labels beside an image, by source; sources that are absent or empty are left out.

    Args:
        descriptor: the open tar.

    Raises:
        LabelError: naming the member, for a text that the rule asks for and that is no label.
    """
    found: dict[Source, RawLabel] = {}
    for source in SOURCES:
        member = sample.texts.get(source)
        if member is None or not rule.reads(source):
            continue
        text = os.pread(descriptor, min(member.size, _MAX_TEXT[source] + 1), member.offset)
        label: RawLabel = None
        if source == "cls":
            label = _number(member, text)
        elif source == "json":
            label = _field(member, text, rule)
        else:
            label = _words(text.decode("utf-8", "replace"))
            if label == _CAPTION and rule.source == "txt":
                raise LabelError(
                    f"{member.name}: a label is a number or a class name of one line of at most "
                    f"{MAX_NAME} characters"
                )
        if label is not None:
            found[source] = label
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class NumberedLabels:
    """Labels of a whole set.

    Attributes:
        source: where they come from, or None.
        labels: one list a tar, one label a sample, -1 = none.
        classes: class names by label; empty where the labels are numbers.
        note: for people, if texts were skipped; else empty.
    """

    source: Source | None
    labels: list[list[int]]
    classes: tuple[str, ...]
    note: str


def number_labels(
    found: Sequence[Sequence[dict[Source, RawLabel]]], rule: LabelRule, known: tuple[str, ...] = ()
) -> NumberedLabels:
    """Choose one source for the whole set and turn its labels into numbers.

    Args:
        found: for each tar, for each sample: what `read_labels` gave.
        known: class names that other sets of the same folder number already.

    Raises:
        LabelError: for class names that `known` lacks.
    """
    source: Source | None = None
    note = ""
    for candidate in SOURCES:
        if source is None and any(candidate in sample for tar in found for sample in tar):
            values = [sample[candidate] for tar in found for sample in tar if candidate in sample]
            if rule.source == candidate or candidate != "txt" or not _captions(values):
                source = candidate
            else:
                note = (
                    "the .txt members look like captions, not labels: no labels (--labels txt "
                    "takes them as names)"
                )
    if source is None:
        return NumberedLabels(
            source=None, labels=[[-1] * len(tar) for tar in found], classes=(), note=note
        )

    # Numbers are taken as they are.
    raw = [[sample.get(source) for sample in tar] for tar in found]
    given = {value for tar in raw for value in tar if value is not None}
    if all(isinstance(value, int) for value in given):
        return NumberedLabels(
            source=source,
            labels=[[value if isinstance(value, int) else -1 for value in tar] for tar in raw],
            classes=(),
            note=note,
        )

    # Class names are numbered in sorted order, or as other sets number them.
    names = {str(value) for value in given}
    if known and not names <= set(known):
        raise LabelError(
            f"classes={sorted(names - set(known))[:3]!r}: not among the {len(known)} classes that "
            "other shards of this folder have: keep sets with different classes in different "
            "folders"
        )
    classes = known or tuple(sorted(names))
    numbers = {name: i for i, name in enumerate(classes)}
    labels = [[-1 if value is None else numbers[str(value)] for value in tar] for tar in raw]
    return NumberedLabels(source=source, labels=labels, classes=classes, note=note)


def _number(member: TarMember, text: bytes) -> int:
    digits = text.strip()
    if not digits.isdigit() or len(digits) > 9:
        raise LabelError(
            f"{member.name}: a label is a whole number from 0 as text, not "
            f"{digits[: _MAX_TEXT['cls']]!r}"
        )
    return int(digits)


def _field(member: TarMember, text: bytes, rule: LabelRule) -> RawLabel:
    """The label in a JSON object. A source that was not given by name may hold anything."""
    try:
        content = json.loads(text) if len(text) <= _MAX_TEXT["json"] else None
    except (ValueError, RecursionError):
        content = None
    value = content.get(rule.field) if isinstance(content, dict) else None
    if type(value) is int and -1 <= value < _LIMIT:
        return None if value == -1 else value
    if isinstance(value, str) and (words := _words(value)) not in (None, _CAPTION):
        return words
    if rule.source == "json" and not (isinstance(content, dict) and value is None):
        raise LabelError(
            f"{member.name}: field {rule.field!r} should hold a whole number from 0 or a class "
            f"name, not {value!a:.60}"
        )
    return None


def _words(text: str) -> RawLabel:
    words = one_form(text.strip())
    if re.fullmatch(r"[0-9]{1,9}", words):
        return int(words)
    if not words:
        return None
    return sys.intern(words) if len(words) <= MAX_NAME and words.isprintable() else _CAPTION


def _captions(values: Sequence[RawLabel]) -> bool:
    words = {value for value in values if isinstance(value, str)}
    return _CAPTION in words or 2 * len(words) > len(values)
