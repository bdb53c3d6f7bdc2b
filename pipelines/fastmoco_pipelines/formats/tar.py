"""A strict walk over the members of a tar file: every byte is accounted for, or the walk stops with
an error.

Common readers stop silently at a zeroed block, at a damaged header or where a file was cut at a
member's edge, and the samples after that point are lost unnoticed. Here the archive must run member
by member to its end mark, and only zeros may follow it. Links, devices and the like are reported,
never followed. `walk_damaged` reads what is left of a damaged tar: it continues at the next sound
header and reports every fault.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from fastmoco_pipelines.errors import TarError
from fastmoco_pipelines.files.small import UnfitFileError, open_regular

BLOCK = 512
MAX_NAME_BYTES = 65536
MAX_FAULTS = 100
"""Faults of one tar after which the search ends, so that it is bounded in any file."""
OUTSIDE = "its name points outside the archive"
_KINDS = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a character device",
    b"4": "a block device",
    b"5": "a folder",
    b"6": "a named pipe",
    b"S": "a sparse file",
    b"D": "a list of a folder's files",
    b"M": "the rest of a file in another volume",
    b"V": "a volume's label",
}
_WITHOUT_DATA = frozenset(b"123456")


@dataclass(frozen=True, slots=True)
class TarMember:
    """One member: `kind` is empty for a plain file, else its type ("a symbolic link")."""

    name: str
    kind: str
    offset: int
    size: int


def walk_tar(path: Path) -> Iterator[TarMember]:
    """Yield every member in file order; folders, links and devices too, with their `kind`.

    Raises:
        TarError: where the file is compressed, damaged, or ends before its end mark.
    """
    with _opened(path) as file:
        yield from _walk(path, file, 0)


def walk_damaged(path: Path) -> tuple[list[TarMember], list[TarError]]:
    """Every member that can be found, and every fault on the way; after a fault the next sound
    header is searched.

    Returns:
        (members, faults): without faults, the members are those of `walk_tar`. Every byte before
        the end mark belongs to a member, to a record in front of one, or is counted by `lost` of a
        fault.
    """
    members: list[TarMember] = []
    faults: list[TarError] = []
    start: int | None = 0
    try:
        opened = _opened(path)
    except TarError as fault:
        return [], [fault]
    with opened as file:
        while start is not None:
            try:
                for member in _walk(path, file, start):  # what was found before a fault is kept
                    members.append(member)  # noqa: PERF402
                start = None
            except TarError as fault:
                faults.append(fault)
                if fault.position is None:
                    break
                total = os.fstat(file.fileno()).st_size
                searched = len(faults) < MAX_FAULTS
                start = _next_header(file, fault.position + BLOCK) if searched else None
                fault.lost = max(0, (total if start is None else start) - fault.position)
                if not searched:
                    fault.reason += f"; what comes after {MAX_FAULTS} faults is not searched"
    return members, faults


def _opened(path: Path) -> BinaryIO:
    try:
        return open(open_regular(path), "rb", buffering=1 << 20)
    except UnfitFileError as error:
        raise TarError(str(error)) from error


def _walk(path: Path, file: BinaryIO, position: int) -> Iterator[TarMember]:
    total = os.fstat(file.fileno()).st_size
    name = None
    size = None
    sparse = False
    while True:
        file.seek(position)
        header = file.read(BLOCK)
        _check_header_is_there(path, position, header, total)
        if not any(header):
            _check_only_zeros_follow(path, position, file)
            return
        plain_name = _parse_header(path, position, header)
        flag = header[156:157]
        if flag in (b"L", b"K", b"x", b"g"):
            payload = _payload(path, position, file, _octal(path, position, header[124:136]), total)
            if flag == b"x" and b"GNU.sparse." in payload:
                sparse = True
            if flag == b"L":
                name = _long_name(path, position, payload)
            elif flag == b"x":
                records = _pax(path, position, payload)
                name = _long_name(path, position, records[b"path"]) if b"path" in records else name
                size = _pax_size(path, position, records) if b"size" in records else size
            position += BLOCK + _padded(len(payload))
            continue
        member = _member(path, position, header, name or plain_name, size, total)
        if sparse:  # its data begins with a list of the parts that are there
            member = TarMember(member.name, _KINDS[b"S"], member.offset, member.size)
        yield member
        position = member.offset + (0 if flag[0] in _WITHOUT_DATA else _padded(member.size))
        name = size = None
        sparse = False


def _next_header(file: BinaryIO, start: int) -> int | None:
    """Position of the next block with a right checksum and the mark of a tar header, or None."""
    position = _padded(start)
    while True:
        position = _past_hole(file, position)
        file.seek(position)
        chunk = file.read(1 << 20)
        at = chunk.find(b"ustar")
        while at >= 0:
            block = at - 257
            whole = block >= 0 and block % BLOCK == 0 and len(chunk) >= block + BLOCK
            if whole and _sums_up(chunk[block : block + BLOCK]):
                return position + block
            at = chunk.find(b"ustar", at + 1)
        if len(chunk) < 1 << 20:
            return None
        position += 1 << 20


def unsafe_name(name: str) -> str | None:
    """Why a member's name must not be used as a path or printed, or None where it is harmless."""
    if not name.isprintable():
        return "its name holds unprintable characters"
    if name.startswith("/") or "\\" in name or ".." in name.split("/"):
        return OUTSIDE
    return None


def _member(
    path: Path, position: int, header: bytes, name: str, pax_size: int | None, total: int
) -> TarMember:
    flag = header[156:157]
    size = _octal(path, position, header[124:136]) if pax_size is None else pax_size
    kind = "" if flag in (b"0", b"\0", b"7") else _KINDS.get(flag, f"of unknown type {flag!r}")
    if not kind and name.endswith("/"):
        kind = "a folder"
    if flag[0] not in _WITHOUT_DATA and position + BLOCK + size > total:
        what = f"member {name!a} of {size} bytes reaches past the file's end ({total} bytes)"
        raise _damaged(path, position, what, member=name)
    return TarMember(name, kind, position + BLOCK, size)


def _damaged(path: Path, position: int, what: str, member: str = "") -> TarError:
    return TarError(
        f"{path.name}: byte {position}: {what}. The tar is cut off or damaged: copy it again from "
        "its source, or pack the images again.",
        position=position,
        member=member,
        reason=what,
    )


def _check_header_is_there(path: Path, position: int, header: bytes, total: int) -> None:
    if position == 0 and (
        header.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd"))
    ):
        raise TarError(
            f"{path.name}: is compressed; images are read by offset: unpack it to a plain .tar "
            "first."
        )
    if position == 0 and header.startswith(b"PK\3\4"):
        raise TarError(f"{path.name}: is a zip, no tar: unpack it and write a plain .tar.")
    if len(header) < BLOCK:
        raise _damaged(
            path, position, f"the file ends here ({total} bytes) without the archive's end mark"
        )


def _past_hole(file: BinaryIO, position: int) -> int:
    """Where the next bytes are that take room on the disk, a multiple of 512: holes read as zeros,
    and a file of a few kB may have terabytes of them."""
    descriptor = file.fileno()
    place = os.lseek(descriptor, 0, os.SEEK_CUR)  # which the buffer of `file` relies on
    try:
        found = os.lseek(descriptor, position, os.SEEK_DATA)
    except OSError as error:
        none_follow = error.errno == errno.ENXIO
        return os.fstat(descriptor).st_size if none_follow else position
    finally:
        os.lseek(descriptor, place, os.SEEK_SET)
    return max(position, found - found % BLOCK)


def _check_only_zeros_follow(path: Path, position: int, file: BinaryIO) -> None:
    at = position
    while True:
        at = _past_hole(file, at)
        file.seek(at)
        chunk = file.read(1 << 20)
        if not chunk:
            return
        at += len(chunk)
        if chunk.strip(b"\0"):
            raise _damaged(
                path, position, "data after the archive's end mark: a hole of zeros in the middle"
            )


def _parse_header(path: Path, position: int, header: bytes) -> str:
    """The name field, once the header's checksum is right."""
    if not _sums_up(header):
        raise _damaged(path, position, "no valid member header (checksum)")
    name = header[:100].split(b"\0", 1)[0]
    prefix = header[345:500].split(b"\0", 1)[0] if header[257:263] == b"ustar\0" else b""
    return _text(prefix + b"/" + name if prefix else name)


def _sums_up(header: bytes) -> bool:
    digits = header[148:156].split(b"\0", 1)[0].strip()
    blanked = header[:148] + b" " * 8 + header[156:]
    unsigned = sum(blanked)
    # Some old writers summed signed bytes.
    sums = (unsigned, unsigned - 256 * sum(byte > 127 for byte in blanked))
    return digits.isdigit() and not digits.strip(b"01234567") and int(digits, 8) in sums


def _octal(path: Path, position: int, field: bytes) -> int:
    if field[0] & 0x80:  # GNU: a big-endian binary number after a set top bit
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    digits = field.split(b"\0", 1)[0].strip() or b"0"
    if digits.strip(b"01234567"):  # int() would also take a sign and underscores
        raise _damaged(path, position, "no valid member header (a number field)")
    return int(digits, 8)


def _payload(path: Path, position: int, file: BinaryIO, size: int, total: int) -> bytes:
    if size > MAX_NAME_BYTES or position + BLOCK + size > total:
        raise _damaged(path, position, f"a name record of {size} bytes")
    return file.read(size)


def _long_name(path: Path, position: int, payload: bytes) -> str:
    name = payload.rstrip(b"\0")
    if b"\0" in name:  # with a damaged length, the record contains the members after it
        raise _damaged(path, position, "a name with zeros in it")
    return _text(name)


def _pax(path: Path, position: int, payload: bytes) -> dict[bytes, bytes]:
    """Records of the form "LENGTH KEY=VALUE\\n", LENGTH counting the whole record."""
    records: dict[bytes, bytes] = {}
    rest = payload
    while rest.strip(b"\0"):
        digits, space, _ = rest.partition(b" ")
        length = int(digits) if space and digits.isdigit() and len(digits) < 8 else 0
        key, equals, value = rest[len(digits) + 1 : length].partition(b"=")
        if length > len(rest) or not equals or not value.endswith(b"\n"):
            raise _damaged(path, position, "a broken extended header")
        records[key] = value[:-1]
        rest = rest[length:]
    return records


def _pax_size(path: Path, position: int, records: dict[bytes, bytes]) -> int:
    digits = records[b"size"]
    if not digits.isdigit() or len(digits) > 18:
        raise _damaged(path, position, "a broken size in an extended header")
    return int(digits)


def _text(name: bytes) -> str:
    """A name; one that is no UTF-8, as old archives have, in Latin-1, which has all bytes."""
    try:
        return name.decode("utf-8")
    except UnicodeDecodeError:
        return name.decode("latin-1")


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK
