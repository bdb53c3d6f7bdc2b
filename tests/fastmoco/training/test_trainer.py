"""The run as a whole: it learns, it continues bit for bit, it refuses what is not the same run, it
stops when asked."""

from __future__ import annotations

import json
import math
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch

from benchmarks.growth_inputs import write_metrics
from fastmoco.checkpoint import load_latest
from fastmoco.config import Config
from fastmoco.config.serial import flatten
from fastmoco.distributed.mesh import World
from fastmoco.errors import RunError
from fastmoco.faults.stop_signal import StopSignal
from fastmoco.models.precision import choose_precision
from fastmoco.objectives.build import build_objective
from fastmoco.objectives.reference import plain_forward
from fastmoco.optim.build import build_optimizer
from fastmoco.recipes import quickstart_digits
from fastmoco.run.folder import RunFolder
from fastmoco.telemetry.metrics import Throughput
from fastmoco.training import resume
from fastmoco.training.trainer import Trainer
from tests import killed_runs
from tests.distributed.launching import forked_ranks
from tests.fault_runs import start_command
from tests.held_steps import WORDS

WORLD = World()


def _train(config: Config, out: Path) -> int:
    trainer = Trainer.build(config, out, WORLD)
    try:
        return trainer.run()
    finally:
        trainer.close()


def _losses(out: Path) -> list[tuple[int, float]]:
    return RunFolder(out).read_metric("loss")


def _words(config: Config, out: Path) -> list[str]:
    """The command line of a run that differs from the recipe in a few plain fields."""
    start, wanted = flatten(quickstart_digits()), flatten(config)
    words = [
        word
        for name, value in wanted.items()
        if value != start[name]
        for word in (f"--{name.replace('_', '-')}", str(value))
    ]
    return ["train", "quickstart_digits", "--out", str(out), *words]


def _command(config: Config, out: Path, *launcher: str, hold: int = 0) -> list[str]:
    """A process of such a run, which waits after `hold` steps; 0: nowhere."""
    program = "import sys; from fastmoco.cli.main import main; sys.exit(main())"
    if hold:
        program = f"{WORDS.format(after=hold)}; {program}"
    return [sys.executable, *launcher, "-c", program, *_words(config, out)]


@contextmanager
def _started(config: Config, out: Path, *, step: int, held_after: int) -> Iterator[BaseProcess]:
    """A forked process that has taken a step of a run; its output is in `out.log`."""
    pytest.importorskip("tyro", reason="tyro is not installed")
    log = Path(f"{out}.log")
    process = killed_runs.start_held(_words(config, out), log, held_after=held_after)
    try:
        deadline = time.monotonic() + 120
        while not any(at >= step for at, _ in _losses(out)):
            assert process.is_alive(), log.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        yield process
        process.join(240)
        assert process.exitcode is not None
    finally:
        process.kill()


@pytest.fixture(scope="module")
def whole(small_run, tmp_path_factory) -> Path:
    """The folder of an uninterrupted run."""
    out = tmp_path_factory.mktemp("whole")
    assert _train(small_run, out) == 0
    return out


@pytest.fixture(scope="module")
def brief(brief_run, tmp_path_factory) -> Path:
    """The folder of an uninterrupted brief run."""
    out = tmp_path_factory.mktemp("brief")
    assert _train(brief_run, out) == 0
    return out


def test_a_run_logs_every_step_and_its_loss_falls(whole):
    losses = _losses(whole)
    assert [step for step, _ in losses] == list(range(1, 16))
    assert losses[-1][1] < losses[0][1] - 0.1
    row = json.loads((whole / "metrics.jsonl").read_text().splitlines()[-1])
    assert {
        "lr",
        "ema_momentum",
        "images_per_s",
        "wait_share",
        "feature_std",
        "gradient_norm/total",
    } <= set(row)
    synthetic = json.loads(write_metrics(whole.parent / "synthetic", 2).read_text().splitlines()[1])
    assert set(synthetic) - set(row) <= {"gradient_norm/patch_embed"}
    saved = json.loads((whole / "config.json").read_text())
    assert saved["resolved"]["total_steps"] == 15
    assert saved["resolved"]["versions"]["torch"] == torch.__version__


# before the first checkpoint; right after one; late. Where in the next two steps the kill falls is
# the machine's choice.
@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 4, 11])
def test_killed_at_any_step_it_continues_bit_for_bit(brief_run, brief, tmp_path, step):
    out = tmp_path / "run"
    with _started(brief_run, out, step=step, held_after=step + 2) as process:
        process.kill()
    assert process.exitcode == -signal.SIGKILL
    assert _losses(out)[-1][0] < 15
    assert _train(brief_run, out) == 0
    assert _losses(out) == _losses(brief)
    ours, theirs = load_latest(out / "checkpoints"), load_latest(brief / "checkpoints")
    assert ours is not None
    assert theirs is not None
    assert ours.tensors.keys() == theirs.tensors.keys()
    assert all(torch.equal(ours.tensors[name], theirs.tensors[name]) for name in ours.tensors)


@pytest.mark.slow
def test_sigterm_finishes_the_step_saves_and_exits_with_75(brief_run, brief, tmp_path):
    config = replace(brief_run, checkpoint=replace(brief_run.checkpoint, every_steps=0))
    out = tmp_path / "run"
    run = start_command(_command(config, out, hold=4), out)
    try:
        run.wait_for_step(2)
        run.process.send_signal(signal.SIGTERM)
        assert run.end() == 75, run.text()
    finally:
        run.close()
    assert "SIGTERM: saved step" in run.text()
    assert _train(config, out) == 0
    assert _losses(out) == _losses(brief)


TRAIN_ALL = """
import json, sys
from fastmoco.cli import train
from fastmoco.cli.main import main
train._draw = lambda *arguments, **options: None  # matplotlib takes longer than the run
sys.exit(max(main(words) for words in json.loads(sys.argv[1])))
"""


# fp64 at the recipe's peak of the learning rate: a real difference would show, rounding cannot.
# fp32 at a rate too small for AdamW to turn rounding noise into whole steps (its first updates have
# the size of lr however small the gradient).
@pytest.fixture(scope="module")
def on_two(brief_run, digits, tmp_path_factory) -> dict[str, tuple[Config, Path]]:
    """Config and folder of runs on two processes, by their precision. One start trains both, fp32
    first: what it left behind would show in fp64.
    """
    pytest.importorskip("tyro", reason="tyro is not installed")
    knn = replace(brief_run.knn, every_epochs=3, test_shards=digits[0], max_share=1.0)
    config = replace(brief_run, knn=replace(knn, max_test_images=300))
    folder = tmp_path_factory.mktemp("two")
    runs = {
        precision: (
            replace(config, precision=precision, optim=replace(config.optim, lr=lr)),
            folder / precision,
        )
        for precision, lr in (("fp32", 4e-6), ("fp64", 6e-3))
    }
    words = json.dumps([_words(config, out) for config, out in runs.values()])
    program = folder / "program.py"
    program.write_text(TRAIN_ALL)
    ranks = forked_ranks(["tests.distributed.run_file", str(program), words], 2, {})
    assert [rank.returncode for rank in ranks] == [0, 0], [rank.stderr for rank in ranks]
    return runs


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "tolerance"), [("fp64", 1e-8), ("fp32", 1e-5)])
def test_two_processes_train_to_the_losses_of_one(on_two, tmp_path, precision, tolerance):
    config, out = on_two[precision]
    assert _train(config, tmp_path) == 0
    one, two = _losses(tmp_path), _losses(out)
    assert [step for step, _ in two] == [step for step, _ in one] == list(range(1, 16))
    assert max(abs(a - b) for (_, a), (_, b) in zip(one, two, strict=True)) < tolerance
    accuracies = [RunFolder(folder).read_metric("knn") for folder in (tmp_path, out)]
    assert accuracies[0] == accuracies[1]
    assert [step for step, _ in accuracies[0]] == [0, 15]


def test_a_finished_run_has_nothing_left_to_do(small_run, whole):
    before = (whole / "metrics.jsonl").read_text()
    assert _train(small_run, whole) == 0
    assert (whole / "metrics.jsonl").read_text() == before


def test_random_numbers_go_on_where_the_run_was_saved(brief_run, tmp_path):
    trainer = Trainer.build(brief_run, tmp_path, WORLD)
    try:
        trainer.step(trainer.loader.next())
        torch.rand(7)  # as a model with dropout draws
        trainer._save(force=True)
        saved = torch.get_rng_state()
    finally:
        trainer.close()
    torch.manual_seed(123)
    Trainer.build(brief_run, tmp_path, WORLD).close()
    assert torch.equal(torch.get_rng_state(), saved)


def test_a_continued_run_knows_its_accuracies(brief_run, digits, tmp_path):
    knn = replace(brief_run.knn, every_epochs=1, test_shards=digits[1])
    config = replace(brief_run, knn=knn)
    state = {"last_epoch": 0.2, "last": {"knn": 0.5}, "best": {"knn": 0.75}}
    trainer = Trainer.build(config, tmp_path, WORLD)
    try:
        trainer.step(trainer.loader.next())
        (monitor,) = trainer.monitors
        monitor.load_state_dict(state)
        trainer._save(force=True)
    finally:
        trainer.close()
    again = Trainer.build(config, tmp_path, WORLD)
    again.close()
    assert again.step_count == 1
    assert [monitor.state_dict() for monitor in again.monitors] == [{**state, "best_step": {}}]


def test_another_config_is_refused_by_its_fields(small_run, whole):
    changed = replace(small_run, seed=1, optim=replace(small_run.optim, lr=1.0))
    with pytest.raises(RunError, match=r"seed: 0 -> 1; optim.lr: 0.0015 -> 1.0"):
        Trainer.build(changed, whole, WORLD)


def test_other_images_are_refused(small_run, whole, digits):
    with pytest.raises(RunError, match="other images"):
        Trainer.build(
            replace(small_run, data=replace(small_run.data, shards=digits[1])), whole, WORLD
        )


def test_the_twin_moves_as_if_before_the_optimizer_and_by_the_schedule(brief_run, tmp_path):
    """One step by the class against one step by the book, in float64."""
    config = replace(brief_run, precision="fp64")
    trainer = Trainer.build(config, tmp_path, WORLD)
    try:
        objective = trainer.objective
        twin = build_objective(config, torch.device("cpu"))
        optimizer = build_optimizer(config, twin.named_parameters(), twin.averages()).inner
        batch = trainer.loader.next()
        batch = replace(batch, views=tuple(view.double() for view in batch.views))
        for step in range(2):
            at = trainer.progress(step)
            lr, momentum = (
                trainer.train_step.learning_rate(at),
                trainer.objective.schedules(at)["ema_momentum"],
            )
            trainer.step_count = step
            output = trainer.step(batch)
            for group in optimizer.param_groups:
                group["lr"] = lr
            with torch.no_grad():
                pairs = zip(
                    twin.momentum_encoder.parameters(), twin.encoder.parameters(), strict=True
                )
                for average, source in pairs:
                    average.copy_(momentum * average + (1 - momentum) * source)
            plain = plain_forward(twin, *batch.views)
            optimizer.zero_grad()
            plain.loss.backward()
            optimizer.step()
            assert abs(output.loss.item() - plain.loss.item()) < 1e-12
        # The trainer has made the average ready for the next step.
        momentum = trainer.objective.schedules(trainer.progress(2))["ema_momentum"]
        twin.update_momentum_encoder(momentum)
        for name, value in objective.momentum_encoder.state_dict().items():
            torch.testing.assert_close(
                value, twin.momentum_encoder.state_dict()[name], rtol=0, atol=1e-12
            )
    finally:
        trainer.close()


def test_a_line_of_metrics_has_the_figures_of_its_step(brief_run, tmp_path):
    """Rates by the schedule's definition; loss and cosines from the step's own output."""
    config = replace(brief_run, precision="fp64", log_every_steps=2)
    trainer, results = Trainer.build(config, tmp_path, WORLD), []
    plain_step = trainer.step
    trainer.step = lambda *args, **more: results.append(plain_step(*args, **more)) or results[-1]
    try:
        assert trainer.run() == 0
    finally:
        trainer.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 4, 6, 8, 10, 12, 14, 15]
    assert len(results) == 15
    warmup, peak = config.optim.warmup_epochs, config.peak_lr
    for row in rows:
        result, epoch = (
            results[row["step"] - 1],
            (row["step"] - 1) / 5,
        )  # five steps an epoch, of three
        shape = 0.5 * (1 + math.cos(math.pi * (epoch - warmup) / (3 - warmup)))
        assert row["lr"] == pytest.approx(peak * (epoch / warmup if epoch < warmup else shape))
        momentum = 1 - 0.5 * (1 + math.cos(math.pi * epoch / 3)) * (
            1 - config.objective.ema_momentum
        )
        assert row["ema_momentum"] == pytest.approx(momentum)
        assert row["epoch"] == pytest.approx(row["step"] / 5)
        assert row["loss"] == pytest.approx(result.loss.item(), rel=1e-9)

        # Positives are the other view's keys of the same image; the accuracy counts among all keys.
        watch = result.output.watch
        q1, q2, k1, k2 = (
            rows / rows.norm(dim=1, keepdim=True) for rows in (*watch["queries"], *watch["keys"])
        )
        cosines = q1 @ k2.T
        count = len(cosines)
        others = (cosines.sum() - cosines.trace()).item() / (count * (count - 1))
        assert row["cosine/positive"] == pytest.approx(cosines.trace().item() / count, abs=1e-6)
        assert row["cosine/negative"] == pytest.approx(others, abs=1e-6)
        spread = q1.std(dim=0, unbiased=False).mean().item()
        assert row["feature_std"] == pytest.approx(spread, abs=1e-6)
        both = torch.stack([cosines, q2 @ k1.T])
        ranks = (both > both.diagonal(dim1=1, dim2=2)[..., None]).sum(2).double()
        for name, first in (("contrast/top1", 1), ("contrast/top5", 5)):
            share = (ranks < first).double().mean().item()
            assert row[name] == pytest.approx(share, abs=1.5 / (2 * count))
    assert 0 < warmup < 3
    assert rows[-1]["contrast/top1"] < rows[-1]["contrast/top5"]


def test_evaluations_and_saves_are_no_part_of_the_speed(brief_run, digits, tmp_path, monkeypatch):
    """By a clock of the test's own: a step takes 2 s, a measurement 1000 s, a save 500 s."""
    knn = replace(brief_run.knn, every_epochs=1, test_shards=digits[1], max_share=1.0)
    trainer, now = Trainer.build(replace(brief_run, knn=knn), tmp_path, WORLD), [0.0]
    (monitor,) = trainer.monitors
    recorder, plain_step, plain_state = trainer.recorder, trainer.step, trainer._state
    recorder.meter = Throughput(global_batch_size=256, total_steps=15, clock=lambda: now[0])

    def pass_time(seconds, result):
        now[0] += seconds
        return result

    monkeypatch.setattr(
        trainer, "step", lambda *args, **more: pass_time(2, plain_step(*args, **more))
    )
    monkeypatch.setattr(trainer, "_state", lambda: pass_time(500, plain_state()))
    monkeypatch.setattr(monitor, "measure", lambda *_: pass_time(1000, {"knn": 0.5}))
    monkeypatch.setattr(monitor, "is_due", lambda _: True)
    try:
        assert trainer.run() == 0
    finally:
        trainer.close()
    assert now[0] >= 15 * 2 + 5 * 500 + 4 * 1000
    assert RunFolder(tmp_path).read_metric("images_per_s") == [
        (step, 128.0) for step in range(1, 16)
    ]


def test_knn_rises_while_training(small_run, digits, tmp_path):
    knn = replace(small_run.knn, every_epochs=4, test_shards=digits[1], max_share=1.0)
    config = replace(small_run, epochs=8, log_every_steps=10, knn=knn)
    assert _train(config, tmp_path) == 0
    history = RunFolder(tmp_path).read_metric("knn")
    assert [step for step, _ in history] == [0, 20, 40]
    assert history[-1][1] > history[0][1] + 0.05


def test_another_precision_is_refused_even_if_auto_chose_it(small_run, whole, monkeypatch):
    ran = choose_precision("auto", WORLD.device)
    other = "fp32" if ran == "bf16" else "bf16"
    monkeypatch.setattr("fastmoco.training.trainer.choose_precision", lambda *_: other)
    with pytest.raises(
        RunError,
        match=rf"precision on this machine: '{ran}' -> '{other}' \(give --precision {ran}\)",
    ):
        Trainer.build(small_run, whole, WORLD)


def test_another_number_of_threads_is_reported(small_run, whole, capsys):
    trainer = Trainer.build(replace(small_run, threads=2), whole, WORLD)
    trainer.close()
    assert "another set-up: threads 1 -> 2" in capsys.readouterr().out


def test_a_state_that_is_not_finite_is_never_saved(brief_run, tmp_path):
    trainer = Trainer.build(brief_run, tmp_path, WORLD)
    try:
        trainer.step(trainer.loader.next())
        with torch.no_grad():
            trainer.objective.predictor[0].weight[0, 0] = float("nan")
        with pytest.raises(RunError, match="is not finite: this state is not saved"):
            trainer._save(force=True)
    finally:
        trainer.close()
    assert load_latest(tmp_path / "checkpoints") is None


@pytest.mark.faults
def test_what_a_run_may_change_with_allow_and_what_it_may_not(small_run, whole, tmp_path):
    """T29. The refusal prints what changed and names the way; a change of the state or of the order
    has none."""
    faster = replace(small_run, optim=replace(small_run.optim, lr=1.0))
    with pytest.raises(
        RunError, match=r"optim.lr: 0.0015 -> 1.0.* give --allow optim.lr if you mean it"
    ):
        Trainer.build(faster, whole, WORLD)
    Trainer.build(faster, whole, WORLD, allow=["optim.lr"]).close()
    both = replace(faster, seed=1)
    with pytest.raises(RunError, match=r"changed: seed: 0 -> 1\. (?!.*--allow)"):
        Trainer.build(both, whole, WORLD, allow=["optim.lr"])
    with pytest.raises(RunError, match="--allow seed: cannot change within a run"):
        Trainer.build(both, whole, WORLD, allow=["optim.lr", "seed"])
    free = replace(small_run, log_every_steps=7, faults=replace(small_run.faults, hang_timeout_s=5))
    Trainer.build(free, whole, WORLD).close()
    views = replace(
        small_run,
        data=replace(small_run.data, view1=replace(small_run.data.view1, flip_probability=0.25)),
    )
    Trainer.build(views, whole, WORLD, allow=["data.view1.flip-probability"]).close()


def test_ranks_that_see_different_folders_are_refused(monkeypatch):
    """As on two machines whose --out is a disk of their own: one finds step 6, the other
    nothing."""
    monkeypatch.setattr(resume, "gather_rows", lambda rows, device: torch.tensor([int(rows[0]), 6]))
    with pytest.raises(
        RunError, match=r"different steps, \[0, 6\]: every rank must see the same --out"
    ):
        resume.require_same_step(None, WORLD)


def test_a_run_is_marked_as_finished_while_signals_are_still_heard(
    brief_run, tmp_path, monkeypatch
):
    """One that comes as the handlers go would end the process the usual way, and leave a finished
    run without its mark."""
    done = tmp_path / "run" / "DONE"
    there = []
    restore = StopSignal._restore
    monkeypatch.setattr(
        StopSignal, "_restore", lambda self: (there.append(done.exists()), restore(self))
    )
    config = replace(brief_run, epochs=1, optim=replace(brief_run.optim, warmup_epochs=0))
    assert _train(config, done.parent) == 0
    assert there == [True]
