"""The check as a whole: its account, its files, and processes that crash or hang."""

from __future__ import annotations

import json
import os
import select
import shutil
from pathlib import Path

import pytest

from fastmoco_pipelines.errors import DecoderBrokenError, ShardError
from fastmoco_pipelines.formats.index import index_path, read_index
from fastmoco_pipelines.formats.quarantine import Quarantine, quarantine_path
from fastmoco_pipelines.inspecting import check as check_module
from fastmoco_pipelines.inspecting.check import check_shards
from fastmoco_pipelines.views.decode_pool import ChildLimits, Decoded, DecodePool, Item
from tests.pipelines.damage import listed

# A child that does what an item's size asks for. It speaks the protocol of the real one, with each
# answer in one write: `print` would make two where Python is told not to buffer (PYTHONUNBUFFERED).
CHILD = """
import json, os, sys, time

def answer(content):
    os.write(1, json.dumps(content).encode() + b"\\n")

sys.stdin.readline()
answer({"ready": True})
asked = 0
for line in sys.stdin:
    for path, offset, size, crc32 in json.loads(line):
        asked += 1
        if size == 1: os.abort()
        if size == 2: time.sleep(60)
        if size == 3: sys.exit(3)
        if size == 4 and asked > 1: os.abort()  # the heap was corrupted before
        answer({"kind": "", "reason": "", "listed": True, "crc32": 7, "shape": [1, 2]})
"""


@pytest.fixture
def odd_child(tmp_path, monkeypatch) -> str:
    (tmp_path / "odd_child.py").write_text(CHILD)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    return "odd_child"


@pytest.fixture
def pool(odd_child):
    with DecodePool(2, ChildLimits(seconds=60.0), odd_child) as pool:
        yield pool


def run(pool: DecodePool, sizes: list[int]) -> list[Decoded]:
    return pool.run([Item("x", i, size) for i, size in enumerate(sizes)])


def test_a_crash_costs_one_sample_and_is_named(pool):
    verdicts = run(pool, [0, 0, 1, 0, 3, 0])
    assert [v.kind for v in verdicts] == ["", "", "crash", "", "crash", ""]
    assert verdicts[2].reason == "the decoder's process ended (SIGABRT)"
    assert verdicts[4].reason == "the decoder's process ended (exit code 3)"
    assert pool.restarts == 4  # each tried again in a process of its own


def test_a_hang_costs_one_sample_and_its_time(odd_child):
    with DecodePool(1, ChildLimits(seconds=1.0), odd_child) as pool:
        verdicts = run(pool, [0, 2, 0])
    assert [v.kind for v in verdicts] == ["", "hang", ""]
    assert verdicts[1].reason == "the decoder did not finish within 1 s"


def test_an_answer_that_is_there_is_no_hang_however_late_it_is_read(pool):
    """The process that asks may have been stopped meanwhile, or have waited for a core."""
    child = pool._start()
    child._send([["x", 0, 0, 0]])
    assert select.select([child._process.stdout], [], [], 60)[0]
    assert child._receive(seconds=-1.0)["crc32"] == 7


def test_who_fails_only_after_others_is_not_blamed(pool):
    """A heap that an earlier image corrupted: alone, in a fresh process, the sample is good."""
    assert [v.kind for v in run(pool, [0, 4, 0, 4])] == [""] * 4
    assert pool.restarts == 2


def test_verdicts_are_in_order_over_many_processes(pool):
    verdicts = run(pool, [1 if i % 37 == 5 else 0 for i in range(100)])
    assert [i for i, v in enumerate(verdicts) if v.kind] == [5, 42, 79]


def test_a_child_that_cannot_start_is_an_error(monkeypatch, tmp_path):
    with (
        DecodePool(1, module="no_such_module") as pool,
        pytest.raises(DecoderBrokenError, match=r"does not start.*start the same command again"),
    ):
        run(pool, [0])


def test_an_interrupt_ends_the_children(pool):
    def interrupt(_: Item) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pool.run([Item("x", 0, 0)] * 100, interrupt)
    with pytest.raises(RuntimeError, match="stopped"):
        pool._start()


@pytest.fixture
def damaged(packed, tmp_path):
    """The packed set with one byte of one image's pixels changed, and its place."""
    folder = Path(shutil.copytree(packed, tmp_path / "set"))
    tar = folder / "train-000001.tar"
    index = read_index(tar)
    row = next(
        i for i in range(len(index)) if 4096 < index.columns["offset"][i] < index.tar_bytes - 8192
    )
    raw = bytearray(tar.read_bytes())
    raw[index.columns["offset"][row] + index.columns["size"][row] // 2] ^= 255
    tar.write_bytes(raw)
    return folder, index, row


def test_a_clean_set_is_clean_and_leaves_no_file(packed, tmp_path):
    folder = Path(shutil.copytree(packed, tmp_path / "set"))
    before = sorted(os.listdir(folder))
    calls: list[tuple[int, int]] = []
    report = check_shards(
        str(folder), workers=1, progress=lambda done, total: calls.append((done, total))
    )
    assert report.clean
    assert (report.promised, report.delivered, report.quarantined, report.left_out) == (
        45,
        45,
        0,
        0,
    )
    assert sorted(os.listdir(folder)) == before
    assert calls == sorted(calls)
    assert calls[-1] == (report.total_bytes, report.total_bytes)


def test_the_quarantine_list_names_what_the_loader_must_pass_over(damaged):
    folder, index, row = damaged
    report = check_shards(str(folder), workers=1)
    assert (report.promised, report.delivered, report.quarantined) == (45, 44, 1)
    (entry,) = Quarantine.read(quarantine_path(folder))
    columns = index.columns
    assert (entry.shard, entry.key) == ("train-000001.tar", index.keys[row])
    assert entry.identity[1:] == tuple(columns[name][row] for name in ("offset", "size", "crc32"))
    assert Quarantine.read(quarantine_path(folder)).rows(
        "train-000001.tar", *map(columns.get, ("offset", "size", "crc32"))
    )
    # Again: the same verdict; a line that is known keeps its date.
    again = check_shards(str(folder), workers=1)
    assert [*Quarantine.read(quarantine_path(folder))] == [entry]
    assert again.faults == report.faults


def test_lines_about_other_tars_stay_and_those_of_a_mended_one_go(damaged, packed):
    folder, _, _ = damaged
    other = listed(val_000000="r", train_000001="stale")
    other.write(quarantine_path(folder))
    check_shards(str(folder), workers=1)
    assert [e.shard for e in Quarantine.read(quarantine_path(folder))] == [
        "val-000000.tar",
        "train-000001.tar",
    ]
    shutil.copy(packed / "train-000001.tar", folder)
    assert check_shards(f"{folder}/train-000001.tar", workers=1).clean
    assert [e.shard for e in Quarantine.read(quarantine_path(folder))] == ["val-000000.tar"]


def test_no_quarantine_writes_none(damaged):
    assert not check_shards(str(damaged[0]), workers=1, quarantine=False).clean
    assert not quarantine_path(damaged[0]).exists()


def test_a_shard_that_the_manifest_lists_is_missed(packed, tmp_path):
    folder = Path(shutil.copytree(packed, tmp_path / "set"))
    (folder / "train-000002.tar").unlink()
    report = check_shards(str(folder), workers=1)
    assert (report.promised, report.delivered, report.quarantined) == (45, 32, 13)
    assert report.counts() == {"missing shard": 1}
    assert check_shards(
        f"{folder}/train-00000{{0,1}}.tar", workers=1
    ).clean  # spelled out: on purpose


def test_the_json_report_holds_everything(damaged, tmp_path):
    report = check_shards(str(damaged[0]), workers=1)
    content = json.loads(report.write(tmp_path / "report.json").read_text())
    assert (content["format"], content["version"], content["clean"]) == ("fastmoco-check", 1, False)
    assert content["counts"] == {"changed bytes": 1}
    assert content["promised"] == content["delivered"] + content["quarantined"] == 45
    (fault,) = content["faults"]
    assert set(fault) == {"shard", "member", "kind", "reason", "offset", "outcome", "path", "file"}
    assert fault["file"].startswith(("cat/", "dog/", "owl/"))


def test_a_broken_manifest_is_an_error(packed, tmp_path):
    folder = Path(shutil.copytree(packed, tmp_path / "set"))
    (folder / "manifest.json").write_text("{")
    with pytest.raises(ShardError, match="not valid JSON"):
        check_shards(str(folder))


def test_without_dali_pillow_decodes(packed, tmp_path, monkeypatch):
    folder = Path(shutil.copytree(packed, tmp_path / "set"))
    index = read_index(folder / "train-000000.tar")
    with (folder / "train-000000.tar").open("r+b") as tar:
        tar.seek(index.columns["offset"][3])
        tar.write(b"no image")
    hidden = "import sys; sys.modules['nvidia.dali'] = None"
    (tmp_path / "sitecustomize.py").write_text(hidden)
    by_dali = check_shards(str(folder), quarantine=False)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    by_pillow = check_shards(str(folder), quarantine=False)
    assert by_pillow.delivered == by_dali.delivered == 44
    assert by_pillow.faults == by_dali.faults


def test_a_crash_of_the_real_decoder_is_quarantined(packed, tmp_path, monkeypatch):
    """Every sample of a key crashes the process; the index says which bytes these are."""
    folder = Path(shutil.copytree(packed, tmp_path / "set"))
    index = read_index(folder / "train-000000.tar")
    crash = CHILD.replace("size == 1", f"offset == {index.columns['offset'][3]}").replace(
        '"crc32": 7', '"crc32": crc32'
    )
    code = crash.replace("[1, 2]", "shapes[offset]").replace(
        "asked = 0", f"asked = 0; shapes = {shapes(index)}"
    )
    (tmp_path / "odd_child.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setattr(
        check_module, "DecodePool", lambda workers, limits: DecodePool(workers, limits, "odd_child")
    )
    report = check_shards(f"{folder}/train-000000.tar", workers=1)
    assert report.counts() == {"crash": 1}
    assert report.restarts == 2
    (entry,) = Quarantine.read(quarantine_path(folder))
    assert (entry.key, entry.offset) == (index.keys[3], index.columns["offset"][3])
    assert index_path(folder / "train-000000.tar").exists()


def shapes(index) -> dict[int, list[int]]:
    columns = index.columns
    places = zip(columns["offset"], columns["height"], columns["width"], strict=True)
    return {offset: [height, width] for offset, height, width in places}
