"""Children: nothing from the current folder runs in them, and they end with their parent."""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastmoco_pipelines import processes
from fastmoco_pipelines.processes import (
    PARENT,
    ancestors,
    child_environment,
    children,
    python_command,
    started,
    without_current_folder,
)
from fastmoco_pipelines.views import decode_pool, self_test

ROOT = Path(__file__).resolve().parents[2]
PLANTED = "open('EXECUTED', 'a').write(__name__)\n"


@pytest.fixture
def hostile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with modules and programs that leave a trace when they run."""
    folder = tmp_path / "hostile"
    folder.mkdir()
    for name in ("argparse", "json", "random", "sitecustomize", "usercustomize", "fastmoco"):
        (folder / f"{name}.py").write_text(PLANTED)
    (folder / "fastmoco_pipelines").mkdir()
    (folder / "fastmoco_pipelines" / "__init__.py").write_text(PLANTED)
    (folder / "git").write_text("#!/bin/sh\ntouch EXECUTED\n")
    (folder / "git").chmod(0o700)
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("", None),
        (":", None),
        (".", None),
        ("./", None),
        ("../hostile", None),
        (":/x", "/x"),
        ("/x:", "/x"),
        ("/x::/y", "/x:/y"),
        ("/x:./.:/y", "/x:/y"),
        ("kernels:/x", "{here}/kernels:/x"),
        ("../other", "{above}/other"),
    ],
)
def test_the_current_folder_is_no_place_of_modules(
    given: str, kept: str | None, hostile: Path
) -> None:
    variables = {"PYTHONPATH": given}
    without_current_folder(variables)
    expected = kept and kept.format(here=hostile, above=hostile.parent)
    assert variables == {"PYTHONSAFEPATH": "1"} | ({"PYTHONPATH": expected} if expected else {})


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("/bin", "/bin"),
        (".:/bin", "/bin"),
        ("/bin:", "/bin"),
        ("/bin::/usr/bin:bin:./x", "/bin:/usr/bin"),
        ("", None),
        (".", None),
    ],
)
def test_the_current_folder_is_no_place_of_programs(given: str, kept: str | None) -> None:
    variables = {"PATH": given}
    without_current_folder(variables)
    assert variables.get("PATH") == kept


def test_a_folder_that_is_named_in_full_stays(hostile: Path) -> None:
    variables = {"PYTHONPATH": str(hostile), "PATH": f"{hostile}:/bin"}
    without_current_folder(variables)
    assert variables == {
        "PYTHONPATH": str(hostile),
        "PATH": f"{hostile}:/bin",
        "PYTHONSAFEPATH": "1",
    }


def test_source_that_is_nowhere_else_stays(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`python -m fastmoco` in a folder of packages that nobody has installed."""
    (tmp_path / "fastmoco").mkdir()
    (tmp_path / "fastmoco" / "__init__.py").write_text("")
    module = type(sys)("fastmoco")
    module.__file__ = str(tmp_path / "fastmoco" / "__init__.py")
    monkeypatch.setitem(sys.modules, "fastmoco", module)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "meta_path", [])
    monkeypatch.setattr(sys, "path", ["", str(tmp_path)])
    variables = {"PYTHONPATH": ".:/x"}
    without_current_folder(variables)
    assert variables["PYTHONPATH"] == f"/x:{tmp_path}"


@pytest.mark.usefixtures("hostile")
def test_nothing_of_the_current_folder_runs_in_a_child_or_in_its_child() -> None:
    """A module of ours, which starts another one, and a program."""
    there = os.environ.get("PYTHONPATH", "")
    above = str(Path(decode_pool.__file__).parents[2])
    variables = child_environment(PYTHONPATH=f":{there}:{above}:.", PATH=f".:{os.environ['PATH']}:")
    code = (
        "import argparse, json, random, subprocess, sys\n"
        "from fastmoco_pipelines.processes import python_command\n"
        "subprocess.run(['git', '--version'])\n"
        "subprocess.run([sys.executable, '-m', 'json.tool', '--help'], check=True)\n"
        "subprocess.run([sys.executable, '-c', 'import random'], check=True)\n"
        "subprocess.run(python_command('json.tool', '--help'), check=True)\n"
    )
    command = [*python_command("x")[:2], "-c", code]
    subprocess.run(command, env=variables, check=True, stdout=subprocess.DEVNULL)
    assert not Path("EXECUTED").exists()


class _SeenError(Exception):
    pass


@pytest.mark.parametrize("who", ["decode pool", "self test"])
def test_every_child_is_started_so(
    who: str, hostile: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", f":{os.environ.get('PYTHONPATH', '')}:{ROOT}:.")
    monkeypatch.setenv("PATH", f".:{os.environ['PATH']}")
    seen: dict[str, object] = {}

    def popen(_self: object, command: list[str], **options: object) -> None:
        seen.update(options, command=command)
        raise _SeenError

    monkeypatch.setattr(subprocess.Popen, "__init__", popen)
    monkeypatch.setattr(subprocess.Popen, "__del__", lambda _self: None)
    starts = {
        "decode pool": decode_pool.DecodePool(1)._start,
        "self test": lambda: self_test.require_working_decoder("cpu", None),
    }
    with pytest.raises(_SeenError):
        starts[who]()
    command, variables = seen["command"], seen["env"]
    assert isinstance(command, list)
    assert isinstance(variables, dict)
    assert command[:3] == [sys.executable, "-P", "-m"]
    assert variables[PARENT] == str(os.getpid())
    for name in ("PATH", "PYTHONPATH"):
        assert all(map(os.path.isabs, variables[name].split(":"))), name
        assert str(hostile) not in variables[name]


def test_one_place_starts_interpreters() -> None:
    """`fastmoco/cli/next_steps.py` prints a command, and starts none."""
    sources = [
        *(ROOT / "fastmoco").rglob("*.py"),
        *(ROOT / "pipelines").rglob("*.py"),
        *(ROOT / "kernels").rglob("*.py"),
    ]
    users = {
        f"{path.parent.name}/{path.name}"
        for path in sources
        if "sys.executable" in path.read_text()
    }
    assert users == {"fastmoco_pipelines/processes.py", "cli/next_steps.py"}
    starts = re.compile(r"os\.(exec|spawn|posix_spawn|fork|popen|system)\w*\(|multiprocessing\.")
    assert not [path.name for path in sources if starts.search(path.read_text())]


CHILD = """
import os, signal, sys, time
from fastmoco_pipelines.processes import follow_parent
follow_parent()
print("here", os.getpid(), flush=True)
if "stops" in sys.argv:
    os.kill(os.getpid(), signal.SIGSTOP)
time.sleep(100)
"""
DIES = """
import os, subprocess, sys, threading
from fastmoco_pipelines.processes import child_environment
def start():
    subprocess.Popen([*sys.argv[2:], sys.executable, "-P", "-c", sys.argv[1], *more],
                     env=child_environment())
more = ["stops"] if "STOPS" in os.environ else []
thread = threading.Thread(target=start)
thread.start()
thread.join()
print("thread ended", flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def family(*before: str, **more: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A parent, and the number of its child, which a thread that has ended has started."""
    parent = subprocess.Popen(
        [sys.executable, "-P", "-c", DIES, CHILD, *before],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | more,
    )
    assert parent.stdout is not None
    child = 0
    try:
        lines = sorted(parent.stdout.readline() for _ in range(2))
        child = int(lines[0].split()[1])
        yield parent, child
    finally:
        parent.kill()
        if child:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        parent.communicate()


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel of Linux lets it continue")
@pytest.mark.parametrize(
    ("before", "more"),
    [((), {}), ((), {"STOPS": "1"}), (("sh", "-c", '"$@"; exit 1', "sh"), {})],
    ids=["running", "stopped", "below a shell"],
)
def test_a_child_ends_with_its_parent_and_not_with_the_thread_that_started_it(
    before: tuple[str, ...], more: dict[str, str]
) -> None:
    with family(*before, **more) as (parent, child):
        until = time.monotonic() + 60
        while more and Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] != "T":
            assert time.monotonic() < until
            time.sleep(0.01)
        assert started(child) is not None
        parent.kill()
        assert parent.stdout is not None
        # Until the child, too, has closed it.
        assert select.select([parent.stdout], [], [], 60)[0]
        assert parent.stdout.read() == ""


def test_without_proc_a_launcher_further_up_counts_as_alive(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is no parent, and nothing else can be asked: the parent alone is followed."""
    further_up = os.getpid()  # no process above this one
    assert processes._Followed(further_up).has_ended()
    monkeypatch.setattr(processes, "_stat", lambda process: [])
    followed = processes._Followed(further_up)
    assert not followed.has_ended()
    followed._direct = 0  # the parent was another one
    assert followed.has_ended()


def test_relatives_are_found() -> None:
    assert ancestors()[0] == os.getppid()
    assert len(ancestors()) == len(set(ancestors()))
    child = subprocess.Popen(["sleep", "60"])
    try:
        assert child.pid in children()
        assert started(child.pid)
    finally:
        child.kill()
        child.wait()
    assert child.pid not in children()
    assert started(child.pid) is None
