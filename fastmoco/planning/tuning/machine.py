"""What is known of a machine without importing torch: cores, programs and libraries."""

from __future__ import annotations

import ctypes.util
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

COMPILERS = ("g++", "clang++", "c++")
ALLOCATORS = ("jemalloc", "tcmalloc", "tcmalloc_minimal")
"""Libraries that replace malloc, as `ctypes.util.find_library` names them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """The machine of a measurement."""

    cores: tuple[int, ...]
    """The cores that this process may use."""
    one_per_core: tuple[int, ...]
    """One hardware thread of each of them."""
    nodes: int = 1
    """NUMA nodes with memory."""
    programs: frozenset[str] = frozenset()
    """Those of `taskset`, `numactl` and the C++ compilers that are installed."""
    allocators: tuple[tuple[str, str], ...] = ()
    """Names of `ALLOCATORS` and the file names of the installed ones, e.g. `libjemalloc.so.2`."""
    glibc: bool = True
    """Whether malloc is that of glibc."""
    cpu: str = "unknown"
    memory_bytes: int = 0

    def line(self, device: str, versions: Mapping[str, str]) -> str:
        """The machine in a line, without names of its own.

        Args:
            device: name of the GPU, or "cpu".
            versions: of libraries, by name.
        """
        gpu = "" if device == "cpu" else f"{device}; "
        counted = f"{len(self.cores)} core{'s' if len(self.cores) > 1 else ''}"
        memory = f", {self.memory_bytes / 2**30:.0f} GiB" if self.memory_bytes else ""
        shown = ", ".join(f"{name} {value}" for name, value in versions.items())
        return f"{gpu}{self.cpu}, {counted}{memory}; {shown}"


def this_machine() -> Machine:
    """The machine of this process."""
    cores = tuple(sorted(os.sched_getaffinity(0)))
    names = ("taskset", "numactl", *COMPILERS)
    found = ((name, ctypes.util.find_library(name)) for name in ALLOCATORS)
    return Machine(
        cores=cores,
        one_per_core=_one_per_core(cores),
        nodes=max(1, len(list(Path("/sys/devices/system/node").glob("node[0-9]*")))),
        programs=frozenset(name for name in names if shutil.which(name)),
        allocators=tuple((name, file) for name, file in found if file),
        glibc=platform.libc_ver()[0] == "glibc",
        cpu=_cpu(),
        memory_bytes=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
    )


def commit() -> str:
    """The commit of the source of fastmoco, with a plus sign if its files are modified; "unknown"
    outside a repository."""
    folder = str(Path(__file__).resolve().parent)
    command = ["git", "-C", folder, "describe", "--always", "--exclude=*", "--dirty=+"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)  # noqa: S603 - fixed words
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() or "unknown"


def _one_per_core(cores: tuple[int, ...]) -> tuple[int, ...]:
    """The first hardware thread of each core."""
    taken: dict[str, int] = {}
    for core in cores:
        siblings = Path(f"/sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list")
        try:
            taken.setdefault(siblings.read_text().strip(), core)
        except OSError:
            taken.setdefault(str(core), core)
    return tuple(taken.values())


def _cpu() -> str:
    """The model of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.machine())
