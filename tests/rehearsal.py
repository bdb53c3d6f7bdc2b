"""Rehearse the work of a bare GPU machine here: its Python and packages, the
copied repository, and no GPU.

`make rehearsal` runs it. In `.rehearsal` it makes a virtual environment with only the packages of
such a machine, and a copy of the repository without history, build results or C code; there is no
`git` on its PATH. Then it collects all tests, collects the GPU tests, and runs every stage of
`make gpu` with small shapes. So a missing module, a missing tool or another version is found here.

Only the standard library is used: any Python from 3.9 on can run this file.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HOME = ROOT / ".rehearsal"
PACKAGES = (
    "torch==2.11.0",  # brings Triton 3.6.0 and the libraries of CUDA 13.0
    "numpy==2.5.2",
    "pytest",
    "pytest-xdist",
    "hypothesis",
    "pillow",
    "safetensors",
    "rich",
    "matplotlib",
    "tensorboard",
    "scikit-learn",
    "fsspec",
    "urllib3",
    "pyyaml",
)
STEP_TESTS = (
    "tests/fastmoco/training/test_step_gpu.py",
    "tests/fastmoco/training/test_step_waits_gpu.py",
)
ABSENT = ("tyro", "webdataset", "torchao", "nvidia.dali", "xformers")
LEFT_BEHIND = shutil.ignore_patterns(
    ".git",
    ".venv",
    ".rehearsal",
    ".gpu",
    "build",
    "*.egg-info",
    "__pycache__",
    "*.so",
    ".*_cache",
    "quickstart",
    "runs",
)
LOOK = """
import importlib, shutil, sys
import numpy, torch, triton
print(f"Python {sys.version.split()[0]}, torch {torch.__version__}, Triton {triton.__version__}, NumPy {numpy.__version__}")
found = []
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except ImportError:
        continue
    found.append(name)
if shutil.which("git"):
    found.append("git")
if sys.version_info[:2] != (3, 12) or torch.__version__.split("+")[0] != "2.11.0":
    found.append("other versions")
sys.exit(f"a bare GPU machine has no {', '.join(found)}" if found else 0)
"""


@dataclass(frozen=True)
class Stage:
    """One command of the rehearsal."""

    name: str
    command: Sequence[str]
    must_show: str = ""
    """A pattern that the output of a successful command matches."""
    quiet: bool = False
    """Show only the last lines."""


def stages(python: str) -> list[Stage]:
    """The stages, in order."""
    pytest = [python, "-m", "pytest", "-p", "no:cacheprovider", "tests"]
    return [
        Stage("surroundings", [python, "-c", LOOK, *ABSENT]),
        Stage("every test is collected", [*pytest, "--collect-only"], quiet=True),
        Stage("GPU tests are collected", [*pytest, "-m", "gpu"], r"[1-9]\d* skipped"),
        Stage("the training step's tests", [*pytest[:-1], "-n", "2", *STEP_TESTS]),
        Stage("make gpu, small, on the CPU", [python, "-m", "benchmarks.gpu", "--dry-run"]),
    ]


def find_python(named: str) -> str:
    """The first command of that name that is a Python 3.12; where it is a shim of pyenv, also the
    versions that pyenv has.

    Raises:
        SystemExit: if there is none.
    """
    found = (
        [named] if os.sep in named else [str(Path(place) / named) for place in os.get_exec_path()]
    )
    for shim in [Path(path) for path in found if Path(path).parent.name == "shims"]:
        found += map(str, sorted(shim.parent.parent.glob(f"versions/3.12*/bin/{named}")))
    ask = "import sys; sys.exit(sys.version_info[:2] != (3, 12))"
    for path in filter(shutil.which, found):
        if subprocess.run([path, "-c", ask], capture_output=True, check=False).returncode == 0:
            return path
    sys.exit(
        f"rehearsal: PYTHON312={named}: there is no such command that is a Python 3.12, which GPU "
        "machines have; install it, "
        "or name it: make rehearsal PYTHON312=/path/to/python3.12"
    )


def ready_python(named: str) -> str:
    """The interpreter of the virtual environment, which is made if it is
    missing or was made from another list.
    """
    python = find_python(named)
    inside, ready = HOME / "venv" / "bin" / "python", HOME / "venv" / ".ready"
    wanted = "\n".join((python, *PACKAGES))
    if not ready.is_file() or ready.read_text() != wanted:
        shutil.rmtree(HOME / "venv", ignore_errors=True)
        subprocess.run([python, "-m", "venv", str(HOME / "venv")], check=True)
        pip = [str(inside), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, *PACKAGES], check=True)
        ready.write_text(wanted)
    return str(inside)


def copy_repository(target: Path) -> None:
    """The files to copy: those that git tracks or would add; without git, all
    except build results.
    """
    shutil.rmtree(target, ignore_errors=True)
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        shutil.copytree(ROOT, target, ignore=LEFT_BEHIND)
        return
    for name in filter(None, subprocess.check_output(listed, cwd=ROOT).decode().split("\0")):
        if (ROOT / name).is_file():  # not one that is deleted here but still tracked
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)


def path_without_git(folder: Path) -> str:
    """A folder with links to all commands of this PATH except git."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for place in os.environ.get("PATH", os.defpath).split(os.pathsep):
        for command in Path(place).iterdir() if Path(place).is_dir() else ():
            # python3 of this PATH would be found before the machine's own.
            if (
                not re.match(r"git|python|pip", command.name)
                and not (folder / command.name).is_symlink()
            ):
                (folder / command.name).symlink_to(command)
    return str(folder)


def surroundings(python: str, repository: Path) -> dict[str, str]:
    """The environment of every stage, with only the commands of this machine."""
    roots = (repository, repository / "kernels", repository / "pipelines")
    (HOME / "home").mkdir(parents=True, exist_ok=True)
    return {
        "PATH": os.pathsep.join((os.path.dirname(python), path_without_git(HOME / "commands"))),
        "PYTHONPATH": os.pathsep.join(map(str, roots)),
        "HOME": str(HOME / "home"),
        "OUT": str(HOME / "results"),
        "CUDA_VISIBLE_DEVICES": "",
        "LANG": "C.UTF-8",
    }


def perform(stage: Stage, repository: Path, environment: dict[str, str]) -> tuple[int, float]:
    """Run a stage and show its lines; returns its exit code, 1 if its output
    lacks the pattern, and seconds.
    """
    print(f"== {stage.name}", flush=True)
    began, lines = time.monotonic(), []
    process = subprocess.Popen(
        stage.command,
        cwd=repository,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        lines.append(line)
        if not stage.quiet:
            print(line, end="", flush=True)
    code = process.wait()
    if stage.quiet:
        print("".join(lines[-60 if code else -1 :]), end="", flush=True)
    if code == 0 and not re.search(stage.must_show, "".join(lines)):
        print(f"nothing in the output matches {stage.must_show!r}")
        code = 1
    return code, time.monotonic() - began


def main(arguments: Sequence[str] | None = None) -> int:
    """Set up, run every stage, print their results; 0 if all succeeded."""
    parser = argparse.ArgumentParser(
        description="rehearse on the CPU what a bare GPU machine will run"
    )
    parser.add_argument("--python312", default="python3.12", help="makes the virtual environment")
    parser.add_argument(
        "--python",
        default="",
        help="an interpreter with the packages, instead of a virtual environment",
    )
    given = parser.parse_args(arguments)
    python = given.python or ready_python(given.python312)
    repository = HOME / "repository"
    copy_repository(repository)
    environment = surroundings(python, repository)
    done = [(stage, *perform(stage, repository, environment)) for stage in stages(python)]
    print("== rehearsal")
    for stage, code, seconds in done:
        print(f"{seconds:6.1f} s  exit {code}  {stage.name}")
    failed = any(code for _, code, _ in done)
    print("something would fail on a bare GPU machine" if failed else "nothing failed")
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
