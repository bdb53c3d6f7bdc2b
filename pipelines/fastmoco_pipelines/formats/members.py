"""Members of a tar -> samples: the image and the texts of each key, and what cannot be used by its
name.

Webdataset's rule: the key is the path up to the first dot of the file name, the rest is the
extension. The last part of the extension, in upper or lower case, is the type of the member:
`000123.rgb.JPG` is an image of key `000123`. Names with dots of their own, such as dates, can be
grouped up to their last dot instead; an index keeps whole names, so that nothing else depends on
it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from fastmoco_pipelines.formats.images import EXTENSIONS
from fastmoco_pipelines.formats.paths import MEMBER as PATHS_MEMBER
from fastmoco_pipelines.formats.tar import TarMember, unsafe_name
from fastmoco_pipelines.text import escaped

KeysAt = Literal["first-dot", "last-dot"]
"""Where the key of a member ends in its file name."""
TEXTS = ("cls", "json", "txt")
"""Extensions of members that may contain a label."""
TAR_EXTENSIONS = (*EXTENSIONS, "image", "img")
"""Extensions of images in tars; their content decides."""
FOREIGN_EXTENSIONS = (
    "gif",
    "avif",
    "heic",
    "heif",
    "tif",
    "tiff",
    "bmp",
    "jp2",
    "j2k",
    "jxl",
    "ppm",
    "pgm",
    "svg",
    "ico",
)
"""Images by their name, of formats that are not read."""
_PLAIN = re.compile(r"(?:[\w-]+/)*[\w-]+(?:\.\w+)+")
"""Names of images without anything unusual; others are looked at one by one."""
SECOND_IMAGE = "a second image of the same key"
NO_IMAGE_NAME = "no image by its name"
SHARED_KEY = f"{SECOND_IMAGE}, which ends at the first dot"
TWICE = f"{SECOND_IMAGE}: its name comes twice in the tar"
_CURES = {
    "a hard link": ", so write the tar with --hard-dereference",
    "a symbolic link": ", so write the tar with --dereference",
    "a sparse file": ", so write the tar without --sparse",
}


@dataclass(slots=True)
class TarSample:
    """One key, or one image that cannot be filed under a key.

    Attributes:
        image: the member to decode; None where the key has none.
        extension: of the image, as in the tar, with all its parts.
        texts: members that may contain the label, by extension in lower case.
        member: name of the image, else of the first member.
        kind: what makes it unusable, in two or three words; empty for a sample that can be tried.
        fault: the same as a sentence.
    """

    key: str
    image: TarMember | None = None
    extension: str = ""
    texts: dict[str, TarMember] = field(default_factory=dict)
    member: str = ""
    kind: str = ""
    fault: str = ""


@dataclass(slots=True)
class TarContent:
    """The members of a tar by key.

    Attributes:
        samples: in file order of their images; those that cannot be used follow at the end.
        others: (member, reason) of what no sample uses.
        scattered: keys whose members are not adjacent. Harmless here; readers that stream lose such
            samples.
        paths: the list of original files (paths.py), where the tar has one.
        left_out: how many images no sample uses, by their names.
        shared: names of those whose key ends at a dot, and is that of another image.
    """

    samples: list[TarSample]
    others: list[tuple[str, str]]
    scattered: list[str]
    paths: TarMember | None = None
    left_out: int = 0
    shared: list[str] = field(default_factory=list)


def split_name(name: str) -> tuple[str, str]:
    """(key, extension) of a member."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension


def name_fault(name: str) -> str | None:
    """What is wrong with the name of an image in an index: `group_members` never lists such a
    one."""
    reason = unsafe_name(name)
    key, extension = split_name(name)
    if reason is None and (not key or key.endswith("/") or not extension):
        reason = "it has no key or no extension"
    return None if reason is None else f"{escaped(name)!s:.80}: {reason}"


def names_fault(names: Sequence[str]) -> str | None:
    """What is wrong with the names of all images of a tar, each of which comes once."""
    known = set(names)
    if len(known) < len(names):
        seen: set[str] = set()
        twice = next(name for name in names if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        return f"{escaped(twice)!s:.80}: comes twice"
    odd = (name for name in names if _PLAIN.fullmatch(name) is None)
    return next(filter(None, map(name_fault, odd)), None)


def is_skipped(value: object) -> bool:
    """Whether a value from JSON is a list of pairs: a member, or a file, and a reason."""
    return isinstance(value, list) and all(
        isinstance(pair, list | tuple)
        and len(pair) == 2
        and all(isinstance(text, str) for text in pair)
        for pair in value
    )


def group_members(members: Iterable[TarMember], keys: KeysAt = "first-dot") -> TarContent:
    """File every member under its key; names are escaped where they are unsafe to print."""
    content = TarContent([], [], [])
    groups: dict[str, TarSample] = {}
    unusable: list[TarSample] = []
    last = None
    scattered: dict[str, None] = {}
    for member in members:
        if member.kind == "a folder":
            continue
        if member.name == PATHS_MEMBER and not member.kind and content.paths is None:
            content.paths = member
            continue
        first, extension = split_name(member.name)
        key = first if keys == "first-dot" else _up_to_last_dot(member.name)
        kind, fault = _name_fault(member, first)
        if kind:
            _leave_out(member, extension, kind, fault, unusable, content)
            continue
        if last != key and key in groups:
            scattered[key] = None
        group = groups.setdefault(key, TarSample(first, member=member.name))
        last = key
        _file(group, member, extension, unusable, content, keys)

    # Keys without an image.
    for group in groups.values():
        if group.image is None:
            content.left_out += bool(group.kind)
            group.kind = group.kind or "missing image"
            group.fault = group.fault or _BARE
            texts = [member.name for member in group.texts.values()]
            content.others += [
                (name, "a label without an image" if name.endswith("cls") else _BARE)
                for name in texts
            ]

    content.scattered = list(scattered)
    content.samples = [group for group in groups.values() if not group.kind]
    content.samples.sort(key=lambda group: group.image.offset if group.image else 0)
    content.samples += [group for group in groups.values() if group.kind] + unusable
    return content


_BARE = "no image is beside it"


def _name_fault(member: TarMember, key: str) -> tuple[str, str]:
    if member.kind:
        cure = _CURES.get(member.kind, "")
        return "link or device", f"{member.kind}: only plain files are read{cure}"
    if reason := unsafe_name(member.name):
        return "unsafe name", reason
    if key.endswith("/") or not key:  # also what macOS leaves beside every file: ._000.jpg
        return "hidden file", "a hidden file"
    return "", ""


def _leave_out(
    member: TarMember,
    extension: str,
    kind: str,
    fault: str,
    unusable: list[TarSample],
    content: TarContent,
) -> None:
    """A member whose name or type forbids its use: a lost sample where it would have been an
    image."""
    name = ascii(member.name)[1:-1]
    content.others.append((name, fault))
    if kind != "hidden file" and _type(extension) in TAR_EXTENSIONS:
        content.left_out += 1
        key = (
            name[: len(name) - len(extension) - 1]
            if extension.isascii() and extension.isprintable()
            else name
        )
        unusable.append(TarSample(key, member, extension, member=name, kind=kind, fault=fault))


def _file(
    group: TarSample,
    member: TarMember,
    extension: str,
    unusable: list[TarSample],
    content: TarContent,
    keys: KeysAt,
) -> None:
    """Add one member to its key."""
    kind = _type(extension)
    if kind in TEXTS:
        if group.texts.setdefault(kind, member) is not member:
            content.others.append((member.name, "a second label of the same key"))
        return
    if kind in FOREIGN_EXTENSIONS:
        fault = f"{kind} is not read, only JPEG, PNG and WebP"
        if group.image is None:
            group.kind = "unsupported format"
            group.fault = fault
            group.member = member.name
            group.extension = extension
        content.others.append((member.name, fault))
        return
    if kind not in TAR_EXTENSIONS:
        content.others.append((member.name, NO_IMAGE_NAME))
        return
    if group.image is None:
        group.image = member
        group.extension = extension
        group.member = member.name
        group.kind = group.fault = ""
        return
    content.left_out += 1
    dotted = keys == "first-dot" and ("." in group.extension or "." in extension)
    # of a.depth.png and a.jpg the plain name is the image
    if "." in group.extension and "." not in extension and keys == "first-dot":
        content.others.append((group.image.name, SHARED_KEY))
        content.shared.append(group.image.name)
        group.image = member
        group.extension = extension
        group.member = member.name
        return
    if member.name == group.image.name:
        content.others.append((member.name, TWICE))
    else:
        content.others.append((member.name, SHARED_KEY if dotted else SECOND_IMAGE))
        content.shared += [member.name] if dotted else []
    if extension.lower() == group.extension.lower():
        unusable.append(
            TarSample(group.key, member, extension, {}, member.name, "duplicate key", SECOND_IMAGE)
        )


def _up_to_last_dot(name: str) -> str:
    folder, slash, base = name.rpartition("/")
    return folder + slash + (base.rpartition(".")[0] or base)


def _type(extension: str) -> str:
    return extension.rpartition(".")[2].lower()
