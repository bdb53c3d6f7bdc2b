"""Sets of shards: which files a pattern names, what is read, and how damage is told."""

from __future__ import annotations

import os
import re
import shutil
import tarfile
import threading
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from fastmoco_pipelines.making.indexing import index_shards
from fastmoco_pipelines.sets import local_files, patterns
from fastmoco_pipelines.sets.patterns import expand_shards, is_remote
from fastmoco_pipelines.sets.shard_set import ShardError, ShardSet
from tests.pipelines.index_forms import json_of, put_json


@pytest.fixture
def folder(tmp_path):
    for name in (
        "train-000000.tar",
        "train-000001.tar",
        "train-000010.tar",
        "test-000000.tar",
        "notes.txt",
    ):
        (tmp_path / name).touch()
    return tmp_path


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("train-000001.tar", ["train-000001.tar"]),
        ("train-*.tar", ["train-000000.tar", "train-000001.tar", "train-000010.tar"]),
        ("train-{000000..000001}.tar", ["train-000000.tar", "train-000001.tar"]),
        ("{train,test}-000000.tar", ["test-000000.tar", "train-000000.tar"]),
        (
            "{train-00000{0..1},test-*}.tar",
            ["test-000000.tar", "train-000000.tar", "train-000001.tar"],
        ),
        ("{train,train}-000000.tar", ["train-000000.tar"]),
        ("*.tar", ["test-000000.tar", "train-000000.tar", "train-000001.tar", "train-000010.tar"]),
    ],
)
def test_patterns_name_files(folder, pattern, names):
    assert [path.name for path in expand_shards(f"{folder}/{pattern}")] == names
    assert [path.name for path in expand_shards(f"file://{folder}/{pattern}")] == names
    assert [path.name for path in expand_shards(f"file:{folder}/{pattern}")] == names


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("nothing-*.tar", "no file has such a name"),
        ("train-000007.tar", "there is no file"),
        ("train-{000000..000002}.tar", "there is no file .*train-000002.tar"),
        ("train-{5..1}.tar", "not a rising range"),
        ("train-{a..c}.tar", "not a rising range"),
        ("train-{0..99999999999}.tar", "not a rising range"),
        ("train-{0..²}.tar", "not a rising range"),
    ],
)
def test_patterns_without_files_are_named(folder, pattern, words):
    with pytest.raises(ValueError, match=words) as raised:
        expand_shards(f"{folder}/{pattern}")
    assert pattern in str(raised.value)
    (folder / "packed").mkdir()
    (folder / "packed" / "x.tar.gz").touch()
    with pytest.raises(ValueError, match=r"no \.tar but compressed ones \(x\.tar\.gz\): unpack"):
        expand_shards(str(folder / "packed"))
    (folder / "empty").mkdir()
    with pytest.raises(ValueError, match=r"holds no \.tar"):
        expand_shards(f"{folder}/empty")


def test_a_pattern_of_too_many_names_is_refused_before_they_are_all_made(monkeypatch):
    monkeypatch.setattr(patterns, "MAX_SHARDS", 10_000)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="names more than 10000 shards"):
            expand_shards("train-{0..99}{0..99}{0..99}.tar")
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("many", ["{a,b}" * 60, "{a,b,{c," * 15 + "}}" * 15, "{0..9}{a,b}" * 20])
def test_braces_are_counted_before_a_name_is_made(many, monkeypatch):
    monkeypatch.setattr(patterns, "_alternatives", None)
    with pytest.raises(ValueError, match="names more than 1000000 shards"):
        expand_shards(f"/data/{many}.tar")
    with pytest.raises(ValueError, match="names more than 1000000 shards"):
        patterns.expand_braces(many, f"https://host/{many}.tar")


def test_a_local_pattern_has_so_many_braces_too():
    with pytest.raises(ValueError, match="more than 64 braces"):
        expand_shards("/data/" + "{1..1}" * 1500)


@pytest.mark.parametrize("scheme", ["http", "https", "s3", "gs", "ftp", "HTTP", "unknown+x"])
def test_other_schemes_are_refused_without_printing_secrets(scheme):
    words = "not supported yet" if scheme in ("ftp", "unknown+x") else "this needs local files"
    with pytest.raises(ValueError, match=words) as raised:
        expand_shards(f"{scheme}://user:secret@host/train-000000.tar?token=secret")
    assert "secret" not in str(raised.value)


def test_commands_are_never_run(tmp_path, monkeypatch):
    marker = tmp_path / "marker"
    monkeypatch.setenv("GOPEN_REWRITE", f"/=pipe:touch {marker};")
    with pytest.raises(ValueError, match="never starts a command"):
        expand_shards(f"pipe:touch {marker}")
    with pytest.raises(ValueError, match="this machine"):
        expand_shards("file://otherhost/a.tar")
    assert not marker.exists()


def test_odd_characters_in_paths_are_taken_as_they_are(tmp_path, packed):
    odd = tmp_path / "a#b?c [1] {x} 100%"
    shutil.copytree(packed, odd)
    assert [path.parent for path in expand_shards(str(odd))] == [odd] * 3
    assert expand_shards(str(odd / "train-000000.tar")) == [odd / "train-000000.tar"]


def test_a_folder_of_several_sets_needs_a_choice(packed, image_folder, tmp_path):
    from fastmoco_pipelines.making.pack import pack_folder

    both = shutil.copytree(packed, tmp_path / "set")
    pack_folder(image_folder, both, prefix="test")
    with pytest.raises(
        ValueError, match=r"several sets: name one, .*test-\*\.tar or .*train-\*\.tar"
    ):
        expand_shards(str(both))


def test_reads_what_lies_in_the_tars(packed):
    expected = []
    for path in sorted(packed.glob("*.tar")):
        with tarfile.open(path) as tar:
            expected += [
                (m.name, tar.extractfile(m).read())
                for m in tar
                if m.name.endswith((".jpg", ".png", ".webp"))
            ]
    with ShardSet.open(str(packed)) as shards:
        assert len(shards) == len(shards.labels) == len(shards.sizes) == 45
        assert (shards.labels.dtype, shards.sizes.dtype, shards.sizes.shape) == (
            np.int64,
            np.int32,
            (45, 2),
        )
        assert shards.classes == ("cat", "dog", "owl")
        assert shards.keys == [f"{i:09d}" for i in range(45)]
        ids = np.random.default_rng(0).permutation(45)
        shards.will_need(ids)
        for sample_id, data in zip(ids, shards.read(ids), strict=True):
            name, content = expected[sample_id]
            assert data.dtype == np.uint8
            assert data.tobytes() == content
            where = f"train-0000{sample_id // 16:02d}.tar: {name}"
            assert shards.describe(sample_id) == f"{where} ({shards.path_of(sample_id)})"


def test_digest_is_the_identity_of_the_content(packed, image_folder, tmp_path):
    from fastmoco_pipelines.making.pack import pack_folder

    digest = ShardSet.open(str(packed)).digest
    assert re.fullmatch("[0-9a-f]{64}", digest)
    assert ShardSet.open(str(shutil.copytree(packed, tmp_path / "copy"))).digest == digest
    assert ShardSet.open(f"{packed}/train-{{000000..000001}}.tar").digest != digest
    pack_folder(image_folder, tmp_path / "other", seed=1)
    assert ShardSet.open(str(tmp_path / "other")).digest != digest


def test_open_files_are_bounded(packed, monkeypatch):
    monkeypatch.setattr(local_files, "MAX_OPEN_FILES", 2)

    def open_tars() -> int:
        links = [os.path.join("/proc/self/fd", name) for name in os.listdir("/proc/self/fd")]
        return sum(
            os.path.lexists(link) and os.readlink(link).startswith(str(packed)) for link in links
        )

    shards = ShardSet.open(str(packed))
    once = [data.tobytes() for data in shards.read(np.arange(45))]
    assert open_tars() == 2
    back_and_forth = np.arange(45).reshape(3, 15).T.ravel()
    assert [data.tobytes() for data in shards.read(back_and_forth)] == [
        once[i] for i in back_and_forth
    ]
    assert open_tars() == 2
    shards.close()
    assert open_tars() == 0
    assert shards.read(np.array([3]))[0].tobytes() == once[3]
    del shards
    assert open_tars() == 0


def test_one_thread_reads_ahead_while_another_reads_stand_ins(packed, monkeypatch):
    """Each closes the file that was not used for longest: a read must not meet a closed or a
    foreign descriptor."""
    monkeypatch.setattr(local_files, "MAX_OPEN_FILES", 1)
    shards, errors, over = ShardSet.open(str(packed)), [], threading.Event()
    once = [data.tobytes() for data in shards.read(np.arange(45))]

    def look_ahead() -> None:
        rng = np.random.default_rng(1)
        try:
            while not over.is_set():
                shards.will_need(rng.integers(0, 45, 8))
        except OSError as error:
            errors.append(error)

    thread = threading.Thread(target=look_ahead)
    thread.start()
    rng = np.random.default_rng(2)
    try:
        for _ in range(400):
            ids = rng.integers(0, 45, 8)
            assert [data.tobytes() for data in shards.read(ids)] == [once[i] for i in ids]
    finally:
        over.set()
        thread.join()
    assert not errors


def test_changed_bytes_are_named(packed, tmp_path):
    folder = Path(shutil.copytree(packed, tmp_path / "set"))
    # In the middle, where the hash of the ends does not look; damage after opening, which no
    # opening can see.
    shards = ShardSet.open(str(folder))
    offset, tar = shards.entry(20)["offset"], folder / "train-000001.tar"
    raw = bytearray(tar.read_bytes())
    raw[offset + 9] ^= 4
    tar.write_bytes(raw)
    shards.read(np.array([19, 21]))
    with pytest.raises(
        ShardError,
        match=r"train-000001\.tar: 000000020\.\w+ \(.*\): its bytes differ .*fastmoco data index",
    ):
        shards.read(np.array([19, 20, 21]))
    os.truncate(tar, offset + 5)
    with pytest.raises(
        ShardError, match=r"train-000001\.tar: 000000020\.\w+ \(.*\): the tar ends inside it"
    ):
        shards.read(np.array([20]))
    shards.close()
    tar.unlink()
    with pytest.raises(
        ShardError, match=r"train-000001\.tar: cannot be opened any more \(No such file"
    ):
        shards.read(np.array([20]))


def test_a_lost_shard_of_a_packed_set_is_noticed(packed, tmp_path):
    folder = Path(shutil.copytree(packed, tmp_path / "set"))
    (folder / "train-000001.tar").unlink()
    for pattern in (folder, folder / "train-*.tar"):
        with pytest.raises(
            ShardError, match=r"train-000001\.tar: is listed in manifest\.json but missing"
        ):
            ShardSet.open(str(pattern))
    assert len(ShardSet.open(f"{folder}/train-{{000000,000002}}.tar")) == 16 + 13


def test_a_subset_by_name_is_allowed(packed):
    assert len(ShardSet.open(f"{packed}/train-00000[01].tar")) == 32
    assert len(ShardSet.open(f"{packed}/train-000002.tar")) == 13


def test_an_index_that_lost_samples_contradicts_the_manifest(packed, tmp_path):
    folder = Path(shutil.copytree(packed, tmp_path / "set"))
    path = folder / "train-000000.tar"
    content = json_of(path)
    columns = ("key", "extension", "offset", "size", "crc32", "label", "height", "width", "path")
    put_json(path, content | {name: content[name][:-1] for name in columns})
    with pytest.raises(
        ShardError, match=r"train-000000\.tar: 15 samples, but 16 in manifest\.json"
    ):
        ShardSet.open(str(folder))


def test_sets_with_other_classes_do_not_mix(packed, noise_image, tmp_path):
    from fastmoco_pipelines.making.pack import pack_folder

    for name in ("ant", "bee"):
        (tmp_path / "src" / name).mkdir(parents=True)
        (tmp_path / "src" / name / "0.jpg").write_bytes(noise_image(0))
    pack_folder(tmp_path / "src", tmp_path / "out", prefix="insects")
    shutil.copytree(packed, tmp_path / "out2")
    with pytest.raises(ShardError, match="numbers its classes differently"):
        ShardSet.open(f"{tmp_path}/out{{/insects,2/train}}-000000.tar")


def test_an_index_with_a_bomb_is_refused(packed, tmp_path):
    folder = Path(shutil.copytree(packed, tmp_path / "set"))
    path = folder / "train-000000.tar"
    content = json_of(path)
    content["height"][3] = content["width"][3] = 30_000
    put_json(path, content)
    with pytest.raises(ShardError, match=r"train-000000\.tar: 000000003\.\w+: 30000x30000 pixels"):
        ShardSet.open(str(folder))


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_a_header_that_contradicts_the_index_is_refused(format, tmp_path, noise_image, write_tar):
    """Limits and crop windows rest on the index: its sizes may not be smaller than what the decoder
    will meet."""
    images = [(f"{i}.{format.lower()}", noise_image(i, 40, 56, format)) for i in range(3)]
    path = write_tar(
        tmp_path / "x.tar", [(name.replace("jpeg", "jpg"), data) for name, data in images]
    )
    index_shards(str(path))
    with ShardSet.open(str(path)) as shards:
        assert len(shards.read(np.arange(3))) == 3
    content = json_of(path)
    content["height"][1], content["width"][1] = 8, 9
    put_json(path, content)
    with ShardSet.open(str(path)) as shards:
        assert len(shards.read(np.array([0, 2]))) == 2
        with pytest.raises(
            ShardError,
            match=r"x\.tar: 1\.\w+: its header declares 56x40 pixels, the index 9x8: run `fastmo",
        ):
            shards.read(np.arange(3))


def test_shards_from_elsewhere_need_no_manifest(tmp_path, noise_image, write_tar):
    path = write_tar(
        tmp_path / "x.tar", [("a.jpg", noise_image(0)), ("a.cls", b"4"), ("b.txt", b"")]
    )
    with pytest.raises(ShardError, match="fastmoco data index"):
        ShardSet.open(str(path))
    index_shards(str(path))
    shards = ShardSet.open(str(path))
    assert (shards.classes, shards.labels.tolist(), shards.skipped) == ((), [4], 1)


@pytest.mark.parametrize(
    "pattern", ["{s3://b/a.tar", "{https://h/{{1..3}", "{https://h/a,{https://h/b}"]
)
def test_a_brace_that_is_not_closed_before_a_url_is_refused(pattern):
    with pytest.raises(ValueError, match="a brace is not closed"):
        is_remote(pattern)
    with pytest.raises(ValueError, match="more than 64 braces"):
        is_remote("{" * 3000 + pattern + "}" * 3000)
