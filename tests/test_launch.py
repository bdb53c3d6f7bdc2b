"""The launch scripts with real processes: preemption and the way back, SLURM by stand-ins, names
that are no names."""

from __future__ import annotations

import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastmoco.checkpoint import load_latest
from fastmoco.cli.launch import launch, launch_command
from fastmoco.errors import RunError
from fastmoco.run.folder import RunFolder
from tests.fault_runs import ROOT, FaultRun, environment, start_command
from tests.held_steps import SITE

pytestmark = pytest.mark.faults

SCRIPTS = sorted((ROOT / "launch").glob("*.sh"))
STUBS = {
    # Starts the tasks, passes on what SLURM's --signal sends to them, and by --kill-on-bad-exit
    # kills all behind the first.
    "srun": """#!{python}
import os, signal, subprocess, sys, time
command = sys.argv[1:]
while command[0].startswith("--"):
    command.pop(0)
shared = os.environ | {{"SLURM_NTASKS": "2", "SLURM_TASKS_PER_NODE": "2", "SLURM_STEP_ID": "0"}}
shared |= {{"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": os.environ["STUB_HOST"]}}
tasks = [subprocess.Popen(command, env=shared | {{"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)}}) for i in range(2)]
signal.signal(signal.SIGUSR1, lambda *_: [task.send_signal(signal.SIGUSR1) for task in tasks])
open(os.environ["STUB_STATE"] + ".srun", "w").write(str(os.getpid()))
while any(task.poll() is None for task in tasks) and not any(task.poll() for task in tasks):
    time.sleep(0.01)
for task in tasks:
    task.kill()
sys.exit(max(abs(task.wait()) for task in tasks))
""",
    "scontrol": """#!{python}
import os, sys
open(os.environ["STUB_STATE"] + ".scontrol", "a").write(" ".join(sys.argv[1:]) + "\\n")
""",
}


@pytest.fixture
def stubs(tmp_path: Path) -> Path:
    """Folder with stand-ins for SLURM's programs."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in STUBS.items():
        (folder / name).write_text(text.format(python=sys.executable))
        (folder / name).chmod(0o700)
    return folder


@pytest.fixture
def words(digits: tuple[str, str], tmp_path: Path) -> list[str]:
    """Recipe, folder and overrides of a run of ten steps."""
    small = [
        "--epochs=2",
        "--optim.warmup-epochs=1",
        "--knn.every-epochs=0",
        "--log-every-steps=1",
        "--threads=1",
    ]
    return ["quickstart_digits", "--out", str(tmp_path / "run"), "--data.shards", digits[0], *small]


@pytest.fixture
def held(tmp_path: Path) -> dict[str, str]:
    """Variables with which a run waits after four steps, until it is asked to stop."""
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(SITE % 4)
    return {"PYTHONPATH": f"{folder}:{environment()['PYTHONPATH']}"}


def start_script(name: str, words: list[str], out: Path, **more: str) -> FaultRun:
    more = {"PYTHON": sys.executable, "NCCL_DEBUG": "WARN"} | more
    return start_command([str(ROOT / "launch" / name), *words], out, **more)


@pytest.mark.skipif(
    shutil.which("shellcheck") is None, reason="shellcheck is not on the path; make check runs it"
)
def test_shellcheck_has_nothing_to_say() -> None:
    done = subprocess.run(
        ["shellcheck", "-x", *map(str, SCRIPTS)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_every_setting_says_why(path: Path) -> None:
    """A line that exports, or asks SLURM for a behaviour, has a comment above it or shares one with
    its neighbour."""
    lines = path.read_text().splitlines()
    said = False
    for line in lines:
        if line.startswith("export ") or re.match(r"#SBATCH --(signal|requeue|open-mode)", line):
            assert said, line
        said = line.startswith("#") or (said and line.startswith(("export ", "read ", "[[")))


def test_slurm_has_the_settings_of_the_other_scripts() -> None:
    """It cannot source them: it runs as a copy, and the folder of the submission may be anybody's."""
    _, _, settings = (ROOT / "launch" / "settings.sh").read_text().partition("\n\n")
    slurm = (ROOT / "launch" / "slurm.sh").read_text()
    assert settings in slurm
    assert "source" not in slurm


PLANTED = ("bash", "dirname", "env", "git", "nvidia-smi", "python", "srun", "stat", "wc")
"""Programs that scripts start, and that their interpreter is found by."""


def quick_script(name: str, folder: Path, python: str, *words: str) -> int:
    """The exit code of a script in a folder with programs and modules that are not to be run.

    Args:
        name: of the script.
        folder: for all files.
        python: shell commands in place of the interpreter; $OUT is the folder of the run.
        words: of the script.
    """
    programs, hostile = folder / "programs", folder / "hostile"
    for place, name_, text in (
        (programs, "python", python),
        (programs, "srun", 'while [[ $1 == --* ]]; do shift; done; exec "$@"'),
        (programs, "scontrol", f'echo "$@" > "{folder}/requeued"'),
        *((hostile, one, f'touch "{folder}/EXECUTED"') for one in PLANTED),
        *((hostile / "launch", one, f'touch "{folder}/EXECUTED"') for one in ("settings.sh",)),
    ):
        place.mkdir(exist_ok=True, parents=True)
        (place / name_).write_text(f"#!/bin/bash\n{text}\n")
        (place / name_).chmod(0o700)
    variables = {
        "PATH": f".:{programs}::/usr/bin:/bin:",
        "PYTHONPATH": ":/x:./.:src:../hostile",
        "OUT": str(folder / "run"),
        "SLURM_JOB_ID": "7",
    }
    command = [str(ROOT / "launch" / name), *words]
    return subprocess.run(command, env=variables, cwd=hostile, check=False).returncode


@pytest.mark.parametrize("name", ["slurm.sh", "single_node.sh", "single_gpu.sh"])
def test_a_script_runs_nothing_from_the_current_folder(name: str, tmp_path: Path) -> None:
    seen = 'echo "$PYTHONSAFEPATH $PYTHONPATH $PATH" > "$OUT/seen"; [[ $1 != -c ]]'
    (tmp_path / "run").mkdir()
    assert quick_script(name, tmp_path, seen, "r", "--out", str(tmp_path / "run")) == 0
    path = f"{tmp_path}/programs:/usr/bin:/bin"
    modules = f"/x:{tmp_path}/hostile/src"
    assert (tmp_path / "run" / "seen").read_text() == f"1 {modules} {path}\n"
    assert not (tmp_path / "EXECUTED").exists()


@pytest.mark.parametrize(
    ("before", "python", "code", "requeued"),
    [
        ("DONE", "exit 2", 2, False),
        ("PREEMPTED", "exit 2", 2, False),
        ("DONE", "exit 1", 1, False),
        ("PREEMPTED", "exit 1", 1, False),
        ("DONE", "exit 0", 0, False),
        ("", 'touch "$OUT/DONE"; exit 1', 0, False),
        ("", 'touch "$OUT/DONE"; exit 2', 2, False),  # of another run, while this one was refused
        ("", 'touch "$OUT/PREEMPTED"; exit 75', 0, True),
        ("PREEMPTED", 'touch "$OUT/x"; mv "$OUT/x" "$OUT/PREEMPTED"; exit 75', 0, True),
        ("PREEMPTED", 'rm "$OUT/PREEMPTED"; touch "$OUT/DONE"; exit 1', 0, False),
    ],
)
def test_slurm_answers_by_the_marks_of_its_own_start(
    before: str, python: str, code: int, requeued: bool, tmp_path: Path
) -> None:
    """Those of an earlier start stay until a process has the folder."""
    (tmp_path / "run").mkdir()
    if before:
        (tmp_path / "run" / before).write_text("before\n")
    assert quick_script("slurm.sh", tmp_path, python, "r", f"--out={tmp_path}/run") == code
    assert (tmp_path / "requeued").exists() == requeued
    if code in (1, 2) and before:
        assert (tmp_path / "run" / before).read_text() == "before\n"


def test_the_command_of_the_agent_is_a_list_on_the_loopback_interface() -> None:
    words = ["train", "r", "--data.shards", "a; touch x"]
    command = launch_command(8, words, "logs")
    assert command[-len(words) :] == words
    assert command[command.index("--nproc-per-node") + 1] == "8"
    assert command[command.index("--local-addr") + 1] == "127.0.0.1"


def test_torchrun_takes_no_option_of_fastmoco_for_its_own() -> None:
    parse_args = pytest.importorskip("torch.distributed.run").parse_args
    words = ["train", "r", "--log", "json", "--out", "runs/a", "--", "-m"]
    command = launch_command(2, words, "logs")
    found = parse_args(command[command.index("--standalone") :])
    assert (found.training_script, found.training_script_args) == ("fastmoco", words)
    assert (found.module, found.log_dir) == (True, "logs")


@pytest.mark.parametrize("given", [["--gpus", "8"], ["--gpus=8"]])
def test_the_workers_do_not_start_workers(given: list[str]) -> None:
    pytest.importorskip("tyro", reason="tyro is not installed")
    from fastmoco.cli.recipe_commands import _without_gpus

    assert _without_gpus(["r", "--out", "o", *given, "--seed", "8"]) == [
        "r",
        "--out",
        "o",
        "--seed",
        "8",
    ]


@pytest.mark.parametrize(
    ("variables", "text"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "RANK=0 and WORLD_SIZE=2 are set"),
        ({"TORCHELASTIC_RUN_ID": "x"}, "torchrun has started this process"),
        (
            {"SLURM_PROCID": "1", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2"},
            "srun has started 2 tasks",
        ),
        ({"PMI_SIZE": "2", "PMI_RANK": "0"}, "mpirun has started 2 processes"),
    ],
)
def test_gpus_inside_a_launcher_is_refused(
    variables: dict[str, str], text: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RunError, match=f"{text}.*omit it under torchrun or srun"):
        launch(2, ["train"], tmp_path)


def test_under_nohup_a_run_outlives_its_terminal(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    agent = [
        "sh",
        "-c",
        'kill -HUP "$1"; sleep 0.3; touch "$2/DONE"',
        "sh",
        str(os.getpid()),
        str(tmp_path),
    ]
    monkeypatch.setattr("fastmoco.cli.launch.launch_command", lambda *_: agent)
    monkeypatch.delenv("RANK", raising=False)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert launch(2, ["train"], tmp_path) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.long
@pytest.mark.slow
def test_a_preempted_run_of_two_processes_saves_says_so_and_goes_on(
    words: list[str], tmp_path: Path, held: dict[str, str]
) -> None:
    """T04, by launch/single_node.sh, `fastmoco train --gpus 2` and torchrun's agent."""
    out = tmp_path / "run"
    one = start_script("single_node.sh", words, out, GPUS="2", **held)
    try:
        one.wait_for_step(2)
        one.process.send_signal(signal.SIGTERM)
        assert one.end() == 75, one.text()
        assert (out / "PREEMPTED").exists()
        assert "SIGTERM: saved step" in one.text()
        assert "Traceback" not in one.text()
        assert one.text().rstrip().splitlines()[-1].startswith("SIGTERM: saved step")
        one = start_script("single_node.sh", words, out, GPUS="2")
        assert one.end() == 0, one.text()
        assert (out / "DONE").exists()
        assert not (out / "PREEMPTED").exists()
        assert "continuing from" in one.text()
    finally:
        one.close()


def living(out: Path) -> list[int]:
    """Processes that train into a folder, and their launchers."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if str(out).encode() in words:
            found.append(int(folder.name))
    return found


def kill_beside_a_stopped_worker(one: FaultRun, workers: list[int], out: Path) -> None:
    """Kill a launcher one of whose workers is stopped; nothing of the run may be left of it."""
    os.kill(max(workers), signal.SIGSTOP)
    one.process.kill()
    until = time.monotonic() + 60
    while living(out) and time.monotonic() < until:
        time.sleep(0.1)
    assert living(out) == []
    assert (out / "PREEMPTED").exists()


@pytest.mark.long
@pytest.mark.slow
def test_a_killed_launcher_leaves_no_process_and_a_saved_run(
    words: list[str], tmp_path: Path
) -> None:
    """Agent and workers end with it, also a worker that was stopped."""
    out = tmp_path / "run"
    command = [sys.executable, "-m", "fastmoco", "train", *words, "--epochs=200", "--gpus=2"]
    one = start_command(command, out)
    try:
        one.wait_for_step(2)
        workers = [pid for pid in living(out) if pid != one.process.pid]
        assert len(workers) == 3
        kill_beside_a_stopped_worker(one, workers, out)
        assert one.text().rstrip().splitlines()[-1].startswith("SIGTERM: saved step")
    finally:
        for pid in living(out):
            os.kill(pid, signal.SIGKILL)
        one.close()


@pytest.mark.long
@pytest.mark.slow
def test_a_killed_torchrun_leaves_no_process_and_a_saved_run(
    words: list[str], tmp_path: Path
) -> None:
    """Nobody is left who would let a stopped worker continue, but the kernel."""
    out = tmp_path / "run"
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    train = ["--nproc-per-node=2", "-m", "fastmoco", "train", *words, "--epochs=200"]
    one = start_command([sys.executable, *torchrun, *train], out)
    try:
        one.wait_for_step(2)
        workers = [pid for pid in living(out) if pid != one.process.pid]
        assert len(workers) == 2
        kill_beside_a_stopped_worker(one, workers, out)
        assert "saved step" in one.text()
    finally:
        for pid in living(out):
            os.kill(pid, signal.SIGKILL)
        one.close()


@pytest.mark.long
@pytest.mark.slow
def test_a_closed_terminal_is_a_request_to_stop(words: list[str], tmp_path: Path) -> None:
    """The kernel sends SIGHUP, and every further write to the terminal fails."""
    out = tmp_path / "run"
    pid, terminal = pty.fork()
    if pid == 0:
        command = [sys.executable, "-m", "fastmoco", "train", *words, "--epochs=200"]
        os.execve(sys.executable, command, environment(TERM="xterm"))  # noqa: S606 - without a shell, as meant
    ended = 0
    try:
        until = time.monotonic() + 100
        while len(RunFolder(out).read_metric("loss")) < 2:
            assert time.monotonic() < until
            if select.select([terminal], [], [], 0.05)[0]:
                os.read(terminal, 65536)
        os.close(terminal)
        _, status = os.waitpid(pid, 0)
        ended = pid
        assert os.waitstatus_to_exitcode(status) == 75
        assert (out / "PREEMPTED").exists()
        assert load_latest(out / "checkpoints") is not None
    finally:
        if not ended:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


DIES = """
import os, sys
if os.environ.get("RANK") == "1":
    from fastmoco.training import trainer
    def step(*args, **more):
        {how}
    trainer.Trainer.step = step
"""


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "line"),
    [
        ("os.kill(os.getpid(), 9)", "rank 1 was ended by SIGKILL, "),
        ("raise KeyError('the cause')", "KeyError: 'the cause'"),
    ],
)
def test_a_failed_worker_is_reported_once_and_torchruns_report_is_kept(
    how: str, line: str, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text(DIES.format(how=how))
    out = tmp_path / "run"
    script = "import fastmoco.cli.launch as l, sys; l.MAX_RESTARTS = 0; "
    script += "from fastmoco.cli.main import main; sys.exit(main())"
    path = f"{tmp_path}:{environment()['PYTHONPATH']}"
    command = [sys.executable, "-c", script, "train", *words, "--gpus", "2"]
    one = start_command(command, out, PYTHONPATH=path)
    try:
        assert one.end() == 1, one.text()
        text = one.text()
        assert text.count(line) == 1, text
        last = text.rstrip().splitlines()[-1]
        assert last.endswith(f"torchrun's report is in {out}/torchrun.log")
        assert "ChildFailedError" not in text
        assert "ChildFailedError" in (out / "torchrun.log").read_text()
    finally:
        one.close()


@pytest.mark.long
@pytest.mark.slow
def test_an_interrupt_of_one_process_is_a_clean_stop(
    words: list[str], tmp_path: Path, held: dict[str, str]
) -> None:
    """T06, by launch/single_gpu.sh."""
    one = start_script("single_gpu.sh", words, tmp_path / "run", **held)
    try:
        one.wait_for_step(2)
        one.process.send_signal(signal.SIGINT)
        assert one.end() == 75, one.text()
        assert (tmp_path / "run" / "PREEMPTED").exists()
    finally:
        one.close()


STUCK = """
import os
rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID"))
if rank is not None:
    import time
    from fastmoco.faults import stop_signal
    from fastmoco.training import trainer
    if rank == "0":
        stop_signal._POLL_SECONDS = 0.7  # so its peer, which leaves no mark, is the first to give up
    def step(*args, **more):
        print("the first step", flush=True)
        time.sleep(1000)
    trainer.Trainer.step = step
"""


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("script", ["slurm.sh", "single_node.sh"])
def test_a_run_of_two_processes_that_is_preempted_in_its_first_step_may_go_on(
    script: str, stubs: Path, words: list[str], tmp_path: Path
) -> None:
    """The first step compiles and fills caches: minutes, in which there is nothing to save yet."""
    state, out = tmp_path / "state", tmp_path / "run"
    (stubs / "sitecustomize.py").write_text(STUCK)
    more = {
        "STUB_HOST": "127.0.0.1",
        "STUB_STATE": str(state),
        "PATH": f"{stubs}:{os.environ['PATH']}",
    }
    more |= {
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NODELIST": "n",
        "FASTMOCO_LAUNCH": str(ROOT / "launch"),
    }
    more |= {"GPUS": "2", "PYTHONPATH": f"{stubs}:{environment()['PYTHONPATH']}"}
    one = start_script(script, [*words, "--faults.stop-within-s", "3"], out, **more)
    try:
        one.wait_for(lambda: one.text().count("the first step") == 2, 120)
        if script == "slurm.sh":
            os.kill(int(Path(f"{state}.srun").read_text()), signal.SIGUSR1)
        else:
            one.process.send_signal(signal.SIGTERM)
        assert one.end(60) == (0 if script == "slurm.sh" else 75), one.text()
        assert (out / "PREEMPTED").exists()
        assert "nothing is lost" in one.text()
        assert "ended by the failure" not in one.text()
        if script == "slurm.sh":
            assert Path(f"{state}.scontrol").read_text() == f"requeue {os.getpid()}\n"
    finally:
        one.close()


@pytest.mark.long
@pytest.mark.slow
def test_a_refusal_is_not_tried_again(words: list[str], tmp_path: Path) -> None:
    """torchrun would try three times more by `--gpus`, and answers 1 to everything."""
    one = start_script(
        "single_node.sh", [*words, "--global-batch-size", "2048"], tmp_path / "run", GPUS="2"
    )
    try:
        assert one.end() == 2, one.text()
        assert "is larger than the whole set of 1437 samples" in one.text()
        assert one.text().count("fastmoco: ") == 3, one.text()  # images, processes, the refusal
        assert "Traceback" not in one.text()
        assert not (tmp_path / "run").exists()
    finally:
        one.close()


@pytest.mark.long
@pytest.mark.slow
def test_words_that_make_no_config_are_not_tried_again(words: list[str], tmp_path: Path) -> None:
    """By torchrun itself: with `--gpus` nothing is started for them."""
    torchrun = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--local-addr",
        "127.0.0.1",
        "--max-restarts",
        "3",
    ]
    command = [
        sys.executable,
        *torchrun,
        "-m",
        "fastmoco",
        "train",
        *words,
        "--model.image-size",
        "13",
    ]
    one = start_command(command, tmp_path / "run")
    try:
        assert one.end() == 1, one.text()
        assert one.text().count("must be a multiple of --model.patch-size 2") == 1
        assert "attempts left" not in one.text()
    finally:
        one.close()


@pytest.mark.long
@pytest.mark.slow
def test_slurm_starts_the_ranks_requeues_a_preempted_run_and_not_a_finished_one(
    stubs: Path, words: list[str], tmp_path: Path, held: dict[str, str]
) -> None:
    out, state = tmp_path / "run", tmp_path / "state"
    more = {
        "STUB_HOST": "127.0.0.1",
        "STUB_STATE": str(state),
        "PATH": f"{stubs}:{os.environ['PATH']}",
    }
    more |= {
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NODELIST": "n",
        "FASTMOCO_LAUNCH": str(ROOT / "launch"),
    }
    one = start_script("slurm.sh", words, out, **more, **held)
    try:
        one.wait_for_step(2)
        os.kill(int(Path(f"{state}.srun").read_text()), signal.SIGUSR1)
        assert one.end() == 0, one.text()
        assert "SIGUSR1: saved step" in one.text()
        assert Path(f"{state}.scontrol").read_text() == f"requeue {os.getpid()}\n"
        one = start_script("slurm.sh", words, out, **more, SLURM_RESTART_COUNT="1")
        assert one.end() == 0, one.text()
        assert "batch 256 on 2 x cpu" in one.text()
        assert "continuing from" in one.text()
        assert (out / "DONE").exists()
        assert Path(f"{state}.scontrol").read_text().count("requeue") == 1
    finally:
        one.close()
