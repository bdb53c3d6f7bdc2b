"""How much memory this process can still allocate, on the device or in the machine."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from fastmoco.config.launched import local_processes

if TYPE_CHECKING:
    import torch


def free_bytes(
    device: torch.device, *, proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")
) -> int:
    """Bytes that a process can still allocate on a device.

    On CUDA: what the driver reports as free, and what torch's allocator holds without using it. On
    a CPU: what the kernel reports as available, or what the control group leaves if that is less,
    divided among the processes of this machine. On a system without `/proc`: 50 % of the installed
    memory.

    Args:
        device: CPU or CUDA.
        proc: the kernel's `/proc`; another folder in tests.
        cgroups: where control groups are mounted.

    Raises:
        ValueError: on a CPU whose system does not report its memory; the message contains the cure.
    """
    if device.type == "cuda":
        import torch

        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    return free_host_bytes(proc=proc, cgroups=cgroups)


def free_host_bytes(*, proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """`free_bytes` on a CPU, without torch."""
    left = [_available(proc / "meminfo"), *_group_leaves(proc / "self" / "cgroup", cgroups)]
    return min(left) // local_processes(os.environ)


def _available(meminfo: Path) -> int:
    if not meminfo.exists():  # as on macOS
        return _installed() // 2
    fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024


def _installed() -> int:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError) as error:
        raise ValueError(
            "this system does not report its memory: "
            "set --batch.chunk to a number of images, or to none"
        ) from error


def _group_leaves(membership: Path, cgroups: Path) -> list[int]:
    """What remains in each limited control group of this process and in the groups above them.

    Reads versions 1 and 2 of control groups.
    """
    if not membership.exists():
        return []
    left: list[int] = []
    for line in membership.read_text().splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0":
            root, names = cgroups, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            root, names = (
                cgroups / "memory",
                ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
            )
        else:
            continue
        folder = root / path.strip("/")
        # Inside a container the path may be the host's, while the root of the mount is the
        # container's own group.
        for group in (folder, *folder.parents):
            leaves = _leaves(group, *names) if group == root or root in group.parents else None
            left += [] if leaves is None else [leaves]
    return left


def _leaves(folder: Path, limit: str, used: str, cache: str) -> int | None:
    """Limit minus use, without cached files, which the kernel frees first; None without a limit."""
    try:
        allowed = (folder / limit).read_text().strip()
        taken = int((folder / used).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except OSError:  # no such file, or not readable by this process
        return None
    return None if allowed == "max" else max(0, int(allowed) - taken + int(stat.get(cache, 0)))
