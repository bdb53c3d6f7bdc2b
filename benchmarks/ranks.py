"""Several processes of one case, connected by gloo on this machine, and their memory."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
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


def variables_of_ranks(port: int, ranks: int, variables: Mapping[str, str]) -> list[dict[str, str]]:
    """The environment of each of some ranks on this machine, with one thread for OpenMP.

    Args:
        port: of their store.
        ranks: number of processes.
        variables: further ones.
    """
    shared = {
        **os.environ,
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        **variables,
    }
    return [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def completed_ranks(
    command: Sequence[str],
    ranks: int,
    *,
    variables: Mapping[str, str],
    timeout_s: float,
    **options: Any,
) -> list[subprocess.CompletedProcess[bytes]]:
    """Run a command in that many processes that find each other, with one thread each for OpenMP,
    and wait for all.

    Args:
        command: of all ranks.
        ranks: number of processes.
        variables: further ones of the environment.
        timeout_s: seconds to wait for one process; when they are over, all are killed.
        options: further ones of `subprocess.Popen`: which streams are kept, the folder.

    Returns:
        What became of each rank.

    Raises:
        subprocess.TimeoutExpired: if a process has not ended in time.
    """
    with held_port() as port:
        processes = [
            subprocess.Popen(command, env=environment, **options)
            for environment in variables_of_ranks(port, ranks, variables)
        ]
        try:
            streams = [process.communicate(timeout=timeout_s) for process in processes]
        finally:
            for process in processes:
                process.kill()
    return [
        subprocess.CompletedProcess(command, process.returncode, *found)
        for process, found in zip(processes, streams, strict=True)
    ]


def run_ranks(
    module: str, options: Mapping[str, Any], ranks: int, **variables: str
) -> list[dict[str, Any]]:
    """Run a module in that many processes.

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
    done = completed_ranks(
        [sys.executable, "-m", module, json.dumps(options)],
        ranks,
        variables={"LOCAL_WORLD_SIZE": str(ranks), **variables},
        timeout_s=TIMEOUT_S,
        stdout=subprocess.PIPE,
    )
    codes = [rank.returncode for rank in done]
    if any(codes):
        raise ValueError(f"the {ranks} processes of {module} ended with {codes}: {options}")
    return [json.loads(rank.stdout.decode().splitlines()[-1]) for rank in done]


def status_bytes(name: str) -> int:
    """One figure of the kernel for this process, such as VmRSS or VmHWM, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))
