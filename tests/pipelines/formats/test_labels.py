"""Shards that nobody packed with fastmoco: keys of several parts, every image extension, labels
from texts or none."""

from __future__ import annotations

import json
import shutil
import subprocess
import tarfile

import pytest

from fastmoco_pipelines.errors import ShardError
from fastmoco_pipelines.formats.index import read_index
from fastmoco_pipelines.formats.labels import LabelRule
from fastmoco_pipelines.formats.manifest import read_sets
from fastmoco_pipelines.formats.members import group_members, split_name
from fastmoco_pipelines.formats.tar import TarMember
from fastmoco_pipelines.making.indexing import index_shards
from fastmoco_pipelines.sets.shard_set import ShardSet


def labelled(write_tar, path, image, texts: list[bytes | None], extension: str):
    """A tar whose i-th image has this text beside it."""
    members = []
    for i, text in enumerate(texts):
        members.append((f"{i:03d}.jpg", image(i)))
        if text is not None:
            members.append((f"{i:03d}.{extension}", text))
    return write_tar(path, members)


@pytest.mark.parametrize(
    ("name", "key", "extension"),
    [
        ("000123.rgb.jpg", "000123", "rgb.jpg"),
        ("a/b/000123.jpg", "a/b/000123", "jpg"),
        ("a.b/c.d/000123.seg.PNG", "a.b/c.d/000123", "seg.PNG"),
        ("./x.jpg", "./x", "jpg"),
        ("plain", "plain", ""),
    ],
)
def test_the_key_ends_at_the_first_dot_of_the_file_name(name, key, extension):
    assert split_name(name) == (key, extension)


def test_keys_agree_with_webdataset():
    from webdataset.tariterators import base_plus_ext

    for name in ("000123.rgb.jpg", "a/b/000123.jpg", "a.b/c/1.x.y.webp", "./x.jpg"):
        assert split_name(name) == base_plus_ext(name)


def members(*names: str) -> list[TarMember]:
    return [TarMember(name, "", 1024 * i, 10) for i, name in enumerate(names)]


def test_a_plain_extension_is_the_image_of_several():
    content = group_members(members("1.depth.png", "1.jpg", "1.json", "2.rgb.webp", "2.thumb.webp"))
    assert [(s.key, s.extension) for s in content.samples if not s.kind] == [
        ("1", "jpg"),
        ("2", "rgb.webp"),
    ]
    assert [name for name, _ in content.others] == ["1.depth.png", "2.thumb.webp"]


def test_every_extension_in_any_case(tmp_path, write_tar, noise_image):
    kinds = {
        "a.jpg": "JPEG",
        "b.JPEG": "JPEG",
        "c.Png": "PNG",
        "d.webp": "WEBP",
        "e.cam0.JPG": "JPEG",
        "f.png": "JPEG",
    }
    images = [(name, noise_image(i, format=kind)) for i, (name, kind) in enumerate(kinds.items())]
    path = write_tar(tmp_path / "x.tar", images)
    report = index_shards(str(path))
    assert (report.samples, report.labels) == (6, None)
    index = read_index(path)
    assert [index.member(i) for i in range(6)] == list(kinds)
    assert ShardSet.open(str(path)).labels.tolist() == [-1] * 6


@pytest.mark.parametrize(
    ("extension", "texts", "labels"),
    [
        ("cls", [b"3", b" 0\n", None], [3, 0, -1]),
        ("json", [b'{"label": 5, "w": 1}', b'{"label": 0}', b'{"w": 2}'], [5, 0, -1]),
        ("txt", [b"7", b"12\n", None], [7, 12, -1]),
        ("txt", [b"a photo of a cat", b"dogs\nand more", b"another caption"], [-1, -1, -1]),
        # short and of one line, but hardly any comes twice
        ("txt", [b"a cat", b"two dogs", b"an owl"], [-1, -1, -1]),
    ],
)
def test_numbers_are_found_by_themselves(
    tmp_path, write_tar, noise_image, extension, texts, labels
):
    path = labelled(write_tar, tmp_path / "x.tar", noise_image, texts, extension)
    report = index_shards(str(path))
    assert ShardSet.open(str(path)).labels.tolist() == labels
    assert report.labels == (extension if max(labels) >= 0 else None)
    assert report.skipped == ()
    assert ("captions" in report.note) == (max(labels) < 0)
    assert not (tmp_path / "manifest.json").exists()


def test_class_names_are_numbered_over_all_shards(tmp_path, write_tar, noise_image):
    """Sorted, whatever shard they are in; the manifest keeps them and the loader reads them
    there."""
    for number, names in enumerate((["owl", "cat", "owl"], ["dog", "cat", "dog"])):
        labelled(
            write_tar,
            tmp_path / f"set-{number:04d}.tar",
            noise_image,
            [n.encode() for n in names],
            "txt",
        )
    report = index_shards(str(tmp_path))
    assert (report.labels, report.classes, report.labelled) == ("txt", ("cat", "dog", "owl"), 6)
    shards = ShardSet.open(str(tmp_path))
    assert shards.classes == ("cat", "dog", "owl")
    assert shards.labels.tolist() == [2, 0, 2, 1, 0, 1]
    entry = read_sets(tmp_path)["set"]
    assert (entry["samples"], entry["class_counts"]) == (6, [2, 2, 2])
    assert [shard["samples"] for shard in entry["shards"]] == [3, 3]
    assert index_shards(str(tmp_path)) == report  # again: the same
    # Another rule: the names go, and with them the set.
    index_shards(str(tmp_path), rule=LabelRule(source="none"))
    assert ShardSet.open(str(tmp_path)).labels.tolist() == [-1] * 6
    assert "set" not in read_sets(tmp_path)


def test_parts_of_a_folder_are_sets_of_one_numbering(tmp_path, write_tar, noise_image):
    """Also where the first one lacks classes, and a name comes in another Unicode form."""
    texts = {"test-00": "\u00fcber|zoo|zoo", "train-00": "u\u0308ber|cat|zoo"}
    for name, words in texts.items():
        names = [word.encode() for word in words.split("|")] * 2
        labelled(write_tar, tmp_path / f"{name}.tar", noise_image, names, "txt")
    assert index_shards(str(tmp_path)).classes == ("cat", "zoo", "\u00fcber")
    sets = read_sets(tmp_path)
    assert {name: entry["class_counts"] for name, entry in sets.items()} == {
        "test": [0, 4, 2],
        "train": [2, 2, 2],
    }
    for name, labels in (("test", [2, 1, 1] * 2), ("train", [2, 0, 1] * 2)):
        with ShardSet.open(f"{tmp_path}/{name}-*.tar") as shards:
            assert shards.labels.tolist() == labels


def test_a_second_set_keeps_the_numbers_of_the_first(tmp_path, write_tar, noise_image):
    labelled(write_tar, tmp_path / "train-00.tar", noise_image, [b"cat", b"dog", b"owl"] * 2, "txt")
    index_shards(f"{tmp_path}/train-*.tar")
    labelled(
        write_tar, tmp_path / "test-00.tar", noise_image, [b"owl", b"dog", b"owl", b"dog"], "txt"
    )
    index_shards(f"{tmp_path}/test-*.tar")
    assert ShardSet.open(f"{tmp_path}/test-00.tar").labels.tolist() == [2, 1, 2, 1]
    labelled(write_tar, tmp_path / "more-00.tar", noise_image, [b"emu"] * 4, "txt")
    with pytest.raises(ShardError, match=r"classes=\['emu'\]: not among the 3 classes"):
        index_shards(f"{tmp_path}/more-*.tar")


def test_a_named_field_holds_numbers_or_names(tmp_path, write_tar, noise_image):
    texts = [
        json.dumps({"label": 9, "species": name, "id": i}).encode()
        for i, name in enumerate(("bee", "ant", "bee"))
    ]
    path = labelled(write_tar, tmp_path / "x.tar", noise_image, texts, "json")
    assert index_shards(str(path), rule=LabelRule(source="json", field="species")).classes == (
        "ant",
        "bee",
    )
    assert ShardSet.open(str(path)).labels.tolist() == [1, 0, 1]
    index_shards(str(path), rule=LabelRule(source="json", field="id"))
    assert ShardSet.open(str(path)).labels.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("source", "extension", "text"),
    [
        ("json", "json", b'{"label": 1.5}'),
        ("json", "json", b'{"label": true}'),
        ("json", "json", b'{"label": -7}'),
        ("json", "json", b'{"label": 99999999999}'),
        ("json", "json", b"[1]"),
        ("json", "json", b"{broken"),
        ("json", "json", b"[" * 100_000),
        ("json", "json", b'{"label": "a\\u001b[2Jb"}'),
        ("txt", "txt", b"two\nlines"),
        ("txt", "txt", b"x" * 500),
        ("txt", "txt", b"-2"),
        ("cls", "cls", b"2.5"),
        ("cls", "cls", b"2147483648"),
    ],
)
def test_a_text_that_is_no_label_is_named_where_it_was_asked_for(
    tmp_path, write_tar, noise_image, source, extension, text
):
    path = labelled(write_tar, tmp_path / "x.tar", noise_image, [text], extension)
    with pytest.raises(ShardError, match=rf"x\.tar: 000\.{extension}: ") as raised:
        index_shards(str(path), rule=LabelRule(source=source))
    assert str(raised.value).isprintable()
    index_shards(str(path), rule=LabelRule(source="none"))


@pytest.mark.parametrize(
    ("extension", "text", "label"),
    [
        ("cls", b"-1", -1),
        ("cls", b"-1.0\n", -1),
        ("cls", b"", -1),
        ("cls", b" \r\n", -1),
        ("cls", b"None", -1),
        ("cls", b"null", -1),
        ("cls", b"nan", -1),
        ("cls", b"7.0", 7),
        ("cls", b"+7\r\n", 7),
        ("cls", b"0007\0", 7),
        ("cls", "\ufeff7\r\n".encode(), 7),
        ("cls", "7".encode("utf-16"), 7),
        ("txt", b"-1", -1),
        ("txt", b"NaN", -1),
        ("txt", "\ufeff7".encode(), 7),
        ("json", b'{"label": 7.0}', 7),
        ("json", b'{"label": "7.0"}', 7),
        ("json", b'{"label": -1.0}', -1),
        ("json", b'{"label": "-1"}', -1),
        ("json", b'{"label": "None"}', -1),
        ("json", b'{"label": NaN}', -1),
        ("json", b'{"label": null}', -1),
        ("json", '\ufeff{"label": 7}'.encode(), 7),
    ],
)
def test_numbers_and_their_absence_in_all_their_spellings(
    tmp_path, write_tar, noise_image, extension, text, label
):
    good = b'{"label": %d}' if extension == "json" else b"%d"
    path = labelled(
        write_tar, tmp_path / "x.tar", noise_image, [good % 3, text, good % 0], extension
    )
    for source in ("auto", extension):
        report = index_shards(str(path), rule=LabelRule(source=source))
        assert (report.classes, report.warnings) == ((), ())
        assert ShardSet.open(str(path)).labels.tolist() == [3, label, 0]


@pytest.mark.parametrize(
    ("extension", "text", "words"),
    [
        ("cls", b"cat", "class name"),
        ("cls", b"-7", "whole number"),
        ("cls", b"2.5", "whole number"),
        ("cls", b"99999999999", "the largest label is 16777215"),
        ("cls", b"\x93NUMPY\1\0", "whole number"),
        ("json", b'{"label": 1e99}', "the largest label is 16777215"),
        ("json", b'{"label": [2]}', "whole number"),
        ("json", b"{broken", "no valid JSON"),
    ],
)
def test_a_bad_label_costs_one_image_its_label_and_is_counted(
    tmp_path, write_tar, noise_image, extension, text, words
):
    good = b'{"label": 1}' if extension == "json" else b"1"
    path = labelled(write_tar, tmp_path / "x.tar", noise_image, [good, text, good], extension)
    report = index_shards(str(path))
    assert (report.samples, report.labelled, report.classes) == (3, 2, ())
    assert ShardSet.open(str(path)).labels.tolist() == [1, -1, 1]
    (warning,) = report.warnings
    assert warning.startswith("1 text is no label, and ")
    assert f"x.tar: 001.{extension}: " in warning
    assert words in warning
    with pytest.raises(ShardError, match=rf"x\.tar: 001\.{extension}: "):
        index_shards(str(path), rule=LabelRule(source=extension))


def test_words_in_a_cls_are_class_names(tmp_path, write_tar, noise_image):
    texts = [b"dog", b"cat\n", b"dog", b"-1"]
    path = labelled(write_tar, tmp_path / "x.tar", noise_image, texts, "cls")
    report = index_shards(str(path))
    assert (report.labels, report.classes, report.labelled) == ("cls", ("cat", "dog"), 3)
    assert ShardSet.open(str(path)).labels.tolist() == [1, 0, 1, -1]


@pytest.mark.parametrize("root", ["", "./", "photos/train/"])
def test_folders_in_a_tar_are_classes_when_asked(tmp_path, write_tar, noise_image, root):
    names = ["dog/2", "cat/10", "dog/1"]
    members = [(f"{root}{name}.jpg", noise_image(i)) for i, name in enumerate(names)]
    path = write_tar(tmp_path / "x.tar", members)
    report = index_shards(str(path))
    assert report.labels is None
    assert "2 folders (cat, dog" in report.note
    assert "--labels folder" in report.note
    report = index_shards(str(path), rule=LabelRule(source="folder"))
    assert (report.labels, report.classes, report.labelled) == ("folder", ("cat", "dog"), 3)
    assert ShardSet.open(str(path)).labels.tolist() == [1, 0, 1]


def test_members_of_other_tools(tmp_path, write_tar, noise_image):
    """Odd names and types: used where they are images, else left out for a true reason."""
    members = [
        ("a.image", noise_image(0)),
        ("b.IMG", noise_image(1, format="PNG")),
        ("c.jfif", noise_image(2)),
        ("ni\udcf1o.jpg", noise_image(3)),  # in Latin-1
        ("d.gif", b"GIF89a"),
        ("e.jpg", {"type": tarfile.LNKTYPE, "linkname": "a.image"}),
        ("f.jpg", {"type": tarfile.SYMTYPE, "linkname": "a.image"}),
        ("g.jpg", noise_image(4)),
        ("g.jpg", noise_image(4)),
        ("h.jpg", noise_image(5)),
        ("h.png", noise_image(6, format="PNG")),
        ("._a.jpg", b"of a Mac"),
    ]
    path = write_tar(tmp_path / "x.tar", members)
    report = index_shards(str(path))
    index = read_index(path)
    assert [index.member(i) for i in range(len(index))] == [
        *("a.image", "b.IMG", "c.jfif", "ni\xf1o.jpg", "g.jpg", "h.jpg")
    ]
    assert {member: reason for _, member, reason in report.skipped} == {
        "d.gif": "gif is not read, only JPEG, PNG and WebP",
        "e.jpg": "a hard link: only plain files are read, so write the tar with --hard-dereference",
        "f.jpg": "a symbolic link: only plain files are read, so write the tar with --dereference",
        "g.jpg": "a second image of the same key: its name comes twice in the tar",
        "h.png": "a second image of the same key",
        "._a.jpg": "a hidden file",
    }
    # Images whose names do not say so are no image, but the cure is named.
    path = write_tar(tmp_path / "y.tar", [("a.bin", noise_image(0)), ("b.pyd", noise_image(1))])
    with pytest.raises(
        ShardError, match=r"content of a\.bin is an image: write the tar with names"
    ):
        index_shards(str(path))


def test_a_foreign_manifest_is_not_overwritten(tmp_path, write_tar, noise_image):
    labelled(write_tar, tmp_path / "x.tar", noise_image, [b"cat"] * 4, "txt")
    (tmp_path / "manifest.json").write_text('{"made by": "somebody else"}')
    with pytest.raises(ShardError, match="another program"):
        index_shards(str(tmp_path / "x.tar"))
    assert "somebody else" in (tmp_path / "manifest.json").read_text()


def test_shards_of_webdatasets_own_writer(tmp_path, noise_image):
    import webdataset

    with webdataset.ShardWriter(str(tmp_path / "wds-%04d.tar"), maxcount=4, verbose=0) as writer:
        for i in range(6):
            meta = {"label": i % 3, "caption": "a photo"}
            writer.write(
                {"__key__": f"part/{i:05d}", "jpg": noise_image(i), "json": meta, "txt": "a photo"}
            )
    report = index_shards(str(tmp_path))
    assert (report.shards, report.samples, report.labels) == (2, 6, "json")
    shards = ShardSet.open(str(tmp_path))
    assert shards.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert shards.keys[0] == "part/00000"


@pytest.mark.skipif(shutil.which("tar") is None, reason="needs tar(1)")
@pytest.mark.parametrize("layout", ["gnu", "posix", "ustar", "v7"])
def test_tars_of_the_command_line(tmp_path, noise_image, layout):
    long = "n" * (60 if layout == "v7" else 90)
    for i in range(4):
        (tmp_path / "src" / long).mkdir(parents=True, exist_ok=True)
        (tmp_path / "src" / long / f"{i}.jpg").write_bytes(noise_image(i))
        (tmp_path / "src" / long / f"{i}.cls").write_bytes(b"%d" % i)
    tar = tmp_path / "x.tar"
    subprocess.run(
        [
            "tar",
            f"--format={layout}",
            "--sort=name",
            "-C",
            str(tmp_path / "src"),
            "-cf",
            str(tar),
            ".",
        ],
        check=True,
    )
    assert index_shards(str(tar)).samples == 4
    shards = ShardSet.open(str(tar))
    assert shards.labels.tolist() == [0, 1, 2, 3]
    assert shards.keys[3] == f"./{long}/3"
