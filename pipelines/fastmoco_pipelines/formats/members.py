"""Members of a tar -> samples: the image and the texts of each key, and what cannot be used by its
name.

Webdataset's rule: the key is the path up to the first dot of the file name, the rest is the
extension. The last part of the extension, in upper or lower case, is the type of the member:
`000123.rgb.JPG` is an image of key `000123`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from fastmoco_pipelines.formats.images import EXTENSIONS
from fastmoco_pipelines.formats.paths import MEMBER as PATHS_MEMBER
from fastmoco_pipelines.formats.tar import TarMember, unsafe_name

TEXTS = ("cls", "json", "txt")
"""Extensions of members that may contain a label."""
FOREIGN_EXTENSIONS = (
    "gif",
    "avif",
    "heic",
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
SECOND_IMAGE = "a second image of the same key"


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
    """

    samples: list[TarSample]
    others: list[tuple[str, str]]
    scattered: list[str]
    paths: TarMember | None = None


def split_name(name: str) -> tuple[str, str]:
    """(key, extension) of a member."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension


def group_members(members: Iterable[TarMember]) -> TarContent:
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
        key, extension = split_name(member.name)
        kind, fault = _name_fault(member, key)
        if kind:
            _leave_out(member, extension, kind, fault, unusable, content)
            continue
        if last != key and key in groups:
            scattered[key] = None
        group = groups.setdefault(key, TarSample(key, member=member.name))
        last = key
        _file(group, member, extension, unusable, content)

    # Keys without an image.
    for group in groups.values():
        if group.image is None:
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
        return "link or device", f"{member.kind}: only plain files are read"
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
    if kind != "hidden file" and _type(extension) in EXTENSIONS:
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
) -> None:
    """Add one member to its key."""
    kind = _type(extension)
    if kind in TEXTS:
        if group.texts.setdefault(kind, member) is not member:
            content.others.append((member.name, "a second label of the same key"))
        return
    if kind not in EXTENSIONS:
        if kind in FOREIGN_EXTENSIONS and group.image is None:
            group.kind = "unsupported format"
            group.fault = f"{kind} is not read, only JPEG, PNG and WebP"
            group.member = member.name
            group.extension = extension
        content.others.append((member.name, "no image by its name"))
        return
    if group.image is None:
        group.image = member
        group.extension = extension
        group.member = member.name
        group.kind = group.fault = ""
        return
    # of a.depth.png and a.jpg the plain name is the image
    if "." in group.extension and "." not in extension:
        content.others.append((group.image.name, SECOND_IMAGE))
        group.image = member
        group.extension = extension
        group.member = member.name
        return
    content.others.append((member.name, SECOND_IMAGE))
    if extension.lower() == group.extension.lower():
        unusable.append(
            TarSample(group.key, member, extension, {}, member.name, "duplicate key", SECOND_IMAGE)
        )


def _type(extension: str) -> str:
    return extension.rpartition(".")[2].lower()
