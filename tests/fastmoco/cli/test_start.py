"""The program where a package that all commands import is missing."""

from __future__ import annotations

import subprocess
import sys

import pytest


def _program(without: str, *words: str) -> subprocess.CompletedProcess[str]:
    code = (
        f"import sys; sys.modules[{without!r}] = None; sys.argv = {['fastmoco', *words]!r};"
        "from fastmoco.cli.start import main; sys.exit(main())"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("package", ["numpy", "PIL", "tyro"])
def test_doctor_starts_and_any_other_command_names_it(package: str) -> None:
    doctor = _program(package, "doctor", "--seconds", "0")
    assert (doctor.returncode, doctor.stderr) == (
        2,
        "fastmoco: seconds=0.0: must be above 0\n",
    )
    other = _program(package, "train", "quickstart_digits")
    assert other.returncode == 2
    (line,) = other.stderr.splitlines()
    assert f"'{package}'" in line or package in line
    assert line.endswith("fastmoco doctor names the cure")
