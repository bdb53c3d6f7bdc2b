"""Launch scripts: what they contain, run and leave to their caller."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from fastmoco.planning.tuning.script import SEARCHED, Script, check_place, write
from fastmoco.planning.tuning.settings import Settings
from tests.fault_runs import ROOT

SCRIPT = Script(
    recipe="quickstart_digits",
    overrides={
        "data.shards": ("--data.shards", "/home/me/data/train-*.tar"),
        "data.synthetic": ("--data.synthetic",),
        "optim.betas": ("--optim.betas", "0.9", "0.95"),
    },
    settings=Settings(
        (("threads", 1), ("batch.cuda_graphs", True)),
        (("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1"), ("OMP_NUM_THREADS", "3")),
    ),
    command=["tune", "quickstart_digits", "--data.shards", "SHARDS", "--out", "x.sh"],
    name="x.sh",
    about=["Measured on a machine.", "  ratio 1.1"],
    made="on 2026-01-02 at commit abc",
    beside_settings=False,
)
PYTHON = """#!/bin/sh
printf '%s\\n' "$@" "tunables=$GLIBC_TUNABLES" "threads=$OMP_NUM_THREADS" "nccl=$NCCL_DEBUG"
"""


def run(script: Script, folder: Path, *words: str, **variables: str) -> list[str]:
    """What a script starts, with the variables that it sets."""
    python = folder / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    write(folder / "x.sh", script.text())
    base = {"PATH": os.environ["PATH"], "PYTHON": str(python)}
    done = subprocess.run(
        [str(folder / "x.sh"), *words],
        env=base | variables,
        capture_output=True,
        text=True,
        check=True,
        cwd="/",
    )
    return done.stdout.splitlines()


@pytest.mark.parametrize("beside", [False, True])
def test_a_script_trains_with_its_settings_and_the_callers_options_last(
    beside: bool, tmp_path: Path
) -> None:
    if beside:
        shutil.copy(ROOT / "launch" / "settings.sh", tmp_path)
    script = replace(SCRIPT, beside_settings=beside)
    assert ("source" in script.text()) == beside
    assert run(script, tmp_path, "--out", "a b", "--threads", "4") == [
        *("-m", "fastmoco", "train", "quickstart_digits"),
        *("--optim.betas", "0.9", "0.95"),
        *("--threads", "1", "--batch.cuda-graphs"),
        *("--out", "a b", "--threads", "4"),
        *("tunables=glibc.malloc.hugetlb=1", "threads=3", "nccl=WARN"),
    ]
    found = run(script, tmp_path, OMP_NUM_THREADS="5", NCCL_DEBUG="INFO")
    assert found[-2:] == ["threads=5", "nccl=INFO"]


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("path", [".", ".::/usr/bin:/bin"])
def test_a_script_runs_no_program_of_the_current_folder(
    path: str, beside: bool, tmp_path: Path
) -> None:
    """Typed with a folder, or found by bash in the PATH, without one."""
    settings = (ROOT / "launch" / "settings.sh").read_text()
    assert SEARCHED in settings
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        folder.mkdir()
    for name in ("env", "bash", "dirname", "python", "git", "settings.sh"):
        (here / name).write_text("#!/bin/sh\ntouch EXECUTED\n")
        (here / name).chmod(0o755)
    if beside:
        (there / "settings.sh").write_text(settings)
    # Nothing of the PATH has this name: the script ends there.
    variables = {"PATH": f"{path}:{there}", "PYTHON": "python-that-is-not-there"}
    write(there / "x.sh", replace(SCRIPT, beside_settings=beside).text())
    for command in ([str(there / "x.sh")], ["/bin/bash", "x.sh"]):
        done = subprocess.run(
            command, env=variables, cwd=here, capture_output=True, text=True, check=False
        )
        assert done.returncode == 127, done.stderr
        assert "python-that-is-not-there" in done.stderr
    variables["PYTHON"], variables["PATH"] = "python", path
    subprocess.run([str(there / "x.sh")], env=variables, cwd=here, check=False, capture_output=True)
    assert not (here / "EXECUTED").exists()


def test_a_script_has_no_path_of_its_machine_and_tells_how_it_was_made() -> None:
    text = SCRIPT.text()
    assert "/home" not in text
    assert "synthetic" not in text
    for line in (
        "# Measured on a machine.",
        "#   ratio 1.1",
        "# Made on 2026-01-02 at commit abc by:",
        "#     fastmoco tune quickstart_digits --data.shards SHARDS --out x.sh",
        "#     x.sh --data.shards SHARDS --out FOLDER [overrides]",
    ):
        assert line in text.splitlines()


def test_words_of_the_user_stay_in_their_comment_and_in_their_option(tmp_path: Path) -> None:
    """A line break would end the comment, and its rest would be run."""
    word = "it's $(touch made)\ntouch made\n\\"
    name, out = ("--knn.holdout", word), ("--out", f"{word}.sh")
    script = replace(
        SCRIPT, overrides={"knn.holdout": name}, command=["tune", *name, *out], name=f"{word}.sh"
    )
    printed = "\n".join(run(script, tmp_path))
    assert printed.startswith(f"-m\nfastmoco\ntrain\nquickstart_digits\n--knn.holdout\n{word}\n")
    assert not [folder for folder in (tmp_path, Path("/")) if (folder / "made").exists()]

    # The comment is a command that bash reads as it was typed.
    line = next(one for one in script.text().splitlines() if one.startswith("#     fastmoco "))
    read = ["bash", "-c", line.replace("#     fastmoco", "printf '%s|'")]
    done = subprocess.run(read, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout == f"tune|--knn.holdout|{word}|--out|{word}.sh|"


def test_several_gpus_one_gpu_and_a_command_before_the_run(tmp_path: Path) -> None:
    several = replace(SCRIPT, processes=8, on_gpu=True)
    assert "--gpus 8 \\\n    " in several.text()
    assert "CUDA_VISIBLE_DEVICES" not in several.text()
    assert "CUDA_VISIBLE_DEVICES:-0" in replace(SCRIPT, on_gpu=True).text()
    bound = replace(SCRIPT, settings=Settings(prefix=("env", "NCCL_DEBUG=TRACE")))
    assert run(bound, tmp_path)[-1] == "nccl=TRACE"


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not on the path")
def test_shellcheck_accepts_a_script(tmp_path: Path) -> None:
    write(tmp_path / "x.sh", SCRIPT.text())
    done = subprocess.run(
        ["shellcheck", str(tmp_path / "x.sh")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


def test_a_place_is_checked_first_and_nothing_is_left_of_a_failed_write(tmp_path: Path) -> None:
    path = tmp_path / "x.sh"
    check_place(path, force=False)
    write(path, "one")
    assert path.stat().st_mode & stat.S_IXUSR
    with pytest.raises(ValueError, match=r"x\.sh'.*exists already; --force replaces it"):
        check_place(path, force=False)
    check_place(path, force=True)
    with pytest.raises(ValueError, match=r"is a folder; give a file"):
        check_place(tmp_path, force=True)
    with pytest.raises(ValueError, match=r"there is no folder .*missing'; make it"):
        check_place(tmp_path / "missing" / "x.sh", force=False)
    with pytest.raises(UnicodeEncodeError):
        write(path, "\ud800")
    assert path.read_text() == "one"
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_in_the_folder_of_a_script_is_not_followed(tmp_path: Path) -> None:
    """Neither one of the name of an unfinished file of an earlier version, nor the script itself."""
    (tmp_path / "precious").write_text("all of it")
    (tmp_path / "precious").chmod(0o600)
    for name in (".x.sh.new", "x.sh"):
        (tmp_path / name).symlink_to("precious")
    write(tmp_path / "x.sh", "one")
    assert (tmp_path / "x.sh").read_text() == "one"
    assert (tmp_path / "precious").read_text() == "all of it"
    assert stat.S_IMODE((tmp_path / "precious").stat().st_mode) == 0o600
