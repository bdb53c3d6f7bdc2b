"""Every error that this package raises for its user: each names the file, the member, what is wrong
and the cure."""

from __future__ import annotations

import functools
import importlib.metadata
import json
from pathlib import Path


class ShardError(RuntimeError):
    """A shard, an index or a manifest that cannot be used: names the file, the member, what is
    wrong and the cure."""


class LostIndexError(ShardError):
    """The index of a shard of an open set cannot be read any more, or is broken: none of the
    shard's samples can be read."""


class RemoteError(ShardError):
    """Something on a server that cannot be read: names the URL, without its secrets, the cause and
    the cure."""


class AbsentError(RemoteError):
    """The server has no such file, or none for this user."""


class AccessError(AbsentError):
    """The server refuses access; some stores answer so for every file that does not exist."""


class PassingError(RemoteError):
    """A failure that may pass: worth another try. `retry_after`: seconds that the server asks to
    wait."""

    def __init__(self, message: str, retry_after: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class BusyError(PassingError):
    """The server asks for fewer requests."""


class WrongContentError(PassingError):
    """Other bytes than expected: another try starts from the first byte, and tries are few."""


class StoppedError(RemoteError):
    """The loader was closed while a transfer was under way."""


class LoaderTimeoutError(ShardError):
    """A batch did not come within `timeout_s`; names the stage of the loader, the shard and the
    byte."""


class TooManyBadSamplesError(ShardError):
    """More of a set is bad than `max_bad_share` allows; contains counts by reason, the first few,
    and the cure."""


class TarError(RuntimeError):
    """A tar file that cannot be trusted: names the file, the byte and what is wrong there.

    Attributes:
        position: byte of the fault; None where the file is no plain tar at all.
        member: name of the member that the fault cut off, or empty.
        reason: what is wrong there, without file and cure.
        lost: bytes from `position` on in which no member was found, once `walk_damaged` has looked;
            else 0.
    """

    def __init__(
        self, message: str, *, position: int | None = None, member: str = "", reason: str = ""
    ) -> None:
        super().__init__(message)
        self.position = position
        self.member = member
        self.reason = reason
        self.lost = 0


class LabelError(ValueError):
    """A member that should contain a label and does not; the text describes a valid label."""


class StructureError(ValueError):
    """A file that must not go to a decoder; the text names what is wrong with its structure."""


class ImageRefusedError(ValueError):
    """An image that is not used; the text gives the reason."""


class NoRoomError(Exception):
    """A shard cannot be kept: everything else in the cache is in use, or the disk is full or
    read-only."""


class DecodeError(RuntimeError):
    """A batch could not be made, usually because one of its images cannot be decoded. The pipeline
    stays usable.

    Attributes:
        faults: (row, reason) of every image refused for its structure; empty where DALI failed
            without naming one.
    """

    def __init__(self, message: str, faults: tuple[tuple[int, str], ...] = ()) -> None:
        super().__init__(message)
        self.faults = faults


class BadImageError(RuntimeError):
    """An image in a shard that cannot be decoded: names tar and member, what is wrong and the
    cure."""


class DecoderBrokenError(RuntimeError):
    """The decoder crashes, hangs or makes wrong pixels on this machine; names which, and the
    cure."""


@functools.cache
def install_command(extra: str) -> str:
    """What installs an extra, in the way in which fastmoco was installed.

    Args:
        extra: of the distribution, e.g. "s3".
    """
    if _is_source_folder(Path(__file__).parents[2]):
        return f"pip install '.[{extra}]' in fastmoco's source folder"
    return f"pip install 'fastmoco[{extra}]'"


def _is_source_folder(root: Path) -> bool:
    """Whether fastmoco runs in its source folder, or was installed from it.

    Args:
        root: the folder two above this package.
    """
    if (root / "pyproject.toml").exists():
        return True
    try:
        origin = importlib.metadata.distribution("fastmoco").read_text("direct_url.json")
    except importlib.metadata.PackageNotFoundError:
        return False
    return origin is not None and "dir_info" in json.loads(origin)
