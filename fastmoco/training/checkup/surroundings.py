"""What the machine lends to a process: cores, memory, disks, open files, compilers. Without torch."""

from __future__ import annotations

import os
import resource
import shlex
import shutil
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

from fastmoco.planning.free_memory import free_host_bytes
from fastmoco.planning.tuning.machine import this_machine
from fastmoco.training.checkup.findings import Finding

TEMPORARY = "temporary files"
LITTLE_MEMORY = 4 * 2**30
MORE_MEMORY = "end other programs, or raise the limit of the container (docker run --memory)"
LITTLE_DISK = 5 * 2**30
LITTLE_SHARED = 1 * 2**30
FEW_FILES = 1024
"""Open files that a run on one machine needs at most: shards, sockets and pipes of its processes."""


def surroundings() -> Iterator[Finding]:
    """A finding for each of them. Only a folder for temporary files is needed: small runs need little
    of the others. Without it there is no other finding, because looking takes one."""
    folder = temporary_folder()
    cure = "free some space, or set TMPDIR to a folder on another disk"
    if folder is None:
        why = "no folder for them: /tmp and the others are full, missing or cannot be written"
        yield Finding(name=TEMPORARY, state="broken", text=why, cure=cure, needed=True)
        return
    yield _cores()
    yield _memory()
    yield _disk("disk", Path.cwd(), "free some space, or choose another disk by --out")
    if folder != Path.cwd():
        yield _disk(TEMPORARY, folder, cure)
    yield from _shared_memory()
    yield _open_files()
    yield _compiler()


def temporary_folder() -> Path | None:
    """Where temporary files are written; None if no folder takes one."""
    try:
        return Path(tempfile.gettempdir())
    except FileNotFoundError:
        return None


def cpu_quota(
    *, proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")
) -> float | None:
    """Cores' worth of time that the control groups of this process allow; None without a limit.

    Args:
        proc: the kernel's `/proc`; another folder in tests.
        cgroups: where control groups are mounted.
    """
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return None
    allowed = []
    for number, controllers, path in (line.split(":", 2) for line in lines):
        if number != "0" and "cpu" not in controllers.split(","):
            continue
        root = cgroups if number == "0" else cgroups / "cpu"
        folder = root / path.strip("/")
        for group in (folder, *folder.parents):
            if group == root or root in group.parents:
                allowed += _quota(group)
    return min(allowed, default=None)


def _quota(group: Path) -> list[float]:
    """The limit of one group, of version 2 or 1."""
    try:
        quota, period = (group / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota = (group / "cpu.cfs_quota_us").read_text().strip()
            period = (group / "cpu.cfs_period_us").read_text().strip()
        except OSError:
            return []
    return [] if quota in ("max", "-1") else [int(quota) / int(period)]


def _cores() -> Finding:
    machine = this_machine()
    installed, quota = os.cpu_count() or 1, cpu_quota()
    cores = len(machine.cores)
    text = f"{machine.cpu}: this process may use {cores} of {installed} hardware threads"
    if quota is not None and quota < cores:
        return Finding(
            name="CPU",
            state="weak",
            text=f"{text}, but its control group has time for {quota:g}",
            cure=f"set OMP_NUM_THREADS={max(1, int(quota))}, or raise the limit of the container "
            "(docker run --cpus)",
        )
    return Finding(name="CPU", state="works", text=text)


def _memory() -> Finding:
    try:
        free = free_host_bytes()
    except (ValueError, KeyError, OSError) as error:  # as where /proc is another system's
        return Finding(name="memory", state="weak", text=f"what is free cannot be told: {error}")
    text = f"{_gib(free)} free to this process, limits of control groups included"
    if free < LITTLE_MEMORY:
        return Finding(name="memory", state="weak", text=text, cure=MORE_MEMORY)
    return Finding(name="memory", state="works", text=text)


def _disk(name: str, folder: Path, cure: str) -> Finding:
    free = shutil.disk_usage(folder).free
    text = f"{_gib(free)} free in {folder}"
    if not os.access(folder, os.W_OK):
        cure = "go to a folder that can be written, or choose one"
        return Finding(name=name, state="weak", text=f"{folder} cannot be written", cure=cure)
    if free < LITTLE_DISK:
        return Finding(name=name, state="weak", text=text, cure=cure)
    return Finding(name=name, state="works", text=text)


def _shared_memory() -> Iterator[Finding]:
    folder = Path("/dev/shm")  # noqa: S108 - the kernel's; nothing is written there
    if not folder.is_dir():
        return
    free = shutil.disk_usage(folder).free
    text = f"{_gib(free)} free in {folder}"
    if free < LITTLE_SHARED:
        cure = "several GPUs need more: docker run --shm-size=8g (or --ipc=host)"
        yield Finding(name="shared memory", state="weak", text=text, cure=cure)
    else:
        yield Finding(name="shared memory", state="works", text=text)


def _open_files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    text = f"{_number(soft)} (the limit can be raised to {_number(hard)})"
    if soft != resource.RLIM_INFINITY and soft < FEW_FILES:
        may_rise = hard == resource.RLIM_INFINITY or hard >= FEW_FILES
        cure = f"ulimit -n {FEW_FILES}"
        if not may_rise:
            cure = f"raise the limit of the container (docker run --ulimit nofile={FEW_FILES}) or of the user"
        return Finding(name="open files", state="weak", text=text, cure=cure)
    return Finding(name="open files", state="works", text=text)


def _number(limit: int) -> str:
    return "unlimited" if limit == resource.RLIM_INFINITY else f"{limit:,}"


def compiler() -> str | None:
    """The C compiler that would build the C part, and the launchers of Triton's kernels."""
    wanted = (os.environ.get("CC"), "cc", "gcc", "clang", sysconfig.get_config_var("CC"))
    for words in (shlex.split(name) for name in wanted if name):
        if words and (found := shutil.which(words[0])):
            return found
    return None


def _compiler() -> Finding:
    found = compiler()
    headers = Path(sysconfig.get_paths()["include"], "Python.h").exists()
    if found is None:
        return Finding(
            name="C compiler",
            state="absent",
            text="none; only Triton on a GPU, torch.compile and an installation from source use one",
            cure="apt-get install gcc g++",
        )
    text = f"{found}, {'with' if headers else 'without'} the headers of Python"
    if headers:
        return Finding(name="C compiler", state="works", text=text)
    cure = "apt-get install python3-dev (for Triton on a GPU)"
    return Finding(name="C compiler", state="weak", text=text, cure=cure)


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"
