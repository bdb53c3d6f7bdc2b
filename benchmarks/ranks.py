"""Several processes of one case, connected by gloo on this machine, and their memory."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TIMEOUT_S = 3600


@contextmanager
def held_port() -> Iterator[int]:
    """A port of this machine for the store of some ranks; nobody else is given it within the
    context.

    The socket that holds it does not listen, so the store may.
    """
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the store's socket
        holder.bind(("127.0.0.1", 0))
        yield int(holder.getsockname()[1])


def run_ranks(
    module: str, options: Mapping[str, Any], ranks: int, **variables: str
) -> list[dict[str, Any]]:
    """Run a module in that many processes, with one thread each for OpenMP.

    Args:
        module: gets `options` as JSON, and prints its result as one JSON line.
        options: of all ranks.
        ranks: number of processes.
        variables: further ones of the environment.

    Returns:
        The result of each rank.

    Raises:
        ValueError: if a process fails.
    """
    with held_port() as port:
        shared = {
            **os.environ,
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
            **variables,
        }
        command = [sys.executable, "-m", module, json.dumps(options)]
        processes = [
            subprocess.Popen(
                command, env=shared | {"RANK": str(r), "LOCAL_RANK": str(r)}, stdout=subprocess.PIPE
            )
            for r in range(ranks)
        ]
        try:
            printed = [process.communicate(timeout=TIMEOUT_S)[0].decode() for process in processes]
        finally:
            for process in processes:
                process.kill()
    codes = [process.returncode for process in processes]
    if any(codes):
        raise ValueError(f"the {ranks} processes of {module} ended with {codes}: {options}")
    return [json.loads(text.splitlines()[-1]) for text in printed]


def status_bytes(name: str) -> int:
    """One figure of the kernel for this process, such as VmRSS or VmHWM, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))
