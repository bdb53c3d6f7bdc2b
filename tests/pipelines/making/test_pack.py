"""Packing: the bytes arrive unchanged, shuffled, labelled; what is left out is listed."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastmoco_pipelines.making.pack import pack_folder
from fastmoco_pipelines.sets.shard_set import ShardSet


def content_of(pattern: str) -> list[tuple[int, bytes]]:
    with ShardSet.open(pattern) as shards:
        return list(
            zip(
                shards.labels.tolist(), map(bytes, shards.read(np.arange(len(shards)))), strict=True
            )
        )


def test_every_image_arrives_unchanged_under_its_class(image_folder, packed):
    files = sorted(image_folder.rglob("*.*"))
    labels = {"cat": 0, "dog": 1, "owl": 2}
    expected = [(labels[path.parent.name], path.read_bytes()) for path in files]
    got = content_of(str(packed))
    assert sorted(got) == sorted(expected)
    assert got != expected
    # Shuffled: neighbours in a shard come from any class.
    assert np.abs(np.diff([label for label, _ in got])).sum() > 15


def test_manifest_tells_what_was_packed(packed):
    entry = json.loads((packed / "manifest.json").read_text())["sets"]["train"]
    assert (entry["samples"], entry["classes"], entry["class_counts"]) == (
        45,
        ["cat", "dog", "owl"],
        [15, 15, 15],
    )
    assert [shard["samples"] for shard in entry["shards"]] == [16, 16, 13]
    for shard in entry["shards"]:
        raw = (packed / shard["name"]).read_bytes()
        assert (len(raw), hashlib.sha256(raw).hexdigest()) == (shard["bytes"], shard["sha256"])
    assert entry["options"] == {
        "max_side": None,
        "quality": 92,
        "shard_size_mb": 256,
        "shard_samples": 16,
        "seed": 0,
    }


def test_the_plain_webdataset_reader_sees_the_same(packed):
    import webdataset

    paths = [str(path) for path in sorted(packed.glob("*.tar"))]
    samples = list(webdataset.WebDataset(paths, shardshuffle=False))
    images = [
        (int(s["cls"]), next(s[kind] for kind in ("jpg", "png", "webp") if kind in s))
        for s in samples
    ]
    assert images == content_of(str(packed))
    assert [s["__key__"] for s in samples] == ShardSet.open(str(packed)).keys


def test_the_same_input_gives_the_same_bytes(image_folder, packed, tmp_path):
    report = pack_folder(image_folder, tmp_path / "again", shard_samples=16)
    for path in report.shards:
        assert path.read_bytes() == (packed / path.name).read_bytes()
    other = pack_folder(image_folder, tmp_path / "other", shard_samples=16, seed=1)
    assert sorted(content_of(other.pattern)) == sorted(content_of(report.pattern))
    assert content_of(other.pattern) != content_of(report.pattern)


def test_report_and_progress(image_folder, tmp_path):
    calls: list[tuple[int, int]] = []
    report = pack_folder(
        image_folder,
        tmp_path,
        prefix="val",
        progress=lambda done, total: calls.append((done, total)),
    )
    assert calls == [(i + 1, 45) for i in range(45)]
    assert report.pattern == f"{tmp_path}/val-*.tar"
    assert (report.samples, report.classes, report.skipped) == (45, ("cat", "dog", "owl"), ())
    assert [path.name for path in report.shards] == ["val-000000.tar"]
    assert report.total_bytes == report.shards[0].stat().st_size
    assert sorted(os.listdir(tmp_path)) == [
        "manifest.json",
        "val-000000.tar",
        "val-000000.tar.index",
    ]


def test_a_flat_folder_has_no_labels(noise_image, tmp_path):
    (tmp_path / "src").mkdir()
    for i in range(5):
        (tmp_path / "src" / f"{i}.JPEG").write_bytes(noise_image(i))
    report = pack_folder(tmp_path / "src", tmp_path / "out")
    assert (report.samples, report.classes) == (5, ())
    assert {label for label, _ in content_of(report.pattern)} == {-1}


def test_what_is_no_image_is_listed_with_its_reason(noise_image, tmp_path):
    src = tmp_path / "src"
    (src / "a" / "deep" / "er").mkdir(parents=True)
    (src / "a" / ".cache").mkdir()
    good = noise_image(0)
    files = {
        "a/good.jpg": good,
        "a/deep/er/good.PNG": noise_image(1, format="PNG"),
        "a/png_by_content.jpg": noise_image(2, format="PNG"),
        "a/.hidden.jpg": good,
        "a/.cache/x.jpg": good,
        "a/readme.txt": b"hello",
        "a/no_extension": b"no image",
        "a/backup.jpg~": good,
        "a/backup.jpg.BAK": good,
        "a/\udce9.jpg.1": noise_image(4),
        "a/with query.jpg?width=300": noise_image(5, format="PNG"),
        "a/0a1b2c": noise_image(6),
        "a/moving.gif": b"GIF89a",
        "a/gif.png": b"GIF89a" + bytes(100),
        "a/half.jpg": noise_image(3, 64, 64)[:-100],
        "a/empty.webp": b"",
        "a/arithmetic.jpg": good.replace(b"\xff\xc0\x00\x11\x08", b"\xff\xc9\x00\x11\x08"),
    }
    Image.open(
        io.BytesIO(files["a/arithmetic.jpg"])
    ).load()  # Pillow would let it pass; DALI cannot decode it
    for name, content in files.items():
        (src / name).write_bytes(content)
    (src / "a" / "link.jpg").symlink_to(src / "a" / "good.jpg")
    (src / "loop").symlink_to(src)
    os.mkfifo(src / "a" / "pipe.jpg")
    report = pack_folder(src, tmp_path / "out")
    assert report.samples == 6
    assert report.notes[-1].startswith("3 images by content, whose names have no ending")
    reasons = dict(report.skipped)
    assert len(report.skipped) == len(reasons) == 14
    assert reasons.pop("a/half.jpg").startswith("it cannot be decoded")
    assert reasons == {
        "a/.hidden.jpg": "hidden",
        "a/.cache": "hidden",
        "a/readme.txt": "no image by its name",
        "a/no_extension": "no image by its name",
        "a/backup.jpg~": "no image by its name",
        "a/backup.jpg.BAK": "no image by its name",
        "a/moving.gif": "no image by its name",
        "a/gif.png": "its content is no JPEG, PNG or WebP but GIF: convert it to JPEG or PNG",
        "a/empty.webp": "it is empty",
        "a/arithmetic.jpg": "JPEG of an uncommon kind (lossless or arithmetic coding): save it "
        "again as an ordinary JPEG",
        "a/link.jpg": "a symbolic link",
        "loop": "a symbolic link",
        "a/pipe.jpg": "no plain file",
    }
    with ShardSet.open(report.pattern) as shards:
        extensions = sorted(shards.entry(i)["extension"] for i in range(6))
    assert extensions == ["jpg", "jpg", "jpg", "png", "png", "png"]
    stored = json.loads((tmp_path / "out" / "manifest.json").read_text())["sets"]["train"][
        "skipped"
    ]
    assert [tuple(pair) for pair in stored] == list(report.skipped)


def test_links_are_followed_when_asked_and_never_round_and_round(noise_image, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "x.jpg").write_bytes(noise_image(0))
    src = tmp_path / "src"
    (src / "cat").mkdir(parents=True)
    (src / "cat" / "a.jpg").symlink_to(tmp_path / "elsewhere" / "x.jpg")
    (src / "cat" / "broken.jpg").symlink_to(tmp_path / "nowhere")
    (src / "dog").symlink_to(tmp_path / "elsewhere")
    (src / "loop").symlink_to(src)
    report = pack_folder(src, tmp_path / "out", follow_links=True)
    assert (report.samples, report.classes) == (2, ("cat", "dog"))
    assert dict(report.skipped) == {
        "cat/broken.jpg": "a broken link",
        "loop": "a link to a folder that is read already",
    }


def test_max_side_bounds_the_longer_side(noise_image, tmp_path):
    (tmp_path / "src").mkdir()
    small = noise_image(0, 20, 30)
    (tmp_path / "src" / "small.jpg").write_bytes(small)
    for name, height, width in (("wide", 50, 100), ("tall", 90, 45), ("panorama", 40, 160)):
        (tmp_path / "src" / f"{name}.png").write_bytes(noise_image(1, height, width, "PNG"))
    report = pack_folder(tmp_path / "src", tmp_path / "out", max_side=30, quality=80)
    with ShardSet.open(report.pattern) as shards:
        assert sorted(map(tuple, shards.sizes.tolist())) == [(8, 30), (15, 30), (20, 30), (30, 15)]
        assert small in map(bytes, shards.read(np.arange(4)))


def test_shards_are_split_by_size(noise_image, tmp_path):
    (tmp_path / "src").mkdir()
    for i in range(4):
        Image.fromarray(
            np.random.default_rng(i).integers(0, 256, (400, 600, 3), dtype=np.uint8)
        ).save(tmp_path / "src" / f"{i}.png")
    report = pack_folder(tmp_path / "src", tmp_path / "out", shard_size_mb=1)
    assert [len(ShardSet.open(str(path))) for path in report.shards] == [2, 2]


def test_a_set_is_not_overwritten_unless_told(image_folder, packed, tmp_path):
    out = Path(shutil.copytree(packed, tmp_path / "out"))
    with pytest.raises(FileExistsError, match=r"already holds 3 shard\(s\) train-\*\.tar"):
        pack_folder(image_folder, out)
    assert content_of(str(out)) == content_of(str(packed))
    report = pack_folder(image_folder, out, overwrite=True, seed=4)
    assert sorted(os.listdir(out)) == [
        "manifest.json",
        "train-000000.tar",
        "train-000000.tar.index",
    ]
    assert (
        ShardSet.open(str(out)).digest
        == ShardSet.open(report.pattern).digest
        != ShardSet.open(str(packed)).digest
    )


def test_sets_of_a_folder_share_their_class_numbers(noise_image, packed, tmp_path):
    out = Path(shutil.copytree(packed, tmp_path / "out"))
    (tmp_path / "src" / "owl").mkdir(parents=True)
    (tmp_path / "src" / "owl" / "0.jpg").write_bytes(noise_image(0))
    report = pack_folder(
        tmp_path / "src", out, prefix="test"
    )  # lacks cats and dogs, and owls still are 2
    assert report.classes == ("cat", "dog", "owl")
    assert [label for label, _ in content_of(report.pattern)] == [2]
    (tmp_path / "src" / "yak").mkdir()
    (tmp_path / "src" / "yak" / "0.jpg").write_bytes(noise_image(0))
    with pytest.raises(ValueError, match=r"classes=\['yak'\]"):
        pack_folder(tmp_path / "src", out, prefix="more")


def test_nothing_is_left_behind_by_a_failure(image_folder, tmp_path):
    def interrupt(done: int, total: int) -> None:
        if done == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack_folder(image_folder, tmp_path / "out", progress=interrupt)
    assert not (tmp_path / "out").exists()


def test_the_environment_cannot_make_packing_run_a_command(image_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("GOPEN_REWRITE", f"{tmp_path}=pipe:touch {tmp_path}/marker;")
    pack_folder(image_folder, tmp_path / "out")
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prefix": "../up"}, "prefix"),
        ({"prefix": "a-b"}, "prefix"),
        ({"max_side": 0}, "max_side=0"),
        ({"quality": 0}, "quality=0"),
        ({"shard_size_mb": 0}, "shard_size_mb=0"),
        ({"shard_samples": 0}, "shard_samples=0"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_options_out_of_range_are_named(image_folder, tmp_path, options, words):
    with pytest.raises(ValueError, match=words):
        pack_folder(image_folder, tmp_path, **options)


def test_folders_that_cannot_be_packed_are_named(noise_image, tmp_path):
    with pytest.raises(ValueError, match="there is no such folder"):
        pack_folder(tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "src" / "a").mkdir(parents=True)
    (tmp_path / "src" / "notes.txt").touch()
    with pytest.raises(
        ValueError, match=r"holds no \.jpg, \.jpeg, \.png, \.webp, .*\(1 other file: 1 \.txt\)"
    ):
        pack_folder(tmp_path / "src", tmp_path / "out")
    (tmp_path / "src" / "a" / "bad.jpg").write_bytes(b"no image")
    with pytest.raises(
        ValueError, match=r"none of its 1 image can be used: a/bad\.jpg: its content"
    ):
        pack_folder(tmp_path / "src", tmp_path / "out")
    (tmp_path / "src" / "top.jpg").write_bytes(noise_image(0))
    with pytest.raises(ValueError, match=r"1 image of its own \(.* beside folders"):
        pack_folder(tmp_path / "src", tmp_path / "out")
