"""Ranks that crash outside Python are started once more; every other end is an answer."""

from __future__ import annotations

import subprocess

import pytest
import torch

from tests.distributed.launching import Completed, again_after_a_crash, launch


class Launches:
    """Real processes of a shell, one command of two ranks for each start."""

    def __init__(self, *commands: str) -> None:
        self.left = list(commands)

    def __call__(self) -> Completed:
        command = self.left.pop(0)
        return [
            subprocess.run(["sh", "-c", line], capture_output=True, check=False)
            for line in (command, "exit 0")
        ]


def test_ranks_are_started_again_after_a_crash():
    launches = Launches("echo where >&2; kill -SEGV $$", "exit 0")
    with pytest.warns(UserWarning, match="crashed outside Python, all are started again: where"):
        done = again_after_a_crash(launches)
    assert [rank.returncode for rank in done] == [0, 0]


def test_a_second_crash_is_the_answer():
    with pytest.warns(UserWarning, match="started again"):
        done = again_after_a_crash(Launches("kill -SEGV $$", "kill -SEGV $$"))
    assert [rank.returncode for rank in done] == [-11, 0]


@pytest.mark.parametrize(
    "end",
    [
        "exit 0",
        "exit 1",
        "kill -ABRT $$",
        "kill -KILL $$",
        "echo 'Current thread 0x1 (most recent call first):' >&2; kill -SEGV $$",
    ],
)
def test_no_other_end_is_repeated(end):
    launches = Launches(end, "exit 0")
    again_after_a_crash(launches)
    assert launches.left == ["exit 0"]


CRASHING = """
import ctypes, os, sys, time
from pathlib import Path

out, rank = Path(sys.argv[1]), os.environ["RANK"]
first = not (out.parent / "crashed").exists()
(out / rank).mkdir()
assert (out / "input").exists()
if first and rank == "1":
    (out.parent / "crashed").touch()
    in_c = ctypes.cast(ctypes.CDLL(None).strlen, ctypes.c_void_p)
    create = ctypes.CDLL(None).pthread_create
    create.argtypes = [ctypes.c_void_p] * 4
    create(ctypes.addressof(ctypes.c_ulong()), None, in_c, None)  # strlen(NULL)
    time.sleep(60)
(out / f"rank{rank}.pt").write_bytes(Path(sys.argv[2]).read_bytes())
"""


def test_a_second_start_finds_the_folder_as_the_first_did(tmp_path, monkeypatch):
    """Real processes, one of which crashes in a thread of C."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "input").touch()
    torch.save({"answer": 1}, tmp_path / "result.pt")
    (tmp_path / "crashing.py").write_text(CRASHING)
    monkeypatch.setattr("tests.distributed.launching.ROOT", tmp_path)
    with pytest.warns(UserWarning, match="Segmentation fault"):
        found = launch(2, out, str(tmp_path / "result.pt"), module="crashing")
    assert found == [{"answer": 1}] * 2
