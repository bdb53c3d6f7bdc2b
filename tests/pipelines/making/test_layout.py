"""Folders as people have them: what is said about them, and what is refused."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from fastmoco_pipelines.making.sources import find_sources


def touch(folder: Path, *names: str) -> Path:
    """Empty files; nothing here opens one."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("/"):
            path.mkdir(exist_ok=True)
        else:
            path.touch()
    return folder


def notes(folder: Path, **options: bool) -> str:
    return "\n".join(find_sources(folder, **({"follow_links": False} | options)).notes)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        # Parts of a set: with class folders, flat, below a wrapper, by other names.
        (
            ["train/cat/0.jpg", "train/dog/0.jpg", "val/cat/1.jpg"],
            r"'train' and 'val' look like parts .* taken for classes here.*data pack .*/s/train OUT"
            r" --prefix train; fastmoco data pack .*/s/val OUT --prefix val\. Or train",
        ),
        (["test/0.jpg", "training/1.jpg"], r"--prefix training; .*--prefix test\. Or"),
        (["train2017/0.jpg", "val2017/0.jpg", "annotations/a.json"], "'train2017' and 'val2017'"),
        (
            ["Set/train/a/0.jpg", "Set/held-out/a/0.jpg"],
            r"taken for one class, 'Set',.*held_out\. Or",
        ),
        (["unlabeled/0.jpg", "dev/x/0.jpg", "other/0.jpg"], "'dev' and 'unlabeled' look like"),
        (["train/cat/0.jpg", "train/dog/0.jpg"], r"in the folder 'train', which is one class.*"),
        # Wrappers.
        (["d/cat/0.jpg", "d/dog/0.jpg"], r"'d', so that there is one class.*2 folders.*s/d OUT"),
        (["d/d/cat/0.jpg", "d/d/dog/0.jpg"], r"folder 'd/d'.*data pack .*/s/d/d OUT"),
        (["images/0.jpg", "labels/0.txt"], r"'images', so that there is one class.*/s/images OUT"),
        (["pets/cat/0.jpg", "pets/dog/0.jpg", "cars/vw/0.jpg"], r"the images are in 3 folders"),
        # Annotations with pictures, empty classes.
        (["img/0.jpg", "masks/0.png"], "'masks' is named like annotations"),
        (["cat/0.jpg", "dog/0.jpg", "owl/", "yak/"], "'owl' and 'yak' hold no image"),
        # Other formats beside those that are taken.
        (["a/0.jpg", "a/1.HEIC", "b/2.gif", "b/1.jpg"], r"2 images .* \(1 \.heic, 1 \.gif\)"),
        (["a/0.jpg", "b/1.jpg", "b/more.zip", "b/x.tar"], "2 archives left out"),
    ],
)
def test_unusual_folders_are_described_with_the_cure(tmp_path, names, said):
    assert re.search(said, notes(touch(tmp_path / "s", *names)), re.MULTILINE)


@pytest.mark.parametrize(
    "names",
    [
        ["cat/0.jpg", "dog/0.jpg"],
        ["0.jpg", "1.jpg", "readme.txt"],
        ["cat/x/0.jpg", "cat/0.jpg", "dog/y/0.jpg"],
        ["train/0.jpg", "car/0.jpg", "bus/0.jpg"],  # a class named train
        ["cat/0.jpg", "dog/0.jpg", ".git/x", "cat/notes.txt"],
    ],
)
def test_usual_folders_get_no_note(tmp_path, names):
    assert notes(touch(tmp_path, *names)) == ""


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["a.heic", "b.heic", "c.avif"], r"\(3 other files: 2 \.heic, 1 \.avif\): convert \.heic"),
        (["x.zip"], r"\(1 other file: 1 \.zip\): unpack the archive first"),
        (["x.tar", "y.tar"], r"unpack the tars, or index them .*: fastmoco data index .*/\*\.tar'"),
        (["a.parquet"], "write the images out as files, or as tars"),
        ([".a.jpg", ".b/c.jpg", "noend"], r"\(2 hidden files, 1 other file: 1 without\)"),
        (["a/", "b/"], r"\(2 empty folders\)"),
        ([], "it is empty"),
        (["@eaDir/a.jpg/SYNO.jpg", "__MACOSX/x.jpg"], r"\(2 system folders\)"),
        (["0.jpg", "cat/1.jpg"], r"holds 1 image of its own \('0\.jpg', \.\.\.\) beside folders"),
    ],
)
def test_folders_that_are_refused_are_described_too(tmp_path, names, said):
    (tmp_path / "s").mkdir()
    with pytest.raises(ValueError, match=said):
        find_sources(touch(tmp_path / "s", *names), follow_links=False)


def test_links_are_counted_and_followed_when_asked(tmp_path):
    store = touch(tmp_path / "store", "x.jpg", "deep/y.jpg", "deep/z.jpg")
    src = touch(tmp_path / "src", "cat/", "dog/")
    (src / "cat" / "0.jpg").symlink_to(store / "x.jpg")
    (src / "cat" / "broken.jpg").symlink_to(store / "nothing.jpg")
    (src / "dog" / "all").symlink_to(store / "deep")
    (src / "loop.jpg").symlink_to("loop.jpg")
    (src / "dog" / "up").symlink_to("..")
    with pytest.raises(ValueError, match=r"\(5 symbolic links\): `.* --follow-links` reads"):
        find_sources(src, follow_links=False)
    found = find_sources(src, follow_links=True)
    assert [image.name for image in found.images] == ["cat/0.jpg", "dog/all/y.jpg", "dog/all/z.jpg"]
    assert dict(found.skipped) == {
        "cat/broken.jpg": "a broken link",
        "loop.jpg": "a broken link",
        "dog/up": "a link to a folder that is read already",
    }
    touch(src, "dog/1.jpg", "cat/2.jpg")
    os.link(store / "x.jpg", src / "cat" / "hard.jpg")
    assert "5 symbolic links left out: `fastmoco data pack --follow-links` reads" in notes(src)
    (tmp_path / "link").symlink_to(src)
    assert len(find_sources(tmp_path / "link", follow_links=False).images) == 3


def test_two_links_to_one_folder_are_two_classes(tmp_path):
    src = touch(tmp_path / "src", "a/0.jpg", "z/")
    (src / "b").symlink_to("a")
    (src / "0").symlink_to("a")
    found = find_sources(src, follow_links=True)
    assert found.classes == ("0", "a", "b")
    assert found.skipped == []


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("x.zip", "is a file, not a folder: unpack it first"),
        ("x.tar", "unpack it, or index it as it is: fastmoco data index"),
        ("x.jpg", "give the folder of the images"),
    ],
)
def test_files_in_place_of_a_folder_are_refused_with_the_cure(tmp_path, name, said):
    touch(tmp_path, name)
    with pytest.raises(ValueError, match=said):
        find_sources(tmp_path / name, follow_links=False)
    (tmp_path / "link").symlink_to("gone")
    with pytest.raises(ValueError, match="is a link to 'gone', which is not there"):
        find_sources(tmp_path / "link", follow_links=False)
    with pytest.raises(ValueError, match="no such folder: a URL; give a folder"):
        find_sources(Path("s3://bucket/images"), follow_links=False)
