"""Small files of any origin: pipes, devices, folders, links, sizes, text, depth."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest

from fastmoco_pipelines.files import small
from fastmoco_pipelines.files.small import (
    JSON_DEPTH,
    UnfitFileError,
    json_of,
    lines_of,
    linked_to,
    open_regular,
    read_json,
    read_small,
    require_solid,
    text_of,
)
from fastmoco_pipelines.text import escaped


@pytest.fixture
def odd(tmp_path: Path) -> dict[str, Path]:
    """One of each kind that is no regular file."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "to_pipe").symlink_to("pipe")
    with socket.socket(socket.AF_UNIX) as end:
        end.bind(str(tmp_path / "socket"))
    return {name: tmp_path / name for name in ("pipe", "folder", "zero", "to_pipe", "socket")}


@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_WRONLY, os.O_RDWR | os.O_CREAT | os.O_TRUNC])
@pytest.mark.parametrize("name", ["pipe", "folder", "zero", "to_pipe", "socket"])
def test_only_a_regular_file_is_opened(odd: dict[str, Path], name: str, flags: int) -> None:
    kind = {"pipe": "pipe", "to_pipe": "pipe", "zero": "device"}.get(name, name)
    with pytest.raises(UnfitFileError, match=f"{name}: is a .*{kind} where a file is due"):
        open_regular(odd[name], flags)


def test_a_link_is_followed_unless_it_may_be_another_users(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("all of it")
    (tmp_path / "link").symlink_to("precious")
    (tmp_path / "nowhere").symlink_to(tmp_path / "absent")
    assert read_small(tmp_path / "link") == b"all of it"
    for name in ("link", "nowhere"):
        with pytest.raises(UnfitFileError, match=f"{name}: is a symbolic link"):
            open_regular(tmp_path / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, follow=False)
    assert (tmp_path / "precious").read_text() == "all of it"
    assert not (tmp_path / "absent").exists()


def test_a_file_is_opened_as_asked(tmp_path: Path) -> None:
    path = tmp_path / "new"
    descriptor = open_regular(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600, follow=False)
    os.write(descriptor, b"first")
    assert os.get_blocking(descriptor)
    assert not os.get_inheritable(descriptor)
    os.close(descriptor)
    assert path.stat().st_mode & 0o777 == 0o600
    os.close(open_regular(path, os.O_RDWR | os.O_TRUNC))
    assert path.read_bytes() == b""
    with pytest.raises(FileNotFoundError):
        open_regular(tmp_path / "absent")


def test_a_file_with_a_second_name_is_read_and_not_written(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("all of it")
    os.link(tmp_path / "precious", tmp_path / "metrics")
    assert read_small(tmp_path / "metrics", follow=False) == b"all of it"
    for flags in (os.O_WRONLY | os.O_TRUNC, os.O_RDWR | os.O_APPEND | os.O_CREAT):
        with pytest.raises(UnfitFileError, match="metrics: has a second name"):
            open_regular(tmp_path / "metrics", flags, follow=False)
    assert (tmp_path / "precious").read_text() == "all of it"
    os.close(open_regular(tmp_path / "metrics", os.O_WRONLY))  # by its owner's wish


def test_a_folder_may_be_a_link_of_the_user_to_a_folder(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    for name, target in (("link", "folder"), ("to_file", "file"), ("nowhere", "absent")):
        (tmp_path / name).symlink_to(tmp_path / target)
    assert linked_to(tmp_path / "folder") == linked_to(tmp_path / "absent") == ""
    assert linked_to(tmp_path / "link") == str(tmp_path / "folder")
    for name, rule in (
        ("to_file", "leads to no"),
        ("nowhere", "leads to no"),
        ("file", "is a file"),
    ):
        with pytest.raises(UnfitFileError, match=f"{name}: {rule}"):
            linked_to(tmp_path / name)


def test_only_so_many_bytes_are_read(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * 100)
    assert read_small(path, 100) == b"x" * 100
    with pytest.raises(UnfitFileError, match=r"file: has 100 bytes, .* at most 99"):
        read_small(path, 99)
    os.truncate(path, 1 << 40)  # sparse: a terabyte to whoever reads it
    with pytest.raises(UnfitFileError, match="at most 67,108,864"):
        read_small(path)
    # A file that says 0 and goes on, as in /proc.
    with pytest.raises(UnfitFileError, match=r"cpuinfo: has 11 bytes, .* at most 10"):
        read_small("/proc/cpuinfo", 10)


def test_text_that_is_not_utf8_is_refused_with_its_place() -> None:
    assert text_of(b"\xef\xbb\xbfa\xc3\xa4", "f") == "a\u00e4"
    with pytest.raises(UnfitFileError, match=r"a.csv: line 3, byte 5: 0xff is not UTF-8"):
        text_of(b"a\nb\nc\xff\n", "a.csv")


@pytest.mark.parametrize("brackets", ["[]", "{}", '[{"a":}]'])
@pytest.mark.parametrize("pairs", [JSON_DEPTH + 1, 990, 200_000])
def test_json_is_only_so_deep(brackets: str, pairs: int) -> None:
    half = len(brackets) // 2
    opening = brackets[:half] if brackets != "{}" else '{"a":'
    opening = '[{"a":' if brackets.startswith("[{") else opening
    closing = {"[": "]", '{"a":': "}"}.get(opening, "}]")
    levels = pairs if closing != "}]" else -(-pairs // 2)
    text = opening * levels + "1" + closing * levels
    with pytest.raises(
        UnfitFileError, match=f"f: lists and objects are nested deeper than {JSON_DEPTH}"
    ):
        json_of(text.encode(), "f")


def test_json_as_deep_as_allowed_and_wide_is_read() -> None:
    deep = "[" * JSON_DEPTH + "]" * JSON_DEPTH
    json_of(deep.encode(), "f")
    wide = [[{"a": [i]}] for i in range(10_000)]
    assert json_of(json.dumps(wide).encode(), "f") == wide
    # brackets in a string are text
    assert json_of(json.dumps("[" * 1000).encode(), "f") == "[" * 1000


@pytest.mark.parametrize(
    ("content", "rule"),
    [
        (b'{"a": 1,\n "b" 2}', "line 2, column 6: not JSON"),
        (b"", "line 1, column 1: not JSON"),
        (b'{"a": "\xff"}', "line 1, byte 7: 0xff is not UTF-8"),
        (b"9" * 5000, "a number is too long"),
    ],
)
def test_a_file_that_is_not_json_is_refused_with_its_place(
    tmp_path: Path, content: bytes, rule: str
) -> None:
    (tmp_path / "x\x1b[2J.json").write_bytes(content)
    with pytest.raises(UnfitFileError, match=rule) as refused:
        read_json(tmp_path / "x\x1b[2J.json")
    assert "\x1b" not in str(refused.value)


def test_lines_are_read_with_their_places_and_bounded(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    path.write_bytes(b"one\n" + b"x" * 25 + b"\ntwo\n" + b"y" * 10 + b"\nend")
    assert list(lines_of(path, 10)) == [
        (0, b"one\n"),
        (4, b"x" * 10),
        (30, b"two\n"),
        (34, b"y" * 10),
        (45, b"end"),
    ]


def test_a_file_of_holes_is_refused_and_one_with_some_is_not(tmp_path: Path) -> None:
    """A filesystem that knows no holes says that all are data."""
    hollow, some, small = tmp_path / "hollow", tmp_path / "some", tmp_path / "small"
    for path, size in ((hollow, 4 << 40), (some, (1 << 30) + 1), (small, 1 << 30)):
        path.write_bytes(b"data" * 1000)
        os.truncate(path, size)
    with open(some, "r+b") as file:  # more than a sixteenth
        for at in range(0, 80 << 20, 1 << 20):
            os.pwrite(file.fileno(), b"d" * (1 << 20), at)
    with open(hollow, "rb") as file:
        file.seek(5)
        with pytest.raises(
            UnfitFileError, match="hollow: has 4,398,046,511,104 bytes, of which near"
        ):
            require_solid(file.fileno(), hollow)
        assert file.tell() == os.lseek(file.fileno(), 0, os.SEEK_CUR) == 5
    for path in (some, small):
        with open(path, "rb") as file:
            require_solid(file.fileno(), path)


def test_a_file_that_grows_while_it_is_read_has_an_end(tmp_path: Path) -> None:
    path = tmp_path / "grows"
    path.write_bytes(b"one\ntwo\n")
    found = []
    for _, line in lines_of(path):
        found.append(line)
        with open(path, "ab") as file:
            file.write(b"more\n" * 3000)
    assert found == [b"one\n", b"two\n"]


@pytest.mark.parametrize("name", ["plain", "m\u00fcll\n\x1b[2J", "\udcff\u732b\u202e"])
def test_names_are_shown_as_all_other_text(name: str) -> None:
    """The room of files imports no other, so it escapes them by itself."""
    assert small._plain(name) == escaped(name)
    assert small._plain(name).isprintable()
