"""The program where a package that all commands import is missing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fastmoco.cli.start import _without_commands


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


def test_a_package_that_a_command_needs_later_is_named_too(tmp_path: Path) -> None:
    """Any other module that is missing is a mistake of the code, with its traceback."""
    config = tmp_path / "my.yaml"
    config.write_text("epochs: 1\n")
    found = _program("yaml", "train", str(config))
    assert found.returncode == 2
    assert found.stderr.splitlines()[-1].endswith("fastmoco doctor names the cure")
    assert "Traceback" not in found.stderr
    assert "Traceback" in _program("fastmoco.config.documents", "train", str(config)).stderr


def test_the_options_of_doctor_are_its_own_without_other_packages_too(monkeypatch) -> None:
    called = []

    def doctor(*, json: bool = False, seconds: float = 7.5) -> int:
        called.append((json, seconds))
        return 0

    monkeypatch.setattr("fastmoco.cli.doctor.doctor", doctor)
    for words in ([], ["--json"], ["--seconds", "3"]):
        assert _without_commands(["doctor", *words], ImportError("tyro")) == 0
    assert called == [(False, 7.5), (True, 7.5), (False, 3.0)]
