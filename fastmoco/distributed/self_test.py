"""Does the library that joins several processes work here? Tried by a group of one process."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist


def try_all_reduce(device: torch.device, store: Path) -> str:
    """Sum a tensor over a group of this process alone, and say what did it.

    Args:
        device: CPU for gloo, CUDA for NCCL.
        store: a file that does not exist yet, where the process meets itself.

    Raises:
        RuntimeError: if the library is missing, does not start, or has another sum.
    """
    if not dist.is_available():
        raise RuntimeError("this torch was built without torch.distributed")
    name = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        name,
        init_method=f"file://{store}",
        rank=0,
        world_size=1,
        timeout=timedelta(seconds=60),
    )
    try:
        numbers = torch.arange(4.0, device=device)
        dist.all_reduce(numbers)
        if numbers.tolist() != [0.0, 1.0, 2.0, 3.0]:
            raise RuntimeError(f"{name} made {numbers.tolist()} of 0, 1, 2, 3")
    finally:
        dist.destroy_process_group()
    if name == "gloo":
        return name
    version = torch.cuda.nccl.version()  # type: ignore[no-untyped-call]
    return f"NCCL {'.'.join(map(str, version))}"
