"""The rehearsal for a bare GPU machine: what it copies and hides, what it says; and that tests need
no module to be collected."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import rehearsal
from tests.rehearsal import ABSENT, ROOT, Stage

COLLECT = f"""
import sys
for name in {ABSENT!r}:
    sys.modules[name] = None
import pytest
sys.exit(pytest.main(["tests", "--collect-only", "-p", "no:cacheprovider", *sys.argv[1:]]))
"""


@pytest.mark.slow
@pytest.mark.long
def test_every_test_is_collected_without_the_modules_that_a_gpu_machine_lacks() -> None:
    """And the GPU tests among them are in files that ``-m gpu`` alone would read."""
    command = [sys.executable, "-c", COLLECT, "-m", "gpu and not long"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stdout[-3000:]
    files = {
        line.partition(": ")[0].partition("::")[0]
        for line in done.stdout.splitlines()
        if line.startswith("tests/")
    }
    assert "tests/fastmoco/training/test_step_gpu.py" in files
    assert [name for name in files if "mark.gpu" not in (ROOT / name).read_text()] == []


def test_the_repository_travels_without_history_and_without_what_is_built(
    tmp_path: Path, monkeypatch
) -> None:
    for has_git in (True, False):
        monkeypatch.setattr(
            shutil, "which", lambda name, has_git=has_git: name if has_git else None
        )
        rehearsal.copy_repository(tmp_path / "copy")
        names = {
            str(path.relative_to(tmp_path / "copy"))
            for path in (tmp_path / "copy").rglob("*")
            if path.is_file()
        }
        assert {"Makefile", "fastmoco/training/trainer.py", "tests/rehearsal.py"} <= names
        hidden = [
            name
            for name in names
            if name.endswith(".so") or name.startswith((".git/", ".venv/", ".rehearsal/"))
        ]
        assert hidden == []


def test_commands_are_there_but_git_and_python(tmp_path: Path, monkeypatch) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("git", "git-lfs", "python3", "sh", "gcc"):
        (tools / name).touch(mode=0o755)
    monkeypatch.setenv("PATH", f"{tools}:{tmp_path / 'none'}")
    folder = rehearsal.path_without_git(tmp_path / "commands")
    assert sorted(os.listdir(folder)) == ["gcc", "sh"]


def test_python_3_12_is_found_by_name_also_where_pyenv_answers_for_another(
    tmp_path: Path, monkeypatch
) -> None:
    shim, real = (
        tmp_path / "shims" / "python3.12",
        tmp_path / "versions" / "3.12.1" / "bin" / "python3.12",
    )
    for path, code in ((shim, 127), (real, 0)):
        path.parent.mkdir(parents=True)
        path.write_text(f"#!/bin/sh\nexit {code}\n")
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'none'}:{shim.parent}:{os.environ['PATH']}")
    assert rehearsal.find_python("python3.12") == str(real)
    assert rehearsal.find_python(str(real)) == str(real)


@pytest.mark.parametrize("named", ["python9.9", "/none/python3.12", "false"])
def test_without_python_3_12_it_says_how_to_name_one(named: str) -> None:
    rule = rf"PYTHON312={named}: there is no such command that is a Python 3\.12.*make rehearsal PYTHON312="
    with pytest.raises(SystemExit, match=rule):
        rehearsal.find_python(named)


@pytest.mark.parametrize(
    ("code", "shows", "exit_code"),
    [("print('3 skipped')", "3 skipped", 0), ("print('no')", "3", 1), ("exit(5)", "", 1)],
)
def test_the_exit_code_says_whether_a_stage_failed(
    tmp_path, monkeypatch, capsys, code, shows, exit_code
) -> None:
    monkeypatch.setattr(rehearsal, "HOME", tmp_path)
    monkeypatch.setattr(rehearsal, "copy_repository", lambda target: target.mkdir())
    monkeypatch.setattr(
        rehearsal, "stages", lambda python: [Stage("one", [python, "-c", code], shows)]
    )
    assert rehearsal.main(["--python", sys.executable]) == exit_code
    assert f"exit {5 if 'exit' in code else exit_code}  one" in capsys.readouterr().out
