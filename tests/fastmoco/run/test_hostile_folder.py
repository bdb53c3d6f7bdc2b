"""A run folder from somebody else: nothing in it is written elsewhere, blocks its reader or fills the
memory, and what is refused is named.

Every file of a run meets every kind of thing that may be in its place.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import NoReturn

import pytest

from fastmoco.checkpoint import CheckpointError, require_writable
from fastmoco.cli.train import train
from fastmoco.config import Config
from fastmoco.distributed.mesh import World
from fastmoco.errors import RunError
from fastmoco.faults.start_up import mark_stopped
from fastmoco.run import curves, metrics_file
from fastmoco.run.drawing import draw_run
from fastmoco.run.folder import FILES, FOLDERS, TRACKED, RunFolder
from fastmoco.run.metrics_file import LONGEST, last_step, read_spikes
from fastmoco.telemetry.sinks import JsonlSink
from fastmoco.training.profiling.profile import output_to
from fastmoco.training.start import find_start
from fastmoco_pipelines.files.small import UnfitFileError

REFUSALS = (RunError, CheckpointError, UnfitFileError)
PRECIOUS = "all of it\n" * 100
LIMIT_S = 60

DEEP = b'{"step":1,"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}"
TYPES = (
    b'{"launch": [], "step": {}, "starts": [1], "run_id": 7, "trusted_run_ids": {"a": 1}, "ranks": 3,'
    b' "config": [1], "resolved": "x", "curves": {"figures": [], "lines": {"loss": 5}}}'
)
CONTENTS = {
    "empty": b"",
    "not utf-8": b"\xff",
    "zeros": b"\0" * 4096,
    "deep": DEEP,
    "list": b"[1, 2]",
    "number": b"1e999",
    "types": TYPES,
    "escapes": b"\x1b[2J\x9b31m",
}


def link(path: Path, precious: Path) -> None:
    path.symlink_to(precious)


def dangling(path: Path, precious: Path) -> None:
    path.symlink_to(precious.with_name("absent"))


def device(path: Path, precious: Path) -> None:
    path.symlink_to("/dev/zero")


def hard_link(path: Path, precious: Path) -> None:
    os.link(precious, path)


def pipe(path: Path, precious: Path) -> None:
    os.mkfifo(path)


def folder(path: Path, precious: Path) -> None:
    (path / "inner").mkdir(parents=True)


def socket_file(path: Path, precious: Path) -> None:
    with socket.socket(socket.AF_UNIX) as end:
        here = os.getcwd()
        os.chdir(path.parent)  # its name may be too long
        try:
            end.bind(path.name)
        finally:
            os.chdir(here)


def sparse(path: Path, precious: Path) -> None:
    path.touch()
    os.truncate(path, 1 << 40)


KINDS = {
    f.__name__: f for f in (link, dangling, device, hard_link, pipe, folder, socket_file, sparse)
}


@pytest.fixture(scope="module")
def run(small_run: Config, tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Path]:
    """A run of three steps that has its checkpoint; tests work on a copy."""
    config = replace(
        small_run, epochs=0.2, optim=replace(small_run.optim, warmup_epochs=0), global_batch_size=64
    )
    out = tmp_path_factory.mktemp("whole") / "run"
    assert train(config, out, hints=False) == 0
    return config, out


@pytest.fixture
def copy(run: tuple[Config, Path], tmp_path: Path) -> Path:
    """The run, which is not marked as finished."""
    out = tmp_path / "run"
    shutil.copytree(run[1], out)
    (out / "DONE").unlink()
    return out


@pytest.fixture
def precious(tmp_path: Path) -> Path:
    path = tmp_path / "precious"
    path.write_text(PRECIOUS)
    os.utime(path, ns=(1, 1))
    return path


@pytest.fixture(autouse=True)
def in_time() -> Iterator[None]:
    """What hangs fails."""

    def late(number: int, frame: FrameType | None) -> NoReturn:
        raise TimeoutError(f"longer than {LIMIT_S} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(LIMIT_S)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def put(path: Path, what: str, precious: Path) -> None:
    """Something in the place of a file or a folder."""
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    if what in CONTENTS:
        path.write_bytes(CONTENTS[what])
    else:
        KINDS[what](path, precious)


def untouched(precious: Path) -> bool:
    state = precious.stat()
    return (
        precious.read_text() == PRECIOUS
        and state.st_mtime_ns == 1
        and not precious.with_name("absent").exists()
    )


def tree(root: Path) -> dict[str, tuple[int, int]]:
    return {
        str(path.relative_to(root)): (path.lstat().st_mode, path.lstat().st_mtime_ns)
        for path in root.rglob("*")
        if path != root and not path.is_dir()
    }


def continued(out: Path) -> list[str]:
    """All that a run which continues does with its folder; what it tells the user."""
    begun = find_start(out, World()).folder
    try:
        begun.trim_metrics(2)
        begun.write_config(begun.read_config())
        sink = JsonlSink(begun.metrics)
        sink.write(3, {"loss": 1.0})
        sink.close()
        begun.take_leftovers()
        begun.mark(None)
        begun.mark("PREEMPTED")
        begun.has_curves()
        assert begun.read_metric("loss")[-1] == (3, 1.0)
        return begun.notes
    finally:
        begun.release()


def test_a_run_leaves_no_file_that_is_not_tried_here(run: tuple[Config, Path]) -> None:
    entries = {path.name: path.is_dir() for path in run[1].iterdir()}
    assert {name for name, is_folder in entries.items() if not is_folder} <= FILES.keys()
    assert {name for name, is_folder in entries.items() if is_folder} == set(FOLDERS)


@pytest.mark.parametrize("what", [*KINDS, *CONTENTS])
@pytest.mark.parametrize("name", FILES)
def test_whatever_is_in_the_place_of_a_file_harms_nothing(
    copy: Path, precious: Path, monkeypatch: pytest.MonkeyPatch, name: str, what: str
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "7")  # starts are counted
    put(copy / name, what, precious)
    before = tree(copy)
    try:
        continued(copy)
        refused = ""
    except REFUSALS as error:
        refused = str(error)
        assert tree(copy) == before  # as it was
    assert untouched(precious)
    growing = name in ("lock", "metrics.jsonl", "quarantine.jsonl")
    if what in KINDS and (growing or what != "hard_link"):
        assert name in refused
    elif name != "config.json" and not (what == "deep" and FILES[name] < len(DEEP)):  # no id
        assert not refused


@pytest.mark.parametrize("what", [*KINDS, "not utf-8"])
@pytest.mark.parametrize("name", FOLDERS)
def test_whatever_is_in_the_place_of_a_folder_is_named(
    copy: Path, precious: Path, name: str, what: str
) -> None:
    put(copy / name, what, precious)
    if what == "folder":
        RunFolder(copy).acquire()
        return

    def begin() -> None:
        RunFolder(copy).acquire()
        require_writable(copy / name, rank=0)

    with pytest.raises(REFUSALS, match=f"{name}: (leads to no folder|is a file where|.*exists)"):
        begin()
    assert untouched(precious)


def test_folders_may_be_links_of_the_user_and_are_said(copy: Path, tmp_path: Path) -> None:
    for name in FOLDERS:
        shutil.move(copy / name, tmp_path / f"other {name}")
        (copy / name).symlink_to(tmp_path / f"other {name}")
    (tmp_path / "name").symlink_to(copy)
    out = tmp_path / "name"
    assert continued(out)[:3] == [
        f"{out} is a link to {copy}",
        *(f"{out / name} is a link to {tmp_path / f'other {name}'}" for name in FOLDERS),
    ]


@pytest.mark.parametrize("name", [*FOLDERS, *TRACKED, "."])
def test_a_link_of_another_user_is_refused(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    place = copy / name
    place.mkdir(exist_ok=True)
    shutil.move(place, tmp_path / "elsewhere")
    place.symlink_to(tmp_path / "elsewhere")
    if os.geteuid() == 0:
        os.lchown(place, 12345, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(RunError, match="is a symbolic link of another user"):
        RunFolder(copy).acquire()


@pytest.mark.parametrize("what", ["link", "folder", "pipe", "empty"])
@pytest.mark.parametrize("name", ["config.json.tmp", ".config.json.0a0a0a0a.tmp"])
def test_leftovers_are_removed_and_not_followed(
    copy: Path, precious: Path, name: str, what: str
) -> None:
    put(copy / name, what, precious)
    continued(copy)
    assert os.path.lexists(copy / name) == (what == "folder")
    assert untouched(precious)


@pytest.mark.parametrize("what", [*KINDS, "not utf-8"])
def test_a_signal_in_the_start_marks_nothing_else(
    tmp_path: Path, precious: Path, what: str
) -> None:
    put(tmp_path / "PREEMPTED", what, precious)
    mark_stopped(tmp_path)
    assert untouched(precious)


@pytest.mark.parametrize("what", sorted(KINDS))
def test_the_log_of_a_profile_is_a_file_of_its_own(
    tmp_path: Path, precious: Path, what: str
) -> None:
    put(tmp_path / "run.log", what, precious)
    if what == "sparse":  # an earlier log is replaced
        with output_to(tmp_path / "run.log"):
            print("one line")
        assert (tmp_path / "run.log").read_text() == "one line\n"
        return
    with pytest.raises(UnfitFileError, match=r"run.log: (is a|has a second name)"):
        output_to(tmp_path / "run.log").__enter__()
    assert untouched(precious)


@pytest.mark.parametrize("reader", [draw_run, lambda run: last_step(run.metrics),
                                    lambda run: read_spikes(run.metrics),
                                    lambda run: run.read_metric("loss")])  # fmt: skip
@pytest.mark.parametrize("what", sorted(KINDS.keys() - {"hard_link"}))
def test_readers_refuse_what_is_no_file_of_metrics(
    tmp_path: Path, precious: Path, what: str, reader: Callable[[RunFolder], object]
) -> None:
    put(tmp_path / "metrics.jsonl", what, precious)
    if what == "dangling" and reader is not draw_run:
        return
    with pytest.raises(REFUSALS, match=r"metrics.jsonl: (is a|has 1,0)"):
        reader(RunFolder(tmp_path))


GOOD = [json.dumps({"step": step, "loss": 3.0 - step, "knn": 0.5}).encode() for step in (1, 2)]
DAMAGE = {
    "a byte": b"\xff",
    "half a line": b'{"step": 3, "lo',
    "zeros": b"\0" * 5000,
    "a long line": b'{"step": 3, "loss": "' + b"x" * (LONGEST + 2) + b'"}',
    "deep": DEEP,
    "a step that is text": b'{"step": "3", "loss": 1.0}',
    "a step beyond all": b'{"step": 1e400, "loss": 1.0}',
    "no object": b"[3]",
}


@pytest.mark.parametrize("block", [997, 2**20])
@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_last_line_is_cut_off_with_a_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: bytes, block: int
) -> None:
    monkeypatch.setattr(metrics_file, "BLOCK", block)
    monkeypatch.setattr(metrics_file, "LONGEST", 2**12)
    run = RunFolder(tmp_path)
    for end in (b"", b"\n"):
        run.metrics.write_bytes(b"\n".join([*GOOD, damage]) + end)
        assert last_step(run.metrics) == 2
        assert run.trim_metrics(2) == 1
        assert run.metrics.read_bytes() == b"\n".join(GOOD) + b"\n"
        assert run.notes.pop() == f"{run.metrics}: 1 damaged line removed"
        assert run.trim_metrics(2) == 0
        assert not run.notes


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damage_in_the_middle_is_left_out_by_readers_with_a_word_and_removed_by_a_run(
    tmp_path: Path, damage: bytes
) -> None:
    run = RunFolder(tmp_path)
    run.metrics.write_bytes(b"\n".join([GOOD[0], damage, b"", GOOD[1]]))
    told: list[str] = []
    assert metrics_file.read_series(
        run.metrics, lambda name: name == "loss", tell=told.append
    )["loss"].values.tolist() == [2.0, 1.0]  # fmt: skip
    assert told == [
        f"{run.metrics}: 1 line left out, the first at byte {len(GOOD[0]) + 1}: damaged, no metrics "
        "of a step"
    ]
    assert run.read_metric("knn") == [(1, 0.5), (2, 0.5)]
    run.trim_metrics(2)
    assert run.metrics.read_bytes() == b"\n".join(GOOD) + b"\n"
    assert run.notes == [f"{run.metrics}: 1 damaged line removed"]


def test_the_run_goes_on_behind_a_damaged_line(
    run: tuple[Config, Path], copy: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(copy / "checkpoints" / "step_00000004")
    with (copy / "metrics.jsonl").open("ab") as file:
        file.write(b"\xff")
    assert train(run[0], copy, hints=False) == 0
    assert f"{copy / 'metrics.jsonl'}: 1 damaged line removed" in capfd.readouterr().out
    losses = [RunFolder(one).read_metric("loss") for one in (run[1], copy)]
    assert losses[0] == losses[1]


def test_a_link_in_the_folder_ends_the_command_with_2(
    run: tuple[Config, Path], copy: Path, precious: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    put(copy / "curves.png", "link", precious)
    with pytest.raises(SystemExit, match="2"):
        train(run[0], copy)
    found = capfd.readouterr().err
    assert "curves.png: is a symbolic link where a file is due" in found
    assert "Traceback" not in found
    assert untouched(precious)


@pytest.mark.filterwarnings("ignore:constrained_layout not applied")
def test_curves_are_drawn_of_whatever_is_in_the_config_and_the_metrics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(curves, "MOST_NORMS", 2)
    run = RunFolder(tmp_path)
    odd = "\ud800\x1b$\\bad$\n" * 100
    row = {"step": 2**62, "loss": 1e308, "knn": "x", odd: 1, f"gradient_norm/{odd}": 5}
    row |= {f"gradient_norm/{number}": number for number in range(10_000)}
    lines = [json.dumps(row), json.dumps({"step": -(2**62), "loss": -1e308, "knn": 0.5})]
    run.metrics.write_text("\n".join(lines))
    configs: list[object] = [
        {"config": {"recipe": odd}, "curves": {"figures": {"knn": odd}, "lines": {"loss": {odd: 1}}}},
        {"config": [], "curves": {"figures": {"knn": 5}, "lines": {"loss": [1]}}, "resolved": 3},
        {"curves": {"lines": {"loss": {"a": "b", "c": 10**400}}}, "resolved": {"steps_per_epoch": 1e308}},
        {"resolved": {"steps_per_epoch": 10**400}, "curves": 7},
    ]  # fmt: skip
    for config in configs:
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert draw_run(run).stat().st_size > 1000
