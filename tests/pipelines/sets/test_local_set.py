"""Opening local sets: headers alone, in memory that does not grow; the JSON form is converted."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import stat
import threading
from pathlib import Path

import numpy as np
import pytest

from fastmoco_pipelines.errors import LostIndexError, ShardError
from fastmoco_pipelines.files import whole
from fastmoco_pipelines.formats.index import (
    index_path,
    json_path,
    read_index,
    tar_hash,
    write_index,
    write_json_index,
)
from fastmoco_pipelines.formats.index_file import IndexFile
from fastmoco_pipelines.formats.quarantine import CheckedTar, Quarantine, quarantine_path
from fastmoco_pipelines.healing import healer
from fastmoco_pipelines.healing.bad_samples import BadSamples
from fastmoco_pipelines.healing.culprit import Suspects
from fastmoco_pipelines.sets import host_table, local_files, local_set, records, shard_set
from fastmoco_pipelines.sets.records import SHARD
from fastmoco_pipelines.sets.shard_set import ShardSet


@pytest.fixture
def folder(packed, tmp_path):
    return Path(shutil.copytree(packed, tmp_path / "set"))


def only_json(folder: Path) -> None:
    """Leave nothing but the JSON form of the indexes."""
    for tar in folder.glob("*.tar"):
        write_json_index(tar, read_index(tar))
        index_path(tar).unlink()


def test_the_json_form_is_converted_once_with_a_word(folder, packed, caplog):
    only_json(folder)
    with ShardSet.open(str(folder)) as shards, ShardSet.open(str(packed)) as expected:
        assert shards.digest == expected.digest
        assert shards.labels.tolist() == expected.labels.tolist()
        assert [data.tobytes() for data in shards.read(np.arange(45))] == [
            data.tobytes() for data in expected.read(np.arange(45))
        ]
    words = [record.message for record in caplog.records]
    assert len(words) == 1
    assert words[0].startswith("3 indexes in the JSON form were converted")
    for tar in folder.glob("*.tar"):
        assert index_path(tar).read_bytes() == index_path(packed / tar.name).read_bytes()
        assert json_path(tar).exists()
    caplog.clear()
    ShardSet.open(str(folder)).close()
    assert not caplog.records


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_is_read(folder, caplog):
    only_json(folder)
    folder.chmod(stat.S_IRUSR | stat.S_IXUSR)
    check_held(folder, caplog)


def test_an_index_that_cannot_be_written_is_held(folder, caplog, monkeypatch):
    only_json(folder)

    def full(path, content, *, replaces=None):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(local_set, "write_new_file", full)
    check_held(folder, caplog)


def check_held(folder, caplog):
    with ShardSet.open(str(folder)) as shards:
        assert len(shards.read(np.arange(45))) == 45
        assert shards.keys == [f"{i:09d}" for i in range(45)]
    assert not list(folder.glob("*.index"))
    assert "are converted at every start" in caplog.text


def test_a_stale_or_broken_json_form_is_refused(folder):
    only_json(folder)
    first, second, _ = sorted(folder.glob("*.tar"))
    shutil.copy(json_path(second), json_path(first))
    with pytest.raises(ShardError, match=r"train-000000\.tar.*another state"):
        ShardSet.open(str(folder))
    json_path(first).write_bytes(b'{"format": "x"}')
    with pytest.raises(ShardError, match=r"train-000000\.tar\.index\.json: is not an index"):
        ShardSet.open(str(folder))
    assert not index_path(first).exists()


def test_the_list_of_checked_tars_is_read_once_for_all(folder, monkeypatch, caplog):
    lists = []
    read = local_set.read_list
    monkeypatch.setattr(local_set, "read_list", lambda path: lists.append(path) or read(path))
    tars = sorted(folder.glob("*.tar"))
    for tar in tars:
        with tar.open("ab") as file:
            file.write(bytes(512))
    quarantine_path(folder).write_text("{}\n")
    with pytest.raises(ShardError, match="was made for another state"):
        ShardSet.open(str(folder))
    assert len(tars) > 1
    assert len(lists) == 1
    checked = []
    for tar in tars:
        header = IndexFile(tar.name, index_path(tar).read_bytes()).header
        checked.append(
            CheckedTar(
                shard=tar.name,
                tar_bytes=tar.stat().st_size,
                tar_hash=tar_hash(tar),
                records=header.records_hash,
                when="",
            )
        )
    Quarantine(checked=checked).write(quarantine_path(folder))
    ShardSet.open(str(folder)).close()
    assert len(lists) == 2
    # One sentence for all of them, or a thousand would hide what else is said.
    (said,) = (record.message for record in caplog.records)
    names = ", ".join(tar.name for tar in tars)
    assert said.startswith(f"3 tars ({names}): each has changed since it was indexed; ")
    assert local_set._notes_on_changed(["a", "b", "c", "d"])[0].startswith("4 tars (a, b, c, ...):")
    assert local_set._notes_on_changed(["x/a.tar"])[0].startswith("a.tar: has changed since")


def test_labels_that_are_written_while_the_json_form_is_read_stay(folder, monkeypatch):
    only_json(folder)
    tar = folder / "train-000001.tar"
    really = local_set.open_index

    def meanwhile(name, data):
        if name == json_path(tar).name and not index_path(tar).exists():
            index = read_index(tar)
            index.columns["label"] = [7] * len(index)
            write_index(tar, index)
        return really(name, data)

    monkeypatch.setattr(local_set, "open_index", meanwhile)
    with ShardSet.open(str(folder)) as shards:
        assert set(shards.labels_of(np.arange(16, 32)).tolist()) == {7}
    assert set(read_index(tar).columns["label"]) == {7}
    assert not list(folder.glob(".*.tmp"))


def test_an_index_that_appears_before_its_json_form_is_looked_for_is_read(folder, monkeypatch):
    tar = folder / "train-000001.tar"
    data = index_path(tar).read_bytes()
    index_path(tar).unlink()
    monkeypatch.setattr(
        local_set,
        "json_path",
        lambda path: index_path(tar).write_bytes(data) and json_path(path),
    )
    assert len(ShardSet.open(str(folder))) == 45


@pytest.mark.parametrize("races", [False, True])
def test_a_json_form_that_fits_replaces_a_stale_binary_index(folder, races, monkeypatch):
    """As an earlier version of fastmoco leaves both after it has indexed a new tar."""
    tar, other = folder / "train-000001.tar", folder / "train-000002.tar"
    write_json_index(tar, read_index(tar))
    fresh = index_path(tar).read_bytes()
    shutil.copy(index_path(other), index_path(tar))
    assert read_index(tar).tar == tar.name
    really = local_set.write_new_file

    def write(path, content, **options):
        if races:  # a newer index with other labels takes its place before the stale one is removed
            index = read_index(tar)
            index.columns["label"] = [7] * len(index)
            write_index(tar, index)
        return really(path, content, **options)

    monkeypatch.setattr(local_set, "write_new_file", write)
    with ShardSet.open(str(folder)) as shards:
        labels = set(shards.labels_of(np.arange(16, 32)).tolist())
    assert (labels == {7}) == races
    assert (index_path(tar).read_bytes() == fresh) != races
    assert not list(folder.glob(".*.tmp"))


def test_a_stale_binary_index_beside_a_stale_or_broken_json_form_is_refused(folder):
    tar, other = folder / "train-000001.tar", folder / "train-000002.tar"
    shutil.copy(index_path(other), index_path(tar))
    for text in (b"{", write_json_index(other, read_index(other)).read_bytes()):
        json_path(tar).write_bytes(text)
        with pytest.raises(ShardError, match=r"train-000001\.tar\.index: was made for another"):
            ShardSet.open(str(folder))


@pytest.mark.parametrize("suffix", [".index", ".index.json"])
def test_a_folder_in_the_place_of_an_index_is_named(folder, suffix):
    tar = folder / "train-000001.tar"
    index_path(tar).unlink()
    tar.with_name(tar.name + suffix).mkdir()
    words = rf"train-000001\.tar{suffix}: cannot be read \(Is a directory\).*fastmoco data index"
    with pytest.raises(ShardError, match=words):
        ShardSet.open(str(folder))
    with pytest.raises(ShardError, match=words.replace(".*", ".*ove this folder away.*")):
        read_index(tar)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES, errno.EMFILE])
@pytest.mark.parametrize("name", ["train-000001.tar", "train-000001.tar.index"])
def test_what_cannot_be_read_is_tried_again_and_named(folder, number, name, monkeypatch):
    really = os.open
    failures = [2]

    def fail(path, *arguments, **options):
        if os.path.basename(path) == name and failures[0]:
            failures[0] -= 1
            raise OSError(number, os.strerror(number), path)
        return really(path, *arguments, **options)

    monkeypatch.setattr(os, "open", fail)
    assert len(ShardSet.open(str(folder))) == 45  # the third attempt
    failures[0] = 3
    if number == errno.EMFILE:
        with pytest.raises(OSError, match="Too many open files"):
            ShardSet.open(str(folder))
        return
    cure = "fastmoco data index" if name.endswith("index") else "Copy the tar again"
    with pytest.raises(ShardError, match=rf"^{re.escape(name)}: cannot be read .*{cure}"):
        ShardSet.open(str(folder))


def test_a_damaged_body_is_found_at_the_first_use_where_a_set_is_large(folder, monkeypatch):
    path = index_path(folder / "train-000001.tar")
    data = bytearray(path.read_bytes())
    sections = IndexFile(path.name, bytes(data)).header.sections
    for name in ("records", "members"):
        data[sections[name].start + 9] ^= 1
    path.write_bytes(data)
    words = r"train-000001\.tar\.index: was changed or damaged .*fastmoco data index"
    with pytest.raises(ShardError, match=words):
        ShardSet.open(str(folder))
    monkeypatch.setattr(shard_set, "CHECKED_AT_OPENING", 10)
    with ShardSet.open(str(folder)) as shards:
        assert len(shards.read(np.r_[0:16, 32:45])) == 29
        found = shards.read_each(np.array([3, 20, 4, 31]))
        assert [isinstance(data, LostIndexError) for data in found] == [False, True, False, True]
        for use in (shards.read, shards.labels_of, shards.sizes_of):
            with pytest.raises(ShardError, match=words):
                use(np.array([3, 20]))


def test_an_index_that_is_replaced_meanwhile_is_noticed(folder, monkeypatch):
    monkeypatch.setattr(shard_set, "CHECKED_AT_OPENING", 10)
    shards = ShardSet.open(str(folder))
    first, second, _ = sorted(folder.glob("*.tar"))
    shutil.copy(index_path(second), index_path(first))
    with pytest.raises(ShardError, match=r"train-000000\.tar\.index: was replaced while"):
        shards.read(np.array([0]))
    index_path(first).unlink()
    with pytest.raises(ShardError, match=r"train-000000\.tar\.index: cannot be opened any more"):
        shards.read(np.array([0]))


def test_many_small_indexes_are_not_all_mapped(folder, monkeypatch):
    monkeypatch.setattr(records, "LOADED_FILES", 2)
    with ShardSet.open(str(folder)) as shards:
        assert len(shards.labels) == 45
        assert len(shards._records._loaded) == 2


def test_a_damaged_name_is_refused_at_opening_and_described_by_its_row_later(folder, monkeypatch):
    path = index_path(folder / "train-000001.tar")
    data = bytearray(path.read_bytes())
    section = IndexFile("x", bytes(data)).header.sections["members"]
    data[section.start + section.size - 3] ^= 1
    path.write_bytes(data)
    with pytest.raises(ShardError, match=r"train-000001\.tar\.index: was changed .*\(members\)"):
        ShardSet.open(str(folder))
    monkeypatch.setattr(shard_set, "CHECKED_AT_OPENING", 10)
    with ShardSet.open(str(folder)) as shards:
        assert len(shards.read(np.arange(45))) == 45
        assert shards.describe(18) == "train-000001.tar: image 2"


def test_a_shard_that_vanishes_with_its_index_costs_its_samples(folder, monkeypatch):
    monkeypatch.setattr(shard_set, "CHECKED_AT_OPENING", 10)
    monkeypatch.setattr(healer, "PATIENCE", (0.01,))
    monkeypatch.setattr(local_files, "_PAUSES", (0.01,))
    with ShardSet.open(str(folder)) as shards:
        for path in folder.glob("train-000001.tar*"):
            path.unlink()
        suspects = Suspects(device="cpu", device_id=None, threads=1)
        bad = BadSamples(shards, max_bad_share=0.5, run_list=folder / "run.jsonl")
        found = healer.Healer(shards, bad, suspects, threading.Event()).read(np.arange(45))
        assert [data is None for data in found] == [16 <= i < 32 for i in range(45)]
        assert (len(bad), bad.found) == (16, 16)
        assert bad.contains(np.array([15, 16, 31, 32])).tolist() == [False, True, True, False]
        (text,) = bad.news()
        assert text.startswith("left out train-000001.tar: all of it, 16 images: train-000001.tar.")


def test_no_room_for_descriptors_is_no_fault_of_a_shard(folder, monkeypatch):
    monkeypatch.setattr(shard_set, "CHECKED_AT_OPENING", 10)
    monkeypatch.setattr(local_files, "_PAUSES", ())
    with ShardSet.open(str(folder)) as shards:

        def refuse(*_: object) -> int:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

        monkeypatch.setattr(os, "open", refuse)
        with pytest.raises(ShardError, match="Too many open files"):
            shards.read_each(np.arange(45))


def test_opening_a_large_set_loads_no_index_and_a_step_those_it_needs(folder, monkeypatch):
    monkeypatch.setattr(shard_set, "CHECKED_AT_OPENING", 10)
    loaded = []
    real = local_set.LocalSet.load

    def counted(self, shard):
        loaded.append(shard)
        return real(self, shard)

    monkeypatch.setattr(local_set.LocalSet, "load", counted)
    shards = ShardSet.open(str(folder))
    assert (len(shards), shards.unlabelled, shards.skipped) == (45, 0, 0)
    assert loaded == []
    shards.read(np.array([40, 41]))
    assert loaded == [2]


def test_no_more_is_loaded_than_allowed(folder, monkeypatch):
    monkeypatch.setattr(records, "LOADED_BYTES", 1)
    shards = ShardSet.open(str(folder))
    expected = [data.tobytes() for data in shards.read(np.arange(45))]
    for _ in range(3):
        ids = np.random.default_rng(0).permutation(45)
        assert [data.tobytes() for data in shards.read(ids)] == [expected[i] for i in ids]
        assert len(shards._records._loaded) == 1


def test_an_index_that_is_loaded_again_is_checked_again_if_it_has_changed(folder, monkeypatch):
    monkeypatch.setattr(records, "LOADED_FILES", 1)
    shards = ShardSet.open(str(folder))
    expected = shards.labels.tolist()
    path = index_path(folder / "train-000000.tar")
    data = bytearray(path.read_bytes())
    data[IndexFile("x", bytes(data)).header.sections["records"].start + 16] ^= 1  # of a label
    shards.labels_of(np.array([40]))  # the first one is not loaded any more
    whole.write_file(path, bytes(data))
    with pytest.raises(LostIndexError, match=r"changed or damaged .*\(records\)"):
        shards.labels_of(np.array([0]))
    data[IndexFile("x", bytes(data)).header.sections["records"].start + 16] ^= 1
    whole.write_file(path, bytes(data))
    assert shards.labels.tolist() == expected


def test_loaded_indexes_take_no_descriptors(folder):
    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    before = descriptors()
    shards = ShardSet.open(str(folder))
    assert len(shards.labels) == 45
    assert len(shards._records._loaded) == 3
    assert descriptors() == before


def test_rows_agree_with_the_whole_columns(packed):
    with ShardSet.open(str(packed)) as shards:
        rng = np.random.default_rng(1)
        for count in (0, 1, 7, 45, 200):
            ids = rng.integers(0, 45, count)
            assert shards.labels_of(ids).tolist() == shards.labels[ids].tolist()
            assert shards.sizes_of(ids).tolist() == shards.sizes[ids].tolist()
        assert shards.labels_of(ids).dtype == np.int64
        assert shards.sizes_of(ids).dtype == np.int32


def test_the_first_digest_is_still_known(packed):
    """As runs of the first version have saved it: all columns one below the other, as int64."""
    columns = {name: [] for name in ("crc32", "size", "label", "height", "width")}
    for tar in sorted(packed.glob("*.tar")):
        for name, values in read_index(tar).columns.items():
            if name in columns:
                columns[name] += values
    stacked = np.array(list(columns.values()), dtype="<i8")
    expected = hashlib.sha256(b"fastmoco-set-1" + stacked.tobytes()).hexdigest()
    with ShardSet.open(str(packed)) as shards:
        assert shards.digest_1 == expected != shards.digest


@pytest.fixture
def kept(monkeypatch, tmp_path):
    """Every set is kept for the host; counts how often headers are read."""
    monkeypatch.setattr(host_table, "FEWEST_SHARDS", 1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    reads = []
    real = local_set._read_header

    def counted(tar):
        reads.append(tar)
        return real(tar)

    monkeypatch.setattr(local_set, "_read_header", counted)
    return reads


def test_a_set_is_opened_once_a_host(folder, kept):
    digests = []

    def open_it():
        with ShardSet.open(str(folder)) as shards:
            count = len(shards.read(np.arange(45)))
            digests.append((shards.digest, shards.classes, count, shards.path_of(44)))

    threads = [threading.Thread(target=open_it) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(kept) == 3
    assert len(digests) == 4
    assert len(set(digests)) == 1
    assert digests[0][1:3] == (("cat", "dog", "owl"), 45)
    assert digests[0][3].startswith(("cat/", "dog/", "owl/"))


@pytest.mark.parametrize("what", ["tar", "index", "manifest", "new shard"])
def test_a_set_that_has_changed_is_read_again(folder, kept, what):
    with ShardSet.open(str(folder)) as shards:
        before = shards.digest
    tar = folder / "train-000001.tar"
    if what == "tar":  # other content of the same size
        raw = bytearray(tar.read_bytes())
        raw[600] ^= 1
        tar.write_bytes(raw)
        with pytest.raises(ShardError, match="another state"):
            ShardSet.open(str(folder))
        return
    if what == "index":
        shutil.copy(index_path(tar), folder / "x")
        os.replace(folder / "x", index_path(tar))
    elif what == "manifest":
        (folder / "manifest.json").write_text("{")
        with pytest.raises(ShardError, match="not valid JSON"):
            ShardSet.open(f"{folder}/train-*.tar")
        return
    else:
        (folder / "manifest.json").unlink()
        shutil.copy(tar, folder / "train-000003.tar")
        shutil.copy(index_path(tar), index_path(folder / "train-000003.tar"))
    with ShardSet.open(str(folder)) as shards:
        assert (shards.digest == before) == (what == "index")
    assert len(kept) == (6 if what == "index" else 7)


def test_a_damaged_copy_and_a_folder_of_others_are_ignored(folder, kept, tmp_path):
    ShardSet.open(str(folder)).close()
    (copy,) = (tmp_path / "cache/fastmoco/sets").glob("*.set")
    data = bytearray(copy.read_bytes())
    data[-1] ^= 1
    copy.write_bytes(data)
    ShardSet.open(str(folder)).close()
    assert len(kept) == 6
    (tmp_path / "cache/fastmoco/sets").chmod(0o777)
    ShardSet.open(str(folder)).close()
    assert len(kept) == 9
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / "cache").write_text("no folder")
    ShardSet.open(str(folder)).close()
    assert len(kept) == 12


def test_without_home_or_working_folder_every_process_reads(folder, kept, monkeypatch, tmp_path):
    """As for a user id of a container that has no entry, and in a folder that was deleted."""

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    with monkeypatch.context() as patch:
        patch.delenv("XDG_CACHE_HOME")
        patch.setattr(Path, "home", no_home)
        assert len(ShardSet.open(str(folder))) == 45
        with pytest.raises(OSError, match="no home folder: set HOME or XDG_CACHE_HOME"):
            whole.user_cache()
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert len(ShardSet.open(str(folder))) == 45
    monkeypatch.chdir(tmp_path)
    assert len(kept) == 6


def test_another_set_or_host_waits_for_none(folder, kept, monkeypatch):
    begun, go_on = threading.Event(), threading.Event()
    really = local_set._read_header

    def slow(tar):
        if threading.current_thread() is not threading.main_thread():
            begun.set()
            assert go_on.wait(30)
        return really(tar)

    def sleep(seconds):
        raise AssertionError("waits for the lock")

    monkeypatch.setattr(local_set, "_read_header", slow)
    first = threading.Thread(target=lambda: ShardSet.open(str(folder)).close())
    first.start()
    assert begun.wait(30)
    monkeypatch.setattr(host_table.time, "sleep", sleep)
    try:
        ShardSet.open(f"{folder}/train-00000{{0..1}}.tar").close()
        with pytest.raises(AssertionError, match="waits for the lock"):
            ShardSet.open(str(folder))
        monkeypatch.setattr(host_table.platform, "node", lambda: "another")
        ShardSet.open(str(folder)).close()
    finally:
        go_on.set()
        first.join()
    assert len(kept) == 2 + 3 + 3


def test_sets_of_other_hosts_stay_for_a_month(folder, kept, monkeypatch, tmp_path):
    monkeypatch.setattr(host_table, "_KEPT", 1)
    for node in "abc":
        monkeypatch.setattr(host_table.platform, "node", lambda node=node: node)
        ShardSet.open(str(folder)).close()
    left = sorted((tmp_path / "cache/fastmoco/sets").iterdir())
    assert [path.suffix for path in left] == [".set"] * 3
    os.utime(left[0], (1, 1))
    monkeypatch.setattr(host_table.platform, "node", lambda: "d")
    ShardSet.open(str(folder)).close()
    assert len(list((tmp_path / "cache/fastmoco/sets").iterdir())) == 3
    assert not left[0].exists()


def test_few_sets_are_kept(folder, kept, monkeypatch, tmp_path):
    monkeypatch.setattr(host_table, "_KEPT", 2)
    for number in range(4):
        ShardSet.open(f"{folder}/train-00000{{0..{number % 3}}}.tar").close()
        os.utime(folder / "train-000000.tar")
    assert len(list((tmp_path / "cache/fastmoco/sets").glob("*.set"))) == 2


def test_threads_and_one_thread_read_the_same(monkeypatch):
    items = [str(i) for i in range(1000)]
    threads: set[str] = set()

    def waits(item: str) -> str:
        threads.add(threading.current_thread().name)
        if item == "900":
            raise ShardError("the first fault")
        if item == "950":
            raise ShardError("a later fault")
        return item * 2

    for switches in (0, 10**6):
        threads.clear()
        counts = iter([0, switches] * 2)
        monkeypatch.setattr(local_set, "_waits", lambda counts=counts: next(counts))
        assert local_set.in_threads(waits, items[:900]) == [item * 2 for item in items[:900]]
        assert any("fastmoco-index" in name for name in threads) == bool(switches)
        with pytest.raises(ShardError, match="the first fault"):
            local_set.in_threads(waits, items)


def kept_set(classes: object, rows: bytes) -> bytes:
    content = json.dumps(classes).encode() + b"\n" + rows
    return hashlib.sha256(content).hexdigest().encode() + b"\n" + content


ROWS = np.ones(2, dtype=SHARD).tobytes()


@pytest.mark.parametrize(
    "content",
    [
        kept_set(["cat"], ROWS[:-1]),
        kept_set(["cat"], ROWS * 2),
        kept_set(["cat"], b""),
        kept_set("cat", ROWS),
        kept_set([1], ROWS),
        kept_set({"cat": 0}, ROWS),
        kept_set(["cat"], ROWS)[1:],
        b"",
        None,
    ],
    ids=["odd", "more", "none", "text", "numbers", "object", "hash", "empty", "pipe"],
)
def test_a_kept_set_of_another_form_is_none(tmp_path, content):
    path = tmp_path / "x.set"
    path.write_bytes(kept_set(["cat"], ROWS))
    assert host_table._load(path, 2).classes == ("cat",)
    path.unlink()
    os.mkfifo(path) if content is None else path.write_bytes(content)
    assert host_table._load(path, 2) is None
