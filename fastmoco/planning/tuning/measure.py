"""One measurement: a process with its own variables that trains some steps of a config and ends.

The variables of the caller that a candidate may set are removed first, so that a result does not
depend on the shell it was measured from; those of the launch scripts are set.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastmoco.config import Config
from fastmoco.config.serial import PATTERNS, to_json
from fastmoco.planning.tuning.settings import Settings
from fastmoco_pipelines import OPENMP_SPINS
from fastmoco_pipelines.files.small import UnfitFileError, read_json
from fastmoco_pipelines.processes import child_environment, python_command

CHILD = "fastmoco.training.step_rate"
"""The module that measures; a string, because it is above this room."""
LAUNCH_VARIABLES = {
    "PYTHONSAFEPATH": "1",
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    "OMP_NUM_THREADS": "1",
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
    "TORCH_FR_BUFFER_SIZE": "2000",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
    "NCCL_DEBUG": "WARN",
}
"""The variables of launch/settings.sh."""
_SHOWN_BYTES = 1 << 16
REMOVED = ("OMP_", "GOMP_", "KMP_", "MKL_", "MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD", "PYTORCH_")
"""Beginnings of names of variables that a measurement does not inherit."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """Speed and first numbers of some settings."""

    images_per_s: float
    images_per_cpu_s: float
    step_s: float
    peak_bytes: int
    losses: tuple[float, ...]
    gradient_norms: tuple[float, ...]
    others_share: float | None
    """Share of all cores that other processes took meanwhile; None: not known."""
    seconds: float
    """Of the whole measurement, with the start of the process."""
    details: Mapping[str, Any]
    """All that the process has reported."""

    def rate(self, criterion: str) -> float:
        """Images per second of `wall` time, or of `cpu` time."""
        return self.images_per_s if criterion == "wall" else self.images_per_cpu_s


@dataclass(frozen=True, slots=True)
class Failure:
    """A measurement without a result, and why."""

    reason: str


class FreshProcess:
    """Measures settings of one config, each time in a new process.

    Args:
        config: with the defaults.
        module: that measures; another one in tests.
    """

    def __init__(self, config: Config, *, module: str = CHILD) -> None:
        self._config = config
        self._module = module

    def __call__(
        self,
        settings: Settings,
        *,
        warm_up: int,
        steps: int,
        limit_s: float,
        at_rest: bool = False,
    ) -> Measurement | Failure:
        """Measure some steps after a warm-up; whatever happens to the process is a result.

        Args:
            settings: beside the config.
            warm_up: steps before the clock starts.
            steps: that are measured.
            limit_s: seconds after which the process is killed.
            at_rest: whether the clock starts and ends while the loader rests, as processor time
                needs.
        """
        try:
            config = settings.applied(self._config)
        except ValueError as error:
            return Failure(str(error))
        # The JSON of a config has no keys that its URLs may contain.
        patterns = {
            f"{group}.{name}": getattr(getattr(config, group), name) for group, name in PATTERNS
        }
        request: dict[str, Any] = {"config": to_json(config), "patterns": patterns}
        request |= {"warm_up": warm_up, "steps": steps, "at_rest": at_rest}
        began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="fastmoco-tune-") as folder:
            answer, log = Path(folder) / "answer.json", Path(folder) / "log"
            command = [*settings.prefix, *python_command(self._module, str(answer))]
            with log.open("wb") as output:
                code = _run(command, environment(settings), json.dumps(request), output, limit_s)
            if code is None:
                return Failure(f"not ended after {limit_s:.0f} s")
            if code or not answer.exists():
                return Failure(_cause(code, _end_of(log)))
            try:
                found = read_json(answer, follow=False)
                for kind in ("refused", "failed"):
                    if kind in found:
                        return Failure(str(found[kind]))
                return _measurement(found, time.monotonic() - began)
            except (UnfitFileError, KeyError, TypeError, AttributeError) as error:
                return Failure(f"its answer cannot be used: {type(error).__name__}: {error}")


def _measurement(found: Mapping[str, Any], seconds: float) -> Measurement:
    """The answer of a process."""
    names = ("images_per_s", "images_per_cpu_s", "step_s", "peak_bytes", "others_share")
    values: dict[str, Any] = {name: found[name] for name in names}
    values |= {name: tuple(found[name]) for name in ("losses", "gradient_norms")}
    return Measurement(**values, seconds=seconds, details=found)


def environment(settings: Settings) -> dict[str, str]:
    """The variables of a measured process."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(REMOVED)}
    return child_environment({**kept, **LAUNCH_VARIABLES, **dict(settings.variables)})


def ignored_variables() -> list[str]:
    """Variables of the caller that measurements do not inherit. fastmoco sets `GOMP_SPINCOUNT` in
    every process by itself."""
    own = os.environ.get("GOMP_SPINCOUNT") == OPENMP_SPINS
    names = {name for name in os.environ if name.startswith(REMOVED)}
    return sorted(names - ({"GOMP_SPINCOUNT"} if own else set()))


def _run(
    command: list[str], variables: Mapping[str, str], text: str, output: Any, limit_s: float
) -> int | None:
    """Run a process to its end; None if it had to be killed for its time.

    It is killed with all that it has started, also when this process is interrupted.
    """
    try:
        process = subprocess.Popen(  # noqa: S603 - this interpreter and our own module
            command,
            env=dict(variables),
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            start_new_session=True,  # Ctrl-C of a terminal reaches this process alone
        )
    except OSError as error:
        output.write(f"{command[0]}: {error.strerror}".encode())
        return 127
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(text.encode(), timeout=limit_s)
            return process.returncode
        return None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _end_of(log: Path) -> str:
    """The last lines of a file."""
    with log.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - _SHOWN_BYTES))
        return file.read().decode(errors="replace")


def _cause(code: int, log: str) -> str:
    """Why a process has ended without an answer."""
    last = next((line.strip() for line in reversed(log.splitlines()) if line.strip()), "no output")
    if code >= 0:
        return f"ended with {code}: {last[:200]}"
    name = signal.Signals(-code).name
    also = ", as the system does when memory runs out" if name == "SIGKILL" else f": {last[:200]}"
    return f"killed by {name}{also}"
