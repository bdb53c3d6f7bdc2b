"""Ranks that crash in the library are started once more; every other end is an answer."""

from __future__ import annotations

import subprocess

import pytest

from tests.distributed.launching import Completed, again_after_a_crash


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
    with pytest.warns(UserWarning, match="a rank crashed, all are started again: where"):
        done = again_after_a_crash(launches)
    assert [rank.returncode for rank in done] == [0, 0]


def test_a_second_crash_is_the_answer():
    with pytest.warns(UserWarning, match="started again"):
        done = again_after_a_crash(Launches("kill -SEGV $$", "kill -SEGV $$"))
    assert [rank.returncode for rank in done] == [-11, 0]


@pytest.mark.parametrize("end", ["exit 0", "exit 1", "kill -ABRT $$", "kill -KILL $$"])
def test_no_other_end_is_repeated(end):
    launches = Launches(end, "exit 0")
    again_after_a_crash(launches)
    assert launches.left == ["exit 0"]
