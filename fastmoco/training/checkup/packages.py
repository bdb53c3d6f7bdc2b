"""Installed distributions: their versions, beside what fastmoco's metadata asks for. Imports none of them."""

from __future__ import annotations

import importlib.metadata
import json
import operator
import platform
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import fastmoco
from fastmoco.training.checkup.findings import Finding
from fastmoco_pipelines.processes import interpreter

OLDEST_PYTHON = (3, 11)
DALI = {"13": "nvidia-dali-cuda130", "12": "nvidia-dali-cuda120"}
"""Major version of CUDA -> DALI's distribution."""
SHOWN = ("torch", "numpy", "triton", *DALI.values())
"""Distributions that `fastmoco --version` prints if they are installed."""
MODULES = {
    "idna": "idna",
    "numpy": "numpy",
    "pillow": "PIL",
    "pyyaml": "yaml",
    "rich": "rich",
    "safetensors": "safetensors",
    "tyro": "tyro",
    "urllib3": "urllib3",
    "webdataset": "webdataset",
}
"""What fastmoco needs beside torch, and what is imported of it."""
TOOLS = ("dev", "docs")
"""Extras for developers."""
IMPOSTORS = {
    "nvidia-dali": f"a placeholder without code; DALI is {DALI['13']}, or {DALI['12']} for CUDA 12"
}
"""Distributions of an index that are not what their names say."""
_COMPARISONS = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
    ">": operator.gt,
    "<": operator.lt,
}


@dataclass(frozen=True, slots=True)
class Requirement:
    """One line of `Requires-Dist`."""

    name: str
    bounds: str
    """Such as `<2,>=1.0`; empty: any version."""
    extra: str
    """The extra that it belongs to; empty: every installation."""

    @property
    def words(self) -> str:
        """As pip takes it."""
        return f"{self.name}{self.bounds}"


def version_line() -> str:
    """Versions of fastmoco, Python and what decides about numbers and speed."""
    found = [f"{name} {version}" for name in SHOWN if (version := installed(name))]
    return f"fastmoco {fastmoco.__version__} ({', '.join([f'Python {platform.python_version()}', *found])})"


def installed(name: str) -> str | None:
    """The version of an installed distribution; None without it."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def pip(*words: str) -> str:
    """A command of pip for the environment of this process."""
    return shlex.join([interpreter(), "-m", "pip", *words])


def pip_install(*words: str) -> str:
    """The command that installs into the environment of this process."""
    return pip("install", *words)


def requirements() -> list[Requirement]:
    """What fastmoco's metadata asks for, but for the tools of its developers; empty without metadata, as
    for a source folder on PYTHONPATH. Where an extra names another one, its lines are those of that one.
    """
    try:
        lines = importlib.metadata.requires("fastmoco") or []
    except importlib.metadata.PackageNotFoundError:
        return []
    parsed = [_parsed(line) for line in lines]
    return [found for found in parsed if found.extra not in TOOLS and found.name != "fastmoco"]


def _parsed(line: str) -> Requirement:
    """`s3fs>=2024.12; extra == "s3"`, also in the older form with parentheses."""
    wanted, _, marker = line.partition(";")
    match = re.match(r"\s*([\w.-]+)(?:\[[^]]*\])?\s*\(?([^)]*)\)?", wanted)
    extra = re.search(r"extra\s*==\s*['\"]([\w.-]+)['\"]", marker)
    name, bounds = (match[1], match[2]) if match else (wanted, "")
    return Requirement(name, re.sub(r"\s", "", bounds), extra[1] if extra else "")


def satisfies(version: str, bounds: str) -> bool:
    """Whether a version is within bounds, by its numbers; suffixes such as +cpu do not count.

    Args:
        version: such as `2.13.0+cpu`.
        bounds: such as `<2.16,>=2.11`.
    """
    for bound in filter(None, bounds.split(",")):
        match = re.match(r"(>=|<=|==|!=|>|<)(.+)", bound)
        if match is None:
            continue
        ours, limit = _numbers(version), _numbers(match[2])
        length = max(len(ours), len(limit))
        padded = [numbers + (0,) * (length - len(numbers)) for numbers in (ours, limit)]
        if not _COMPARISONS[match[1]](*padded):
            return False
    return True


def _numbers(version: str) -> tuple[int, ...]:
    release = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(map(int, release[0].split("."))) if release else ()


def python_finding() -> Finding:
    """The interpreter."""
    version, oldest = platform.python_version(), ".".join(map(str, OLDEST_PYTHON))
    if sys.version_info[:2] < OLDEST_PYTHON:
        return Finding(
            name="Python",
            state="broken",
            text=f"{version} in {interpreter()}; fastmoco needs {oldest} or newer",
            cure="make an environment by a newer Python: python3.12 -m venv .venv",
            needed=True,
        )
    return Finding(name="Python", state="works", text=f"{version} in {interpreter()}")


def fastmoco_finding() -> Finding:
    """The package itself."""
    place = Path(fastmoco.__file__).parent
    known = installed("fastmoco")
    if known is None:
        return Finding(
            name="fastmoco",
            state="weak",
            text=f"{fastmoco.__version__} in {place}, not installed: versions of other packages "
            "are not checked",
            cure=pip_install("-e", str(place.parent)),
        )
    if known != fastmoco.__version__:
        return Finding(
            name="fastmoco",
            state="weak",
            text=f"{fastmoco.__version__} in {place}, but {known} is what pip installed",
            cure=reinstall(),
        )
    return Finding(name="fastmoco", state="works", text=f"{known} in {place}")


def package_findings() -> Iterator[Finding]:
    """Packages that are missing or outside of the range that fastmoco's metadata allows."""
    wanted = requirements()
    core = [found for found in wanted if not found.extra]
    faults = 0
    for found in core:
        version = installed(found.name)
        if version is not None and satisfies(version, found.bounds):
            continue
        faults += 1
        yield Finding(
            name=found.name,
            state="broken",
            text="not installed"
            if version is None
            else f"{version}, but fastmoco needs {found.bounds}",
            cure=pip_install(found.words),
            needed=version is None,
        )
    if core and not faults:
        yield Finding(
            name="packages", state="works", text=f"all {len(core)} that fastmoco needs, in range"
        )
    for found in dict.fromkeys(found for found in wanted if found.extra):
        version = installed(found.name)
        if version is not None and not satisfies(version, found.bounds):
            yield Finding(
                name=found.name,
                state="weak",
                text=f"{version}, but the extra {found.extra} needs {found.bounds}",
                cure=pip_install(found.words),
            )
    for name, truth in IMPOSTORS.items():
        if (version := installed(name)) is not None:
            yield Finding(
                name=name,
                state="weak",
                text=f"{version} is {truth}",
                cure=pip("uninstall", name),
            )
    if all(map(installed, DALI.values())):
        yield Finding(
            name="DALI twice",
            state="broken",
            text=f"{' and '.join(DALI.values())} write the same files",
            cure=pip("uninstall", *DALI.values()) + f"; then {pip_install(wanted_dali('13'))}",
        )


def wanted_dali(cuda: str) -> str:
    """DALI for a major version of CUDA, as pip takes it.

    Args:
        cuda: "12" or "13".
    """
    named = {found.name: found.words for found in requirements()}
    return named.get(DALI[cuda], DALI[cuda])


def reinstall(*, from_source: bool = False) -> str:
    """The command that installs fastmoco again, from where it came.

    Args:
        from_source: build it here, also where there is a wheel.
    """
    root = Path(fastmoco.__file__).parents[1]
    if (root / "pyproject.toml").exists():
        return pip_install("--force-reinstall", "--no-deps", "-e", str(root))
    try:
        text = importlib.metadata.distribution("fastmoco").read_text("direct_url.json")
    except importlib.metadata.PackageNotFoundError:
        text = None
    origin: dict[str, Any] = json.loads(text) if text is not None else {"url": ""}
    url = origin["url"]
    if "vcs_info" in origin:  # as of `pip install git+https://...`; a path there is a repository
        url = f"{origin['vcs_info']['vcs']}+{url}@{origin['vcs_info']['commit_id']}"
    place = unquote(urlparse(url).path) if url.startswith("file:") else url
    again = ["--force-reinstall", "--no-deps", "--no-cache-dir"]
    if place and not (from_source and place.endswith(".whl")):  # a wheel cannot be built here
        return pip_install(*again, place)
    source = ["--no-binary", "fastmoco"] if from_source else []
    return pip_install(*again, *source, f"fastmoco=={fastmoco.__version__}")
