"""kill -9 at any moment of a save: every folder afterwards is complete and bit-exact, or
ignored."""

import itertools
import os
import random
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch.distributed as dist

from fastmoco.checkpoint import (
    group_for_saving,
    list_checkpoints,
    load_checkpoint,
    load_latest,
    unfinished_saves,
)
from tests.checkpoint_content import assert_same, content, save

pytestmark = pytest.mark.faults


def save_step_after_step(root: Path, first: int, store: Path | None, rank: int, done: int) -> None:
    """What a child does until it is killed, or until a save fails because its peer was."""
    group = None
    if store is not None:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        dist.init_process_group(
            "gloo", store=dist.FileStore(str(store), 2), rank=rank, world_size=2
        )
        group = group_for_saving(10)
    for step in itertools.count(first):
        save(root, step, group=group)
        if rank == 0:
            os.write(done, b"%d\n" % step)


@contextmanager
def children(root: Path, first: int, store: Path | None) -> Iterator[tuple[list[int], int]]:
    """One process that saves alone, or two that save together; their ids and the pipe to which each
    save is reported."""
    reading, writing = os.pipe()
    pids = []
    for rank in range(1 if store is None else 2):
        pid = os.fork()
        if pid == 0:
            try:
                os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
                save_step_after_step(root, first, store, rank, writing)
            finally:
                os._exit(1)
        pids.append(pid)
    os.close(writing)
    try:
        yield pids, reading
    finally:
        os.close(reading)


def wait_for(pid: int, seconds: float) -> int:
    """The status of a child that ends by itself; fails if it does not."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return status
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    pytest.fail(f"process {pid} went on without its peer")


def check_all(root: Path, last_done: int) -> int:
    """Every committed folder is what was saved, and nothing that was reported as saved is gone; the
    newest step."""
    for path in list_checkpoints(root):
        loaded = load_checkpoint(path)
        assert_same(loaded.tensors, content(loaded.step))
        assert loaded.state == {"step": loaded.step, "lr": 0.1}
    newest = load_latest(root)
    assert newest is not None
    assert newest.skipped == ()
    assert newest.step >= last_done, "a save that was reported as done is gone"
    return newest.step


def kill_again_and_again(root: Path, times: int, *, ranks: int, seed: int) -> int:
    """The children share one folder, as a run that is restarted again and again does. Returns the
    saves interrupted."""
    rng, first, interrupted = random.Random(seed), 1, 0
    for trial in range(times):
        store = root.parent / f"store{trial}" if ranks == 2 else None
        with children(root, first, store) as (pids, reading):
            reported = os.read(reading, 100)  # the first save is done
            time.sleep(rng.uniform(0.0, 0.06))
            victims = pids if trial % 3 else [rng.choice(pids)]
            for pid in victims:
                os.kill(pid, signal.SIGKILL)
            for pid in pids:
                status = wait_for(pid, 30)
                assert os.WIFSIGNALED(status) == (pid in victims), "the child had ended by itself"
            while more := os.read(reading, 1000):
                reported += more
        interrupted += len(unfinished_saves(root))
        first = check_all(root, int(reported.split()[-1])) + 1
    return interrupted


def test_ten_kills_of_a_process_that_saves_alone(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    assert kill_again_and_again(tmp_path / "c", 10, ranks=1, seed=1) > 0, (
        "no kill hit a save: the test proves nothing"
    )


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "times"), [(1, 20), (2, 30)])
def test_fifty_kills_while_saving_never_leave_a_believable_half(
    tmp_path: Path, ranks: int, times: int
) -> None:
    """Of two ranks every third time only one is killed: the other must end by itself, with an
    error."""
    (tmp_path / "c").mkdir()
    interrupted = kill_again_and_again(tmp_path / "c", times, ranks=ranks, seed=ranks)
    assert interrupted > times // 10, "too few kills hit a save: the test proves little"
