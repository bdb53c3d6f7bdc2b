"""The strict walk: agrees with the standard library on whole tars, and never stops early without an
error."""

from __future__ import annotations

import gzip
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest

from fastmoco_pipelines.errors import ShardError, TarError
from fastmoco_pipelines.formats.index import scan_tar
from fastmoco_pipelines.formats.labels import LabelRule
from fastmoco_pipelines.formats.tar import BLOCK, unsafe_name, walk_damaged, walk_tar

MEMBERS = [(f"{i:03d}.jpg", bytes([i % 251]) * (100 + 613 * i)) for i in range(5)]


def by_standard_library(path: Path) -> list[tuple[str, int, int]]:
    with tarfile.open(path) as tar:
        return [(m.name, m.offset_data, m.size) for m in tar.getmembers() if m.isreg()]


def plain_files(path: Path) -> list[tuple[str, int, int]]:
    return [(m.name, m.offset, m.size) for m in walk_tar(path) if not m.kind]


@pytest.mark.parametrize("layout", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_walk_agrees_with_the_standard_library(tmp_path, write_tar, layout):
    long = (
        []
        if layout == tarfile.USTAR_FORMAT
        else [("d/" * 80 + "long.png", b"long"), ("ümlaut.png", b"x" * 512)]
    )
    path = write_tar(
        tmp_path / "a.tar", [*MEMBERS, ("p" * 90 + "/" + "n" * 90, b"prefix"), *long], format=layout
    )
    assert plain_files(path) == by_standard_library(path)


def test_big_numbers_in_headers_are_read(tmp_path, write_tar):
    path = write_tar(tmp_path / "a.tar", [("a.jpg", b"x")], format=tarfile.GNU_FORMAT)
    raw = bytearray(path.read_bytes())
    raw[124:136] = b"\x80" + (1).to_bytes(11, "big")  # GNU's binary form of the size
    raw[148:156] = b" " * 8
    raw[148:156] = b"%06o\0 " % sum(raw[:BLOCK])
    path.write_bytes(raw)
    assert plain_files(path) == [("a.jpg", BLOCK, 1)]


def test_links_and_devices_are_named_not_followed(tmp_path, write_tar):
    special = {
        "hard": tarfile.LNKTYPE,
        "soft": tarfile.SYMTYPE,
        "null": tarfile.CHRTYPE,
        "fifo": tarfile.FIFOTYPE,
    }
    members = [(name, {"type": kind, "linkname": "/etc/passwd"}) for name, kind in special.items()]
    path = write_tar(
        tmp_path / "a.tar", [*members, ("folder", {"type": tarfile.DIRTYPE}), *MEMBERS]
    )
    kinds = {member.name.rstrip("/"): member.kind for member in walk_tar(path) if member.kind}
    assert kinds == {
        "hard": "a hard link",
        "soft": "a symbolic link",
        "null": "a character device",
        "fifo": "a named pipe",
        "folder": "a folder",
    }
    assert plain_files(path) == by_standard_library(path)


def test_every_cut_is_an_error_or_harms_nobody(tmp_path, write_tar):
    whole = write_tar(tmp_path / "a.tar", MEMBERS).read_bytes()
    expected = plain_files(tmp_path / "a.tar")
    end = max(offset + size for _, offset, size in expected)
    cut = tmp_path / "cut.tar"
    messages = []
    for length in [*range(0, len(whole), 256), end, end + 1]:
        cut.write_bytes(whole[:length])
        try:
            assert plain_files(cut) == expected
        except TarError as error:
            messages.append(str(error))
    assert all(message.startswith("cut.tar: ") for message in messages)
    assert (
        len(messages) > 2 * end // BLOCK
    )  # every cut inside the members, on their edges among them


def test_zeroed_blocks_never_lose_a_member_silently(tmp_path, write_tar):
    whole = write_tar(tmp_path / "a.tar", MEMBERS).read_bytes()
    expected = plain_files(tmp_path / "a.tar")
    hole = tmp_path / "hole.tar"
    headers = {offset - BLOCK for _, offset, _ in expected}
    for start in range(0, expected[-1][1] + expected[-1][2], BLOCK):
        hole.write_bytes(whole[:start] + bytes(BLOCK) + whole[start + BLOCK :])
        if start in headers:
            with pytest.raises(TarError, match="hole of zeros"):
                plain_files(hole)
        else:
            assert (
                plain_files(hole) == expected
            )  # a hole in an image's bytes is the checksum's business


def test_every_flipped_header_bit_is_noticed(tmp_path, write_tar):
    whole = write_tar(tmp_path / "a.tar", MEMBERS).read_bytes()
    header = plain_files(tmp_path / "a.tar")[2][1] - BLOCK
    bad = tmp_path / "bad.tar"
    for bit in range(0, BLOCK * 8, 7):
        raw = bytearray(whole)
        raw[header + bit // 8] ^= 1 << bit % 8
        bad.write_bytes(raw)
        try:
            found = plain_files(bad)
        except TarError:
            continue
        # Bits between the checksum's digits and after its end mark carry nothing.
        assert 148 <= bit // 8 < 156
        assert found == plain_files(tmp_path / "a.tar")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "end mark"),
        (b"<html>not found</html>" * 100, "no valid member header"),
        (np.random.default_rng(0).bytes(5000), "no valid member header"),
        (gzip.compress(b"x" * 5000, mtime=0), "is compressed"),
    ],
)
def test_files_that_are_no_tar_are_refused(tmp_path, content, words):
    path = tmp_path / "x.tar"
    path.write_bytes(content)
    with pytest.raises(TarError, match=words):
        list(walk_tar(path))


def test_random_damage_raises_nothing_but_its_own_error(tmp_path, write_tar):
    rng = np.random.default_rng(0)
    whole = write_tar(
        tmp_path / "a.tar", [*MEMBERS, ("l/" * 99 + "x", b"1")], format=tarfile.PAX_FORMAT
    ).read_bytes()
    bad = tmp_path / "bad.tar"
    for _ in range(300):
        raw = bytearray(whole)
        for _ in range(rng.integers(1, 20)):
            raw[rng.integers(len(raw))] = rng.integers(256)
        bad.write_bytes(raw)
        try:
            members = list(walk_tar(bad))
        except TarError:
            continue
        assert all(m.offset >= 0 and m.offset + m.size <= len(raw) for m in members if not m.kind)


@pytest.mark.parametrize(
    "name",
    ["../../evil.jpg", "/abs/evil.jpg", "a/../b.jpg", "a\\b.jpg", "a\nb.jpg", "a\x1b[2J.jpg"],
)
def test_unsafe_names_are_told(name):
    assert unsafe_name(name)
    assert unsafe_name("folder/..a/000123.x.jpg") is None


@pytest.mark.parametrize("content", ["nothing", "members"])
def test_terabytes_of_holes_are_passed_at_once(tmp_path, write_tar, content):
    """A file of a few kB that reads as terabytes of zeros: behind the end mark, or all of it."""
    path = tmp_path / "x.tar"
    if content == "members":
        write_tar(path, [("a.jpg", b"x" * 700)])
        assert [member.name for member in walk_tar(path)] == ["a.jpg"]
    else:
        path.touch()
    os.truncate(path, 1 << 42)
    members, faults = walk_damaged(path)
    assert len(members) == (content == "members")
    assert faults == []
    with open(path, "r+b") as file:
        file.seek(1 << 41)
        file.write(b"x" * 512)
    members, (fault,) = walk_damaged(path)
    assert "after the archive's end mark" in fault.reason
    assert len(members) == (content == "members")


def test_a_member_of_terabytes_is_left_out_unread(tmp_path):
    info = tarfile.TarInfo("a.jpg")
    info.size = 1 << 41
    header = info.tobuf(tarfile.GNU_FORMAT)
    path = tmp_path / "x.tar"
    path.write_bytes(header)
    os.truncate(path, len(header) + (1 << 41) + 1024)
    with pytest.raises(ShardError, match=r"x\.tar: holds no usable image \(a\.jpg: "):
        scan_tar(path, LabelRule())
