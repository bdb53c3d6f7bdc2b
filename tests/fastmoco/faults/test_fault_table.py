"""Ranks that are killed, stopped, poisoned and slow: what the others do, what is said, and what the
run ends in."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from fastmoco.checkpoint import load_latest
from fastmoco.config import Config
from tests.fault_runs import FaultRun, assert_same_end, start
from tests.held_steps import WORDS

pytestmark = [pytest.mark.faults, pytest.mark.long, pytest.mark.slow]
Start = Callable[..., FaultRun]


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Start]:
    """Starts runs, and ends what a test leaves of them."""
    started: list[FaultRun] = []

    def begin(config: Config, name: str = "run", **more: object) -> FaultRun:
        started.append(start(config, tmp_path / name, **more))  # type: ignore[arg-type]
        return started[-1]

    yield begin
    for one in started:
        one.close()


@pytest.fixture(scope="module")
def config(small_run: Config) -> Config:
    """Ten steps on two ranks, a checkpoint every third."""
    rules = replace(
        small_run.faults, hang_timeout_s=6.0, first_step_timeout_s=60.0, stop_within_s=4.0
    )
    return replace(
        small_run, epochs=2, optim=replace(small_run.optim, warmup_epochs=1), faults=rules
    )


@pytest.fixture(scope="module")
def whole(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the run that nothing happened to."""
    one = start(config, tmp_path_factory.mktemp("whole") / "run")
    try:
        assert one.end() == 0, one.text()
    finally:
        one.close()
    assert (one.out / "DONE").exists()
    return one.out


SLOW = """
step = trainer.Trainer.step
def slower(self, *args, **more):
    import time
    time.sleep(0.4)
    return step(self, *args, **more)
trainer.Trainer.step = slower
"""


def test_a_killed_rank_is_restarted_and_the_run_ends_in_the_same_bits(
    run: Start, config: Config, whole: Path
) -> None:
    """T01, and with it finding 5: new ranks meet through the store that holds the dead ones'
    addresses."""
    one = run(config, restarts=1, before=SLOW)
    one.wait_for_step(4)
    first = one.pid(0)
    one.signal(1, signal.SIGKILL)
    one.wait_for_text("failed (exitcode: -9)")  # said when its peer has ended too
    one.wait_for(lambda: one.pid(0) != first, 90)
    assert one.end() == 0, one.text()
    assert "continuing from" in one.text()
    assert_same_end(one.out, whole)


def test_a_killed_rank_without_restarts_ends_the_run_and_the_same_command_goes_on(
    run: Start, config: Config, whole: Path
) -> None:
    """T02."""
    one = run(config, before=SLOW)
    one.wait_for_step(4)
    one.signal(1, signal.SIGKILL)
    assert one.end(60) != 0
    saved = load_latest(one.out / "checkpoints")
    assert saved is not None
    assert saved.step >= 3
    assert not (one.out / "DONE").exists()
    assert not (one.out / "PREEMPTED").exists()
    assert run(config).end() == 0, one.text()
    assert_same_end(one.out, whole)


def test_a_stopped_rank_is_named_killed_and_restarted(
    run: Start, config: Config, whole: Path
) -> None:
    """T03. Which of the two: the one whose store is the launcher's, and that no peer could end by a
    signal."""
    one = run(config, restarts=1, before=SLOW)
    one.wait_for_step(4)
    one.signal(1, signal.SIGSTOP)
    one.wait_for_text("rank 1 hangs: no heartbeat for 6 s")
    assert one.end() == 0, one.text()
    assert_same_end(one.out, whole)


def test_a_rank_that_lives_and_does_not_get_on_is_named_with_its_place(
    run: Start, config: Config
) -> None:
    """Both wait in the end; the one that is behind says so, not the one that waits for it."""
    before = """
next_batch = None
def stuck(self, *args, **more):
    if rank == 1 and self.step_count == 3:
        sleep_for_ever()
    return step(self, *args, **more)
def sleep_for_ever():
    import time
    time.sleep(1000)
step = trainer.Trainer._one_step
trainer.Trainer._one_step = stuck
"""
    one = run(config, before=before)
    one.wait_for_step(3)
    one.wait_for_text("rank 1 hangs: between steps has taken")
    assert one.end() != 0
    assert "sleep_for_ever" in one.text()
    assert "rank 0 hangs" not in one.text()


def test_a_signal_ends_a_rank_that_waits_for_a_stopped_peer(run: Start, config: Config) -> None:
    """T05."""
    patient = replace(config, faults=replace(config.faults, hang_timeout_s=600.0))
    one = run(patient, before=WORDS.format(after=2))
    one.wait_for_step(2)
    one.signal(1, signal.SIGSTOP)
    time.sleep(1)
    one.signal(0, signal.SIGTERM)
    one.wait_for_text("ended without saving")  # long before the ten minutes a hang may take here


POISON = """
good = trainer.Trainer.step
def step(self, batch, **more):
    if self.step_count == 3:
        {bad}
    return good(self, batch, **more)
trainer.Trainer.step = step
"""
NAN = """
        import time
        if rank == 1:
            batch.views[0][0, 0, 0, 0] = float("nan")
"""
NEVER = """
        self.step_count += 1
        return self.last
    self.last = good(self, batch, **more)
    return self.last
"""


def test_a_bad_pixel_on_one_rank_skips_the_step_on_both(run: Start, config: Config) -> None:
    """T26, on two ranks: the end is that of a run whose ranks both passed over the step."""
    for name, bad in (("nan", NAN), ("never", NEVER)):
        one = run(config, name, before=POISON.format(bad=bad))
        assert one.end() == 0, one.text()
        assert ("1 step up to step 4 skipped" in one.text()) == (name == "nan")
    assert_same_end(one.out.with_name("nan"), one.out)


def test_a_slow_rank_is_reported_with_what_it_is_slow_at(run: Start, config: Config) -> None:
    """T35."""
    before = """
good, good_batch = trainer.Trainer.step, trainer.Loader.next
def slow_head(self, *args, **more):
    import time
    if rank == 1:
        time.sleep(0.5)
    return good(self, *args, **more)
trainer.Trainer.step = slow_head
"""
    one = run(config, before=before)
    assert one.end() == 0, one.text()
    slow = [line for line in one.text().splitlines() if "is slow" in line]
    assert any("rank 1 is slow" in line and "in the encoders" in line for line in slow), one.text()
    assert not any("rank 0 is slow" in line and "in the encoders" in line for line in slow), (
        one.text()
    )


def test_a_run_that_dies_at_every_start_is_given_up(run: Start, config: Config) -> None:
    """T38: torchrun would try seven times."""
    before = """
def die(self, *args, **more):
    print("<tried>", flush=True)
    os._exit(1)
trainer.Trainer.step = die
"""
    one = run(config, ranks=1, restarts=6, before=before)
    assert one.end() != 0
    assert one.text().count("<tried>") == 3, one.text()
    assert "3 starts from step 0 reached no new checkpoint" in one.text()


def test_a_rank_that_dies_in_every_first_step_is_no_request_to_stop(
    run: Start, config: Config
) -> None:
    """T38: what is left of such a start hears torchrun's SIGTERM, as it would hear a person's, and
    has no step to lose."""
    before = """
def die(self, *args, **more):
    import signal, time
    print("<tried>", flush=True)
    time.sleep(0.5)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(1000)
trainer.Trainer.step = die
"""
    one = run(config, restarts=6, before=before)
    assert one.end() != 0
    assert not (one.out / "PREEMPTED").exists()
    assert one.text().count("<tried>") == 6, one.text()
    assert "3 starts from step 0 reached no new checkpoint" in one.text()


def test_a_set_smaller_than_a_batch_is_refused_by_every_rank(run: Start, config: Config) -> None:
    """T39. Fewer shards than ranks are no fault here: ranks share a shard (tests of two ranks train
    on a single one)."""
    one = run(replace(config, global_batch_size=2048))
    assert one.end() != 0  # long before a first step may be said to hang
    assert (
        one.text().count(
            "global_batch_size=2048: is larger than the whole set of 1437 samples; lower it"
        )
        >= 1
    )


def test_a_crash_behind_the_last_step_is_no_failure(run: Start, config: Config) -> None:
    """T07: the mark is there before anything goes down, and a restarted worker finds nothing left
    to do."""
    before = "trainer.Trainer.close = lambda self: os.abort()"
    one = run(config, ranks=0, before=before)
    assert one.end() == -signal.SIGABRT
    assert (one.out / "DONE").exists()
    again = run(config, ranks=0)
    assert again.end() == 0
    assert "finished already" in again.text()
    assert (one.out / "DONE").exists()
