"""Real runs in real processes that a test kills, stops and disturbs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from fastmoco.checkpoint import load_latest
from fastmoco.config import Config
from fastmoco.config.serial import to_json
from fastmoco.run.folder import RunFolder
from tests.checkpoint_content import assert_same

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = """
import json, os, sys
from pathlib import Path
from fastmoco.cli import train as train_command
from fastmoco.training import trainer
from fastmoco.config.serial import from_json
out, rank = Path(sys.argv[2]), int(os.environ.get("RANK", "0"))
fresh = Path(f"{{out}}.new-rank{{rank}}")
fresh.write_text(str(os.getpid()))
fresh.replace(f"{{out}}.rank{{rank}}")  # a reader never sees an empty file
{before}
config = from_json(json.loads(sys.argv[1]))
sys.exit(train_command.train(config, out, process_ends=True))
"""


def environment(**more: str) -> dict[str, str]:
    """As for a user, with one thread per process; torch's own checks of collectives are on (DETAIL
    crashes torch 2.13's DDP).
    """
    paths = os.pathsep.join(str(ROOT / folder) for folder in (".", "kernels", "pipelines"))
    base = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("SLURM_", "TORCHELASTIC_"))
    }
    return (
        base
        | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "TORCH_DISTRIBUTED_DEBUG": "INFO"}
        | more
    )


@dataclass
class FaultRun:
    """A run in separate processes; its output goes to `log`."""

    process: subprocess.Popen[bytes]
    out: Path
    log: Path

    def text(self) -> str:
        """The output so far."""
        return self.log.read_text(errors="replace")

    def pid(self, rank: int) -> int:
        """Process of a rank."""
        return int(Path(f"{self.out}.rank{rank}").read_text())

    def signal(self, rank: int, number: signal.Signals) -> None:
        """Send a signal to one rank."""
        os.kill(self.pid(rank), number)

    def wait_for_step(self, step: int) -> None:
        """Wait until a step is in the metrics."""
        self.wait_for(
            lambda: any(at >= step for at, _ in RunFolder(self.out).read_metric("loss")), 120
        )

    def wait_for_text(self, text: str, seconds: float = 100) -> None:
        """Until something is said. No default patience of a run is as short as the guard."""
        self.wait_for(lambda: text in self.text(), seconds)

    def wait_for(self, condition, seconds: float) -> None:  # type: ignore[no-untyped-def]
        """Wait until a condition holds, or fail with the output."""
        until = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < until, self.text()
            assert self.process.poll() is None or condition(), self.text()
            time.sleep(0.02)

    def end(self, seconds: float = 150) -> int:
        """Exit code, once it has ended."""
        return self.process.wait(timeout=seconds)

    def close(self) -> None:
        """Kill all remaining processes."""
        self.process.kill()
        self.process.wait()
        for path in self.out.parent.glob(f"{self.out.name}.rank*"):
            try:
                os.kill(int(path.read_text()), signal.SIGKILL)
            except ProcessLookupError:
                continue


def start(
    config: Config, out: Path, *, before: str = "", ranks: int = 2, restarts: int = 0
) -> FaultRun:
    """Start a run, under torchrun unless `ranks` is 0; `before` runs in every rank first."""
    program = ["-c", PROGRAM.format(before=before), json.dumps(to_json(config)), str(out)]
    torchrun = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--local-addr",
        "127.0.0.1",
        "--nproc-per-node",
    ]
    launcher = (
        [*torchrun, str(ranks), "--max-restarts", str(restarts), "--no-python", sys.executable]
        if ranks
        else []
    )
    return start_command([sys.executable, *launcher, *program], out)


def start_command(command: list[str], out: Path, **more: str) -> FaultRun:
    """Start any command that trains into `out`."""
    log = Path(f"{out}.log")
    with log.open("ab") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=environment(**more), cwd=ROOT
        )
    return FaultRun(process, out, log)


def assert_same_end(ours: Path, theirs: Path) -> None:
    """Assert that two runs ended with the same bits."""
    a, b = load_latest(ours / "checkpoints"), load_latest(theirs / "checkpoints")
    assert a is not None
    assert b is not None
    assert a.step == b.step
    assert_same(a.tensors, b.tensors)
