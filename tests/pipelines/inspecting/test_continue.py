"""`data check --continue`: an interrupted check goes on, and ends as if nothing had happened."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest

from fastmoco_pipelines.errors import RemoteError
from fastmoco_pipelines.files.whole import sealed_json
from fastmoco_pipelines.formats.quarantine import Quarantine, quarantine_path
from fastmoco_pipelines.inspecting import check as check_module
from fastmoco_pipelines.inspecting.check import CheckInterruptedError, check_shards
from fastmoco_pipelines.inspecting.progress_file import ProgressFile
from fastmoco_pipelines.inspecting.report import CheckReport, Fault, TarResult
from fastmoco_pipelines.spec import CacheSpec
from fastmoco_pipelines.views.decode_pool import ChildLimits
from tests.pipelines.damage import damaged_copy
from tests.pipelines.http_fault_server import FaultServer, plain, status
from tests.pipelines.quick_pool import QuickPool
from tests.pipelines.stores.test_http_faults import QUICK

BAD = {3: "changed", 17: "garbage", 20: "empty", 40: "truncated"}
# Checks a set until the second tar is begun, and then waits to be killed.
UNTIL_SECOND_TAR = """
import sys, time
from pathlib import Path
from fastmoco_pipelines.inspecting.check import check_shards
folder = Path(sys.argv[1])
first = (folder / "train-000000.tar").stat().st_size
check_shards(str(folder), workers=1, progress=lambda done, _: time.sleep(600 * (done > first)))
"""


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(check_module, "DecodePool", QuickPool)


@pytest.fixture
def bad_set(packed, tmp_path) -> Path:
    """Three tars with two, one and one bad images."""
    return damaged_copy(packed, tmp_path / "set", BAD)


class Checked:
    """Tars that a check has really looked at."""

    def __init__(self, monkeypatch) -> None:
        self.names: list[str] = []
        run = check_module.TarCheck.run

        def counted(check, pool, advance):
            self.names.append(check.path.name)
            return run(check, pool, advance)

        monkeypatch.setattr(check_module.TarCheck, "run", counted)

    def take(self) -> list[str]:
        names, self.names = self.names, []
        return names


@pytest.fixture
def checked(monkeypatch) -> Checked:
    return Checked(monkeypatch)


def interrupt(pattern: str, after: int = 1, **options) -> BaseException:
    """Begin a check and end it in the tar after `after` others."""
    done = []
    run = check_module.TarCheck.run

    def broken(check, pool, advance):
        if len(done) == after:
            raise KeyboardInterrupt
        done.append(check.path.name)
        return run(check, pool, advance)

    check_module.TarCheck.run = broken
    try:
        with pytest.raises(KeyboardInterrupt) as stopped:
            check_shards(pattern, workers=1, **options)
        return stopped.value
    finally:
        check_module.TarCheck.run = run


def content(report) -> dict:
    """A report without its times and the names of its lists."""
    return {
        key: value
        for key, value in asdict(report).items()
        if key not in ("seconds", "quarantine_files", "uploads")
    }


def progress(folder: Path, pattern: str = "") -> Path:
    """The progress file of a folder, or of another pattern of it."""
    digest = hashlib.sha256((pattern or str(folder)).encode()).hexdigest()[:16]
    return folder / f"check-progress-{digest}.jsonl"


def recorded(folder: Path) -> int:
    """Tars in the progress file of a folder, below the terms."""
    path = progress(folder)
    return path.read_bytes().count(b"\n") - 1 if path.exists() else 0


def entries(path: Path) -> list[dict]:
    """A list without its times."""
    return [asdict(entry) | {"when": ""} for entry in Quarantine.read(path)]


def test_killed_in_the_middle_it_ends_with_the_report_of_an_unbroken_check(bad_set, checked):
    whole = check_shards(str(bad_set), workers=1)
    expected = entries(quarantine_path(bad_set))
    quarantine_path(bad_set).unlink()
    assert len(expected) == whole.quarantined == len(BAD)
    assert sum(whole.counts().values()) == len(BAD)
    process = subprocess.Popen([sys.executable, "-c", UNTIL_SECOND_TAR, str(bad_set)])
    until = time.monotonic() + 60
    while recorded(bad_set) < 1 and time.monotonic() < until:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert recorded(bad_set) == 1
    assert not quarantine_path(bad_set).exists()
    checked.take()
    said: list[str] = []
    report = check_shards(str(bad_set), workers=1, resume=True, tell=said.append)
    assert checked.take() == ["train-000001.tar", "train-000002.tar"]
    assert said == ["1 of 3 tars are checked already"]
    assert content(report) == content(whole)
    assert report.counts() == whole.counts()
    assert entries(quarantine_path(bad_set)) == expected
    assert not (progress(bad_set)).exists()


@pytest.mark.usefixtures("quick")
def test_ctrl_c_counts_the_tars_that_are_done(bad_set):
    said: list[str] = []
    stopped = interrupt(str(bad_set), after=2, tell=said.append)
    assert isinstance(stopped, CheckInterruptedError)
    assert (stopped.recorded, stopped.total) == (2, 3)
    assert str(stopped) == "2 of 3 tars are checked"
    assert said == []


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("change", ["tar", "touched tar", "replaced tar", "index", "manifest"])
def test_what_has_changed_meanwhile_is_checked_again(change, bad_set, packed, checked):
    interrupt(str(bad_set), after=2)
    assert checked.take() == ["train-000000.tar", "train-000001.tar"]
    tar = bad_set / "train-000001.tar"
    if change == "tar":
        shutil.copy(packed / tar.name, tar)
        shutil.copy(packed / f"{tar.name}.index", bad_set)
    elif change == "touched tar":
        os.utime(tar, ns=(1, 1))
    elif change == "replaced tar":  # as by `rsync -a`: of the same size, time, ends and index
        info = tar.stat()
        raw = bytearray(tar.read_bytes())
        raw[len(raw) // 2] ^= 1
        (bad_set / "x").write_bytes(raw)
        os.utime(bad_set / "x", ns=(info.st_atime_ns, info.st_mtime_ns))
        os.replace(bad_set / "x", tar)
    elif change == "index":
        shutil.copy(packed / f"{tar.name}.index", bad_set)
    else:
        manifest = json.loads((bad_set / "manifest.json").read_text())
        manifest["sets"]["train"]["shards"][1]["samples"] += 1
        (bad_set / "manifest.json").write_text(json.dumps(manifest))
    said: list[str] = []
    report = check_shards(str(bad_set), workers=1, resume=True, tell=said.append)
    assert checked.take() == ["train-000001.tar", "train-000002.tar"]
    assert said == ["1 of 3 tars are checked already; 1 have changed since and are checked again"]
    assert content(report) == content(check_shards(str(bad_set), workers=1))


@pytest.mark.usefixtures("quick")
def test_a_torn_or_changed_last_line_is_checked_again(bad_set, checked):
    for damage in (
        lambda text: text[:-20],
        lambda text: text[:-1],
        lambda text: text.replace(b'"quarantined":2', b'"quarantined":0'),
    ):
        interrupt(str(bad_set), after=2)
        path = progress(bad_set)
        *lines, last = path.read_bytes().splitlines(keepends=True)
        assert len(lines) == 2
        path.write_bytes(b"".join(lines) + damage(last))
        checked.take()
        interrupt(str(bad_set), after=1, resume=True)
        assert checked.take() == ["train-000001.tar"]
        assert [is_whole(line) for line in path.read_bytes().splitlines()] == [True] * 3
        report = check_shards(str(bad_set), workers=1, resume=True)
        assert checked.take() == ["train-000002.tar"]
        assert (report.promised, report.quarantined) == (45, len(BAD))


def is_whole(line: bytes) -> bool:
    return "content_hash" in json.loads(line)


@pytest.mark.usefixtures("quick")
def test_other_options_and_versions_are_not_taken_over(bad_set, checked, monkeypatch):
    pattern = str(bad_set)
    for words, again in (
        ("seconds_per_image was 30.0 and is 9.0", {"limits": ChildLimits(seconds=9.0)}),
        ("fastmoco was .* and is '9.9'", {"version": "9.9"}),
    ):
        interrupt(pattern)
        checked.take()
        said: list[str] = []
        with pytest.MonkeyPatch.context() as patch:
            if "version" in again:
                patch.setattr(check_module, "versions", lambda: {"fastmoco": "9.9"})
            options = {"limits": again.get("limits"), "resume": True, "tell": said.append}
            check_shards(pattern, workers=1, **options)
        assert len(checked.take()) == 3
        (text,) = said
        assert text.startswith(f"the unfinished check in {progress(bad_set)} is not taken over: ")
        assert re.search(words, text), text
        assert not (progress(bad_set)).exists()


@pytest.mark.usefixtures("quick")
def test_a_check_of_other_shards_leaves_the_record_of_a_folder_alone(bad_set, checked):
    interrupt(str(bad_set), after=2)
    checked.take()
    record = progress(bad_set).read_bytes()
    some = f"{bad_set}/train-00000[12].tar"
    for resume in (False, True):
        said: list[str] = []
        check_shards(some, workers=1, resume=resume, tell=said.append)
        assert progress(bad_set).read_bytes() == record
        assert not progress(bad_set, some).exists()
        assert [f"{bad_set} ({progress(bad_set)})" in text for text in said] == [True] * resume
    checked.take()
    check_shards(str(bad_set), workers=1, resume=True)
    assert checked.take() == ["train-000002.tar"]


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("resume", [False, True])
def test_a_record_is_locked_from_the_time_it_is_read(bad_set, resume, checked):
    """Otherwise two checks could take over, and then write, the same file."""
    interrupt(str(bad_set), after=1)
    said: list[str] = []
    started: list[bool] = []

    def another(done: int, total: int) -> None:
        if not started:  # before the first tar is done
            started.append(True)
            interrupt(str(bad_set), after=2, resume=True, tell=said.append)

    interrupt(str(bad_set), after=1, resume=resume, progress=another)
    assert ["another check of these shards is running" in text for text in said] == [True]
    assert recorded(bad_set) == 1 + resume


@pytest.mark.usefixtures("quick")
def test_a_record_that_was_begun_meanwhile_is_left_alone(bad_set):
    said: list[str] = []
    started: list[bool] = []

    def another(done: int, total: int) -> None:
        if not started:
            started.append(True)
            interrupt(str(bad_set), after=2)

    check_shards(str(bad_set), workers=1, progress=another, tell=said.append)
    assert "another check of these shards was begun meanwhile" in said[-1]
    assert recorded(bad_set) == 2


@pytest.mark.usefixtures("quick")
def test_a_record_that_was_deleted_meanwhile_is_written_again(bad_set, checked):
    interrupt(str(bad_set), after=1)
    started: list[bool] = []

    def delete(done: int, total: int) -> None:
        if not started:
            started.append(True)
            progress(bad_set).unlink()

    interrupt(str(bad_set), after=1, resume=True, progress=delete)
    assert recorded(bad_set) == 2
    checked.take()
    check_shards(str(bad_set), workers=1, resume=True)
    assert checked.take() == ["train-000002.tar"]


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("quarantine", [True, False])
def test_a_user_without_a_home_folder_can_check(bad_set, monkeypatch, quarantine):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setattr(Path, "home", no_home)
    interrupt(str(bad_set), after=2, quarantine=quarantine)
    assert recorded(bad_set) == 2
    assert check_shards(str(bad_set), workers=1, quarantine=quarantine).quarantined == len(BAD)


@pytest.mark.usefixtures("quick")
def test_without_continue_an_unfinished_check_is_named_and_replaced(bad_set, checked):
    interrupt(str(bad_set), after=2)
    checked.take()
    said: list[str] = []
    check_shards(str(bad_set), workers=1, tell=said.append)
    assert len(checked.take()) == 3
    (text,) = said
    assert "an unfinished check of these shards exists, with 2 tars done" in text
    assert "--continue takes it over" in text
    assert not (progress(bad_set)).exists()
    said.clear()
    check_shards(str(bad_set), workers=1, resume=True, tell=said.append)
    assert said == ["there is no unfinished check of these shards: every tar is checked"]


@pytest.mark.usefixtures("quick")
def test_an_earlier_progress_survives_until_the_first_tar_is_done(bad_set, checked):
    """So that a slip, ended at once, loses nothing."""
    interrupt(str(bad_set), after=2)
    interrupt(str(bad_set), after=0)
    checked.take()
    check_shards(str(bad_set), workers=1, resume=True)
    assert checked.take() == ["train-000002.tar"]


@pytest.mark.usefixtures("quick")
def test_the_same_shards_under_another_spelling_are_the_same_check(bad_set, checked, monkeypatch):
    interrupt(str(bad_set), after=2)
    checked.take()
    monkeypatch.chdir(bad_set.parent)
    check_shards(f"file:{bad_set}/", workers=1, resume=True)
    assert checked.take() == ["train-000002.tar"]


@pytest.mark.usefixtures("quick")
def test_a_tar_that_changes_under_the_check_is_checked_again(bad_set, checked):
    def touch(done: int, total: int) -> None:
        if done < total:
            os.utime(bad_set / "train-000000.tar")

    interrupt(str(bad_set), after=2, progress=touch)
    checked.take()
    check_shards(str(bad_set), workers=1, resume=True)
    assert checked.take() == ["train-000000.tar", "train-000002.tar"]


@pytest.mark.usefixtures("quick")
def test_progress_goes_to_the_state_folder_where_the_set_is_read_only(
    bad_set, checked, state_folder, monkeypatch
):
    """Root may write anywhere: so the folder refuses by a stand-in for the system call."""
    really = os.open

    def refuse(path, *arguments, **options):
        if str(path) == str(progress(bad_set)):
            raise PermissionError(13, "Permission denied")
        return really(path, *arguments, **options)

    monkeypatch.setattr(os, "open", refuse)
    interrupt(str(bad_set), after=2)
    (path,) = state_folder.iterdir()
    checked.take()
    check_shards(str(bad_set), workers=1, resume=True)
    assert checked.take() == ["train-000002.tar"]
    assert not path.exists()
    assert progress(bad_set).name not in os.listdir(bad_set)


@pytest.mark.usefixtures("quick")
def test_without_a_list_nothing_is_written_beside_the_tars(bad_set, state_folder):
    before = sorted(os.listdir(bad_set))
    interrupt(str(bad_set), quarantine=False)
    assert sorted(os.listdir(bad_set)) == before
    assert len(list(state_folder.iterdir())) == 1
    check_shards(str(bad_set), workers=1, quarantine=False, resume=True)
    assert list(state_folder.iterdir()) == []


@pytest.mark.usefixtures("quick")
def test_two_checks_of_one_folder_do_not_mix_their_progress(bad_set):
    said: list[str] = []
    inner: list[CheckReport] = []
    records: list[bytes] = []

    def check_inside(done: int, total: int) -> None:
        if done > total // 2 and not records:
            records.append((progress(bad_set)).read_bytes())
            inner.append(check_shards(str(bad_set), workers=1, tell=said.append))
            records.append((progress(bad_set)).read_bytes())

    report = check_shards(str(bad_set), workers=1, progress=check_inside)
    assert "another check of these shards is running" in said[-1]
    assert content(inner[0]) == content(report)
    assert records[0] == records[1]
    assert not (progress(bad_set)).exists()


@pytest.mark.usefixtures("quick")
def test_a_full_disk_ends_the_record_and_not_the_check(bad_set, monkeypatch):
    really = os.write
    monkeypatch.setattr(
        os, "write", lambda fd, data: really(fd, data[:10]) if b"tar" in data else really(fd, data)
    )
    said: list[str] = []
    report = check_shards(str(bad_set), workers=1, tell=said.append)
    assert report.quarantined == len(BAD)
    (text,) = said
    assert "not recorded any more" in text
    assert "the disk is full" in text
    assert not (progress(bad_set)).exists()


@pytest.mark.usefixtures("quick")
def test_shards_of_a_server_that_are_done_are_not_fetched_again(bad_set, tmp_path, checked):
    cache = CacheSpec(cache_dir=str(tmp_path / "cache"), cache_size_gb=0.01)
    options = {"cache": cache, "transfers": QUICK, "remote_lists": tmp_path / "lists"}
    with FaultServer(bad_set) as server:
        url = f"{server.url.replace('://', '://user:Geheim123@')}/"
        whole = check_shards(url, workers=1, **options)
        (path,) = options["remote_lists"].iterdir()
        expected = entries(path)
        path.unlink()
        shutil.rmtree(tmp_path / "cache")

        interrupt(url, after=2, **options)
        (record,) = options["remote_lists"].iterdir()
        assert record.name.startswith("check-progress-127.0.0.1-")
        assert "Geheim123" not in record.read_text()
        shutil.rmtree(tmp_path / "cache")
        checked.take()
        server.requests.clear()
        report = check_shards(url, workers=1, resume=True, **options)
        assert checked.take() == ["train-000002.tar"]
        assert content(report) == content(whole)
        assert entries(path) == expected
        assert [*options["remote_lists"].iterdir()] == [path]
        ranges = [r for name, r, _ in server.requests if name == "train-000000.tar"]
        assert ranges == ["bytes=0-0"]

        # A tar that the server has changed since, and one whose state it does not tell.
        path.unlink()
        interrupt(url, after=2, **options)
        tar = bad_set / "train-000000.tar"
        raw = bytearray(tar.read_bytes())
        raw[len(raw) // 2] ^= 1
        tar.write_bytes(raw)
        checked.take()
        server.requests.clear()
        interrupt(url, after=1, resume=True, **options)
        assert checked.take() == ["train-000000.tar"]
        ranges = [r for name, r, _ in server.requests if name == "train-000001.tar"]
        assert ranges == ["bytes=0-0"]  # not fetched ahead of its turn either
        server.always["train-000001.tar"] = plain(tag="")
        check_shards(url, workers=1, resume=True, **options)
        assert checked.take() == ["train-000001.tar", "train-000002.tar"]


@pytest.mark.usefixtures("quick")
def test_a_server_that_fails_in_the_middle_leaves_the_progress(bad_set, tmp_path, checked):
    cache = CacheSpec(cache_dir=str(tmp_path / "cache"), cache_size_gb=0.01)
    options = {"cache": cache, "transfers": QUICK, "remote_lists": tmp_path / "lists"}
    said: list[str] = []
    with FaultServer(bad_set) as server:
        server.script["train-000002.tar"] = [plain()] + [status(500)] * 100
        with pytest.raises(RemoteError, match="HTTP 500"):
            check_shards(f"{server.url}/", workers=1, tell=said.append, **options)
        assert said == ["2 of 3 tars are checked: --continue goes on with the others"]
        server.script.clear()
        checked.take()
        check_shards(f"{server.url}/", workers=1, resume=True, **options)
        assert checked.take() == ["train-000002.tar"]


def forged_lines(path: Path, edit) -> None:
    """Progress in which each result was edited, with right seals."""
    head, *lines = path.read_bytes().splitlines(keepends=True)
    new = []
    for line in lines:
        content = json.loads(line)
        content.pop("content_hash")
        edit(content)
        new.append(sealed_json(content) + b"\n")
    path.write_bytes(head + b"".join(new))


FORGED = {
    "text": lambda c: c["result"].update(promised="16"),
    "1e300": lambda c: c["result"].update(delivered=1e300),
    "negative": lambda c: c["result"].update(left_out=-1),
    "truth value": lambda c: c["result"].update(restarts=True),
    "sum": lambda c: c["result"].update(delivered=c["result"]["delivered"] + 1),
    "flag": lambda c: c["result"].update(refused="no"),
    "note": lambda c: c["result"].update(notes=[7]),
    "fault": lambda c: c["result"]["faults"][0].update(member=["x"]),
    "offset": lambda c: c["result"]["faults"][0].update(offset="x"),
    "entry": lambda c: c["result"]["entries"][0].update(offset=-1),
    "another tar": lambda c: c["result"]["entries"][0].update(shard="train-000002.tar"),
    "a path": lambda c: c["result"]["entries"][0].update(shard="../x.tar"),
    "no result": lambda c: c.update(result=[]),
    "no state": lambda c: c.update(state="x"),
    "no name": lambda c: c.update(tar=["x"]),
    "one more": lambda c: c["result"].update(more=1),
}


@pytest.mark.parametrize("name", FORGED)
def test_forged_results_are_not_taken_over(tmp_path, name):
    entry = Quarantine().add(
        shard="a.tar", key="1", extension="jpg", offset=512, size=9, crc32=1, reason="x"
    )
    fault = Fault.of("a.tar", "1.jpg", "damaged image", "x")
    result = TarResult(promised=1, quarantined=1, faults=[fault], entries=[entry])
    path = tmp_path / "progress.jsonl"

    def known(resume: bool = True) -> dict:
        record = ProgressFile([path], {"shards": "x"}, resume=resume, tell=lambda text: None)
        if not resume:
            record.add(str(tmp_path / "a.tar"), {"bytes": 1}, result)
        record.close()
        return record.known

    known(resume=False)
    forged_lines(path, lambda content: None)
    assert [one.result for one in known().values()] == [result]
    forged_lines(path, FORGED[name])
    assert known() == {}


@pytest.mark.parametrize("kind", ["pipe", "zeros", "link", "folder", "terms"])
def test_progress_that_is_no_file_is_passed_over(tmp_path, kind):
    path, other = tmp_path / "progress.jsonl", tmp_path / "other.jsonl"
    (tmp_path / "precious").write_text("all of it")
    {
        "pipe": lambda: os.mkfifo(path),
        "zeros": lambda: path.symlink_to("/dev/zero"),
        "link": lambda: path.symlink_to("precious"),
        "folder": path.mkdir,
        "terms": lambda: path.write_bytes(
            sealed_json({"format": "fastmoco-check-progress", "version": 1, "terms": []}) + b"\n"
        ),
    }[kind]()
    record = ProgressFile([path, other], {"shards": "x"}, resume=True, tell=lambda text: None)
    record.add("a.tar", {}, TarResult())
    assert record.recorded == 1
    assert record.path == (path if kind == "terms" else other)
    record.finish()
    assert (tmp_path / "precious").read_text() == "all of it"
