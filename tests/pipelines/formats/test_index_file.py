"""The binary index: what comes back, what is checked when, and what is refused."""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fastmoco_pipelines.errors import ShardError
from fastmoco_pipelines.files.whole import sealed_json
from fastmoco_pipelines.formats.index import (
    build_index,
    index_path,
    json_path,
    open_index,
    read_index,
    write_index,
    write_json_index,
)
from fastmoco_pipelines.formats.index_file import (
    HEAD_BYTES,
    MAGIC,
    RECORD,
    IndexFile,
    content_hash,
    parse_header,
    to_bytes,
)
from fastmoco_pipelines.formats.index_json import json_content
from fastmoco_pipelines.formats.labels import MAX_LABEL

WORDS = "fastmoco data index"


@pytest.fixture
def index(packed):
    return read_index(packed / "train-000001.tar")


def resealed(data: bytes, edit) -> bytes:
    """An index whose header was edited, with the right hash of the header."""
    size = struct.unpack_from("<I", data, 12)[0]
    header = json.loads(data[48 : 48 + size])
    edit(header)
    text = json.dumps(header, separators=(",", ":")).encode()
    first = -(-(48 + size) // 64) * 64
    head = data[:12] + struct.pack("<I", len(text)) + hashlib.sha256(text).digest() + text
    return head + bytes(-len(head) % 64) + data[first:]


def section_at(name: str, field: int, value: object):
    """An edit of a header: start, size or SHA-256 of a section."""

    def edit(header):
        header["sections"][name][field] = value

    return edit


def edited_record(data: bytes, row: int, **values: int) -> bytes:
    """An index with another record, and all hashes right: made on purpose."""
    file = IndexFile("x", data)
    section = file.header.sections["records"]
    records = file.records.copy()
    for name, value in values.items():
        records[name][row] = value
    new = records.tobytes()

    def edit(header):
        header["sections"]["records"][2] = hashlib.sha256(new).hexdigest()
        header["content"] = content_hash(records)

    end = section.start + section.size
    return resealed(data[: section.start] + new + data[end:], edit)


def test_what_is_written_comes_back(index):
    file = IndexFile("x.index", to_bytes(index))
    assert file.whole() == index
    assert file.check() is file
    assert file.records.dtype == RECORD
    assert RECORD.itemsize == 24
    assert [file.member(i) for i in (0, 15)] == [index.member(i) for i in (0, 15)]
    assert file.rows() == list(
        zip(*(index.columns[name] for name in ("offset", "size", "crc32")), strict=True)
    )
    assert to_bytes(file.whole()) == file.data
    header = file.header
    assert (header.samples, header.skipped, header.unlabelled) == (len(index), 0, 0)


def test_names_and_reasons_of_any_letters_come_back(tmp_path, noise_image, write_tar):
    path = write_tar(
        tmp_path / "x.tar",
        [("Bär/東京.v2.jpg", noise_image(0)), ("a b.jpg", noise_image(1)), ("ü.txt", b"x")],
    )
    built = build_index(path)
    again = IndexFile("x", to_bytes(built)).whole()
    assert again == built
    assert [again.member(i) for i in range(len(again))] == [built.member(0), built.member(1)]
    assert len(built.skipped) >= 1


def test_both_forms_hold_the_same(packed, tmp_path):
    tar = Path(shutil.copy(packed / "train-000000.tar", tmp_path))
    shutil.copy(index_path(packed / "train-000000.tar"), index_path(tar))
    index = read_index(tar)
    write_json_index(tar, index)
    assert open_index("json", json_path(tar).read_bytes()).data == index_path(tar).read_bytes()
    index_path(tar).unlink()
    assert read_index(tar) == index
    write_index(tar, index)
    assert not json_path(tar).exists()  # it would be stale after the next change


def test_the_header_alone_opens_an_index(index):
    data = to_bytes(index)
    header = parse_header("x", data[:HEAD_BYTES], len(data))
    assert header == IndexFile("x", data).header
    big = replace(
        index,
        keys=[f"{'k' * 40}{i}" for i in range(5000)],
        extensions=["jpg"] * 5000,
        columns={name: column[:1] * 5000 for name, column in index.columns.items()},
    )
    data = to_bytes(big)
    assert parse_header("x", data[:HEAD_BYTES], None).samples == 5000


def test_the_identity_is_that_of_the_images_not_of_their_places(index):
    shifted = replace(
        index,
        tar_bytes=index.tar_bytes + 512,
        columns=index.columns | {"offset": [at + 512 for at in index.columns["offset"]]},
    )
    other = replace(index, columns=index.columns | {"label": [1] * len(index)})
    one, two, three = (IndexFile("x", to_bytes(each)).header for each in (index, shifted, other))
    assert one.content == two.content != three.content
    assert one.seal != two.seal


@pytest.mark.parametrize("part", ["records", "members", "skipped"])
def test_a_flipped_bit_is_found_when_its_section_is_used(index, part):
    data = bytearray(to_bytes(index))
    section = IndexFile("x", bytes(data)).header.sections[part]
    data[section.start + section.size // 2] ^= 0x10
    file = IndexFile("x.tar.index", bytes(data))  # the header is whole
    uses = {
        "records": lambda: file.records,
        "members": lambda: file.member(0),
        "skipped": file.skipped,
    }
    for name, use in uses.items():
        if name != part:
            use()
    with pytest.raises(
        ShardError, match=rf"x\.tar\.index: was changed .* \({part}\): run .{WORDS}"
    ):
        uses[part]()
    with pytest.raises(ShardError, match=part):
        file.check()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda data: b"", "is not an index"),
        (lambda data: data[:40], "is not an index"),
        (lambda data: b"\0" * 500, "is not an index"),
        (lambda data: MAGIC.replace(b"\r\n", b"\n") + data[8:], "is not an index"),
        (lambda data: data[:8] + struct.pack("<I", 3) + data[12:], "has version 3"),
        (lambda data: data[:12] + struct.pack("<I", 2**31) + data[16:], "changed or damaged"),
        (lambda data: data[:60] + b"~" + data[61:], "changed or damaged"),
        (lambda data: data[:-1], r"has \d+ bytes instead of"),
        (lambda data: data + b"\0", r"has \d+ bytes instead of"),
        (lambda data: resealed(data, lambda h: h.pop("tar_hash")), "header is broken"),
        (lambda data: resealed(data, lambda h: h.update(more=1)), "header is broken"),
        (lambda data: resealed(data, lambda h: h.update(samples="9")), "header is broken"),
        (lambda data: resealed(data, lambda h: h.update(samples=0)), "lists no sample"),
        (lambda data: resealed(data, lambda h: h.update(samples=99)), "records are missing"),
        (lambda data: resealed(data, lambda h: h.update(unlabelled=99)), "header is broken"),
        (lambda data: resealed(data, lambda h: h.update(content="zz")), "header is broken"),
        (lambda data: resealed(data, lambda h: h.update(content="z" * 64)), "header is broken"),
        (lambda data: resealed(data, lambda h: h.update(tar_hash=" " * 64)), "header is broken"),
        (lambda data: resealed(data, lambda h: h.update(skipped=2**40)), "header is broken"),
        (lambda data: resealed(data, lambda h: h.update(tar_bytes=2**70)), "header is broken"),
        (lambda data: resealed(data, lambda h: h.update(samples=True)), "broken: samples=True"),
        (lambda data: resealed(data, lambda h: h.update(skipped=float("nan"))), "skipped=nan"),
        (lambda data: resealed(data, lambda h: h.update(unlabelled=-1)), "unlabelled=-1"),
        (lambda data: resealed(data, lambda h: h.update(tar_bytes=1e300)), "tar_bytes=1e.300"),
        (lambda data: resealed(data, lambda h: h.update(tar="../../x.tar")), "not the name of"),
        (lambda data: resealed(data, lambda h: h.update(tar="a\0b")), "not the name of"),
        (lambda data: resealed(data, lambda h: h.update(tar=["x.tar"])), "not the name of"),
        (lambda data: resealed(data, lambda h: h["sections"]["skipped"].pop()), "header is broken"),
        (lambda data: resealed(data, section_at("records", 1, True)), "'records': two numbers"),
        (lambda data: resealed(data, section_at("members", 1, 1.5)), "'members': two numbers"),
        (lambda data: resealed(data, section_at("members", 1, -64)), "'members': two numbers"),
        (lambda data: resealed(data, section_at("members", 2, "0" * 63)), "and a SHA-256 are due"),
        (lambda data: resealed(data, section_at("members", 0, 0)), "'members' begins at byte"),
        (lambda data: resealed(data, section_at("skipped", 0, 2**70)), "'skipped' begins at byte"),
        (
            lambda data: resealed(data, lambda h: h["sections"].update(more=[0, 64, "0" * 64])),
            "'more' begins at byte",
        ),
        (lambda data: resealed(data, lambda h: h["sections"].pop("members")), "lacks a section"),
        (lambda data: resealed(data, lambda h: h.update(sections=[])), "broken|lacks"),
        (
            lambda data: resealed(data, lambda h: h["sections"].update(records=[2**62, 384, "x"])),
            r"has \d+ bytes instead of|broken",
        ),
        (
            lambda data: resealed(data, lambda h: h["sections"].update(records=[-64, 384, "x"])),
            "header is broken",
        ),
    ],
)
def test_broken_headers_are_refused(index, make, words):
    with pytest.raises(ShardError, match=rf"x\.index: .*({words}).*{WORDS}"):
        IndexFile("x.index", make(to_bytes(index)))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"offset": -1}, "'offset' or 'size'"),
        ({"offset": 2**62}, "after the end of its tar"),
        ({"size": 2**31}, "'offset' or 'size'"),
        ({"label": -2}, "'label'"),
        ({"label": MAX_LABEL + 1}, "'label'.*has 16777216, labels are from -1"),
        ({"size": 0}, "'offset' or 'size'"),
        ({"offset": 0}, "each at a multiple of 512 behind a header"),
        ({"label": -1}, "header does not fit"),
        ({"height": 0}, "outside what is decoded"),
        ({"height": 30_000, "width": 30_000}, "30000x30000 pixels"),
    ],
)
def test_records_out_of_range_are_refused(index, values, words):
    file = IndexFile("x.index", edited_record(to_bytes(index), 3, **values))
    with pytest.raises(ShardError, match=rf"{words}.*{WORDS}"):
        file.records  # noqa: B018


FORMS = {
    "binary": lambda index: IndexFile("x.index", to_bytes(index)).check(),
    "JSON": lambda index: open_index("x.index", sealed_json(json_content(index))),
}


def swapped(column: list[int]) -> list[int]:
    return [column[1], column[0], *column[2:]]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "places",
    [
        lambda offset, size: ([offset[0]] * len(offset), size),
        lambda offset, size: ([*offset[:-1], offset[0]], size),
        lambda offset, size: (swapped(offset), swapped(size)),
        lambda offset, size: (offset, [offset[1] - offset[0] - 511, *size[1:]]),
        lambda offset, size: ([*offset[:3], offset[2] + 512, *offset[4:]], size),
        lambda offset, size: ([at + 1 for at in offset], size),
        lambda offset, size: ([0, *offset[1:]], size),
    ],
    ids=[
        "all one",
        "twice",
        "another order",
        "over a header",
        "overlap",
        "shifted",
        "first header",
    ],
)
def test_each_image_is_listed_once_at_a_place_of_its_own(index, places, form):
    offset, size = places(index.columns["offset"], index.columns["size"])
    forged = replace(index, columns=index.columns | {"offset": offset, "size": size})
    with pytest.raises(ShardError, match=rf"x\.index: its column 'offset' is broken.*{WORDS}"):
        FORMS[form](forged)


@pytest.mark.parametrize("form", FORMS)
def test_one_image_many_times_is_refused(index, form):
    count = 1437
    forged = replace(
        index,
        keys=[f"{number:06d}" for number in range(count)],
        extensions=["jpg"] * count,
        columns={name: column[:1] * count for name, column in index.columns.items()},
        paths=None,
    )
    with pytest.raises(ShardError, match="images are listed once"):
        FORMS[form](forged)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("", "no key"),
        ("a/", "no key"),
        ("../../etc/passwd", "outside the archive"),
        ("/etc/passwd", "outside the archive"),
        ("a\\b", "outside the archive"),
        ("a\0b", "unprintable"),
        ("\x1b[2J", "unprintable"),
        (1, "comes twice"),
    ],
)
def test_names_that_no_tar_gives_are_refused(index, key, words, form):
    key = index.keys[key] if isinstance(key, int) else key
    forged = replace(
        index, keys=[key, *index.keys[1:]], extensions=[index.extensions[1]] * len(index)
    )
    with pytest.raises(ShardError, match=rf"x\.index: .*{words}.*{WORDS}"):
        FORMS[form](forged).members()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "skipped", [[(1, "x")], [("x",)], [("a", "b", "c")], ["ab"], [("x", [[]] * 3)]]
)
def test_what_is_skipped_is_pairs_of_texts(index, skipped, form):
    with pytest.raises(ShardError, match=rf"x\.index: .*skipped.* is broken.*{WORDS}"):
        FORMS[form](replace(index, skipped=skipped)).skipped()


def test_what_is_skipped_is_counted_in_the_header(index):
    data = resealed(to_bytes(index), lambda header: header.update(skipped=5))
    with pytest.raises(ShardError, match="skipped: is broken: 5 pairs"):
        IndexFile("x.index", data).skipped()


def test_paths_have_no_zeros(index):
    paths = ["a\0b", *index.paths[1:]]
    with pytest.raises(ShardError, match="holds a zero byte"):
        IndexFile("x.index", to_bytes(replace(index, paths=paths))).paths()


def test_an_index_has_a_largest_size(index, monkeypatch):
    monkeypatch.setattr("fastmoco_pipelines.formats.index_file.MAX_INDEX_BYTES", 100)
    monkeypatch.setattr("fastmoco_pipelines.formats.index_json.MAX_JSON_BYTES", 100)
    for open_form in FORMS.values():
        with pytest.raises(ShardError, match=r"x\.index: has .* bytes, an index .*at most 100"):
            open_form(index)


def test_an_identity_that_is_not_that_of_the_records_is_refused(index):
    data = resealed(to_bytes(index), lambda header: header.update(content="0" * 64))
    with pytest.raises(ShardError, match="header does not fit"):
        IndexFile("x.index", data).check()


def test_names_that_steer_a_terminal_are_refused(index):
    data = to_bytes(replace(index, keys=["\x1b[2Jx", *index.keys[1:]]))
    file = IndexFile("x.index", data)
    for use in (lambda: file.member(0), file.members):
        with pytest.raises(ShardError, match=r"x\.index: its names are broken"):
            use()


def test_names_out_of_place_are_refused(index):
    data = to_bytes(index)
    section = IndexFile("x", data).header.sections["members"]
    ends = np.frombuffer(data, "<u4", len(index) + 1, section.start).copy()
    for bad in (ends[::-1], ends + 1, np.where(ends == ends[3], 2**31, ends)):
        table = bad.astype("<u4").tobytes()
        new = table + data[section.start + len(table) : section.start + section.size]
        changed = data[: section.start] + new + data[section.start + section.size :]

        def edit(header, new=new):
            header["sections"]["members"][2] = hashlib.sha256(new).hexdigest()

        file = IndexFile("x", resealed(changed, edit))
        with pytest.raises(ShardError, match="its names are broken"):
            file.member(0)


def test_a_name_that_is_too_long_is_refused_when_it_is_written(index):
    with pytest.raises(ShardError, match="too long for an index"):
        to_bytes(replace(index, tar="x" * 5000))


def test_a_table_of_paths_that_is_too_short_is_refused(index):
    """The last section of the file, with a right hash."""
    whole = to_bytes(replace(index, paths=[f"{i}.jpg" for i in range(len(index))]))
    place = IndexFile("x", whole).header.sections["paths"]
    short = whole[place.start : place.start + 8]

    def edit(header):
        header["sections"]["paths"][1:] = [len(short), hashlib.sha256(short).hexdigest()]

    file = IndexFile("x.index", resealed(whole[: place.start + 8], edit))
    with pytest.raises(ShardError, match="its names are broken"):
        file.paths()
