"""What pip, conda, Docker and cibuildwheel read. `make dist` and `make installed` build and use the
distributions themselves."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from fastmoco.errors import EXTRAS as EXTRA_OF_MODULE
from fastmoco.training.checkup.packages import satisfies

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS: dict[str, list[str]] = PROJECT["project"]["optional-dependencies"]
DALI = ("cuda13", "cuda12")
ALIASES = {"dali-cu13": "cuda13", "dali-cu12": "cuda12"}
TOOLS = ("dev", "docs")
NAME = re.compile(r"[\w.-]+")


def names(requirements: list[str]) -> set[str]:
    """Names of distributions."""
    return {match[0] for line in requirements if (match := NAME.match(line))}


def test_all_names_every_extra_but_dali_and_the_tools() -> None:
    (line,) = EXTRAS["all"]
    found = re.fullmatch(r"fastmoco\[(.+)\]", line)
    assert found is not None
    assert set(found[1].split(",")) == set(EXTRAS) - {
        *(*DALI, *ALIASES, *TOOLS, "all"),
        "trackio",  # wants an older Pillow than the pinned one
    }


def test_the_earlier_names_of_extras_stay() -> None:
    assert {alias: EXTRAS[alias] for alias in ALIASES} == {
        alias: [f"fastmoco[{name}]"] for alias, name in ALIASES.items()
    }


def test_no_extra_takes_a_placeholder_or_another_apex() -> None:
    wanted = names(PROJECT["project"]["dependencies"]) | set().union(*map(names, EXTRAS.values()))
    assert not wanted & {"nvidia-dali", "apex", "nvidia-dali-cuda"}
    assert names(EXTRAS["cuda13"]) == {"nvidia-dali-cuda130"}
    assert names(EXTRAS["cuda12"]) == {"nvidia-dali-cuda120"}


def test_the_extras_that_messages_name_exist() -> None:
    assert set(EXTRA_OF_MODULE.values()) <= set(EXTRAS)


def pins(file: str) -> dict[str, str]:
    """Version by name, of a file whose every line is `NAME==VERSION`."""
    lines = [line for line in (ROOT / file).read_text().splitlines() if not line.startswith("#")]
    assert not [line for line in lines if not re.fullmatch(r"[\w.-]+==[\w.+!-]+", line)]
    pairs = (line.split("==") for line in lines)
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in pairs}


def test_every_pin_is_exact_and_every_tool_is_pinned() -> None:
    free = {"triton"}  # the CUDA builds of torch name the one version they work with
    pinned = pins("constraints.txt")
    missing = {name for name in names(EXTRAS["dev"]) if name.lower() not in pinned} - free
    assert not missing


def test_trackio_is_tested_with_the_pinned_versions_but_for_pillow() -> None:
    own = pins("tests/trackio.txt")
    assert own.keys() & pins("constraints.txt").keys() == {"pillow"}
    for requirement in (*PROJECT["project"]["dependencies"], *EXTRAS["trackio"]):
        name = names([requirement]).pop()
        if name in own:
            assert satisfies(own[name], requirement.removeprefix(name))
    assert {"pillow", "trackio"} <= own.keys()


@pytest.mark.parametrize(
    ("value", "code", "parts"),
    [("1", 0, "0"), ("0", 0, "1 False"), ("", 0, "1 True"), ("yes", 1, "")],
)
def test_a_build_has_the_c_part_as_asked(value: str, code: int, parts: str) -> None:
    if not satisfies(importlib.metadata.version("setuptools"), ">=77"):
        pytest.skip("setuptools is too old")
    script = """
import setuptools
made = []
setuptools.setup = lambda **options: made.append(options)
import runpy
runpy.run_path("setup.py")
parts = made[0]["ext_modules"]
print(len(parts), *(part.optional for part in parts))
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env=os.environ | {"FASTMOCO_PURE": value},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout.strip()) == (code, parts), done.stderr
    if code:
        assert "FASTMOCO_PURE='yes': must be 1" in done.stderr


def test_the_environment_of_conda_fits() -> None:
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    file = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert set(file) == {"name", "channels", "dependencies"}
    assert file["channels"] == ["conda-forge", "nodefaults"]
    plain = [entry for entry in file["dependencies"] if isinstance(entry, str)]
    assert not [entry for entry in plain if not re.fullmatch(r"[a-z][\w-]*((>=|=)[\d.]+)?", entry)]
    (python,) = (entry.partition("=")[2] for entry in plain if entry.startswith("python="))
    assert f"Programming Language :: Python :: {python}" in PROJECT["project"]["classifiers"]
    (pip,) = (entry["pip"] for entry in file["dependencies"] if isinstance(entry, dict))
    constraint, package = pip
    assert (ROOT / constraint.removeprefix("--constraint ")).is_file()
    found = re.fullmatch(r"\.\[(.+)\]", package)
    assert found is not None
    assert set(found[1].split(",")) <= set(EXTRAS)


def test_the_dockerfile_takes_what_there_is_and_is_not_root() -> None:
    lines = (ROOT / "Dockerfile").read_text()
    (extras,) = re.findall(r"\$\{wheel\}\[(.+)\]", lines)
    assert set(extras.split(",")) <= set(EXTRAS)
    assert re.findall(r"^FROM (?!system\b|build\b)(\S+)", lines, re.MULTILINE) == [
        "nvidia/cuda:13.0.2-base-ubuntu24.04"
    ]
    assert re.findall(r"^USER (\S+)", lines, re.MULTILINE) == ["10001"]

    # What a build needs is not kept out of its context.
    kept = set(re.findall(r"^!(\S+)", (ROOT / ".dockerignore").read_text(), re.MULTILINE))
    assert kept >= {"fastmoco", "kernels", "pipelines", "setup.py", "pyproject.toml"}
    assert kept >= set(re.findall(r"\b(\S+\.(?:txt|md))\b", (ROOT / "MANIFEST.in").read_text()))
    assert not [name for name in kept if not (ROOT / name).exists()]


def test_the_documented_extras_are_those_of_the_project() -> None:
    text = (ROOT / "docs" / "install.md").read_text()
    table = text.partition("## Extras")[2].partition("\n\n`dali")[0]
    rows = re.findall(r"^\| (`.+?`) \|", table, re.MULTILINE)
    documented = {name for row in rows for name in re.findall(r"`([\w-]+)`", row)}
    assert documented == set(EXTRAS) - {*ALIASES, *TOOLS}
