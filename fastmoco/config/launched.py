"""Rank and number of processes from the variables of a launcher: torchrun, SLURM's srun, or any
platform that sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT.

Platforms leave some of these variables in every process. A set that does not fit together is
refused, because a process that wrongly believes to be alone would train the whole batch, and one
that wrongly believes to have peers would wait for them.
"""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

_COUNTS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
_MPI = (
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ("MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK"),
    ("PMI_SIZE", "PMI_RANK"),
)
"""Number and rank of processes by Open MPI, MVAPICH2, and MPICH or Intel MPI."""
MOST_PROCESSES = 1 << 20
COUNTS_OF_STARTS = (
    "TORCHELASTIC_RESTART_COUNT",
    "TORCHELASTIC_MAX_RESTARTS",
    "SLURM_RESTART_COUNT",
)
"""Variables that count starts (`faults/restarts.py`)."""
HOST = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
"""Host names that may become an argument of another program."""
_ADDRESS = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,252}|[0-9A-Fa-f:.]{2,45}(%[\w.-]{1,20})?")
"""Names, IPv4 and IPv6, of the machine where the ranks meet."""
_MOST_DIGITS = 18
_HOW = "use `fastmoco train --gpus N`, torchrun, srun or launch/slurm.sh"


@dataclass(frozen=True, kw_only=True)
class Launched:
    """One process as its launcher describes it; the defaults are a process on its own."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    address: str = ""
    """Host of the store in which the ranks meet; empty for a process on its own."""
    port: int = 0

    def variables(self) -> dict[str, str]:
        """The variables of torchrun, which libraries read; none for a process on its own."""
        if self.world_size == 1:
            return {}
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_RANK": str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(self.local_world_size),
            "MASTER_ADDR": self.address,
            "MASTER_PORT": str(self.port),
        }


def read_launcher(environment: Mapping[str, str]) -> Launched:
    """What the variables of this process say about its peers.

    A batch step of SLURM without srun is a process on its own, and so is one with WORLD_SIZE=1.

    Raises:
        ValueError: if variables are missing, are no whole numbers, or contradict each other. The
            message names them and what to set or unset.
    """
    given = {name: value for name, value in environment.items() if value.strip()}
    for name in COUNTS_OF_STARTS:
        _whole(given, name)
    if "TORCHELASTIC_RUN_ID" not in given:
        if _is_srun_task(given):
            return _by_srun(given)
        _refuse_mpi(given)
    found = {name: _whole(given, name) for name in _COUNTS}
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        _require_processes(name, found[name])

    # One process: a rank above 0 would be one of several.
    world_size = found["WORLD_SIZE"]
    if world_size is None or world_size == 1:
        for name in ("RANK", "LOCAL_RANK"):
            if (found[name] or 0) > 0:
                rest = "WORLD_SIZE is not" if world_size is None else "WORLD_SIZE=1"
                raise ValueError(
                    f"{name}={found[name]} is set and {rest}: {_left(name)}; to train with several "
                    f"processes, {_HOW}"
                )
        return Launched()

    # Several: all that they need to meet.
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in given]
    if missing:
        raise ValueError(
            f"WORLD_SIZE={world_size} is set, but not {_listed(missing)}: "
            f"{_left('WORLD_SIZE')}; to train with {world_size} processes, set "
            f"{'it' if len(missing) == 1 else 'them'} in each, or {_HOW}"
        )
    rank = found["RANK"] or 0
    if rank >= world_size:
        raise ValueError(
            f"RANK={rank} and WORLD_SIZE={world_size}: ranks go from 0 to {world_size - 1}; "
            "correct them, or unset both to train in this process alone"
        )
    local_rank = found["LOCAL_RANK"] or 0
    local_world_size = found["LOCAL_WORLD_SIZE"] or 1
    return Launched(
        rank=rank,
        world_size=world_size,
        local_rank=local_rank,
        local_world_size=max(local_world_size, local_rank + 1),
        address=_address(given),
        port=_port(given),
    )


def describe_launcher(environment: Mapping[str, str]) -> str:
    """The launcher that has started this process as one of several, for messages; else empty."""
    given = {name: value for name, value in environment.items() if value.strip()}
    if "TORCHELASTIC_RUN_ID" in given:
        return "torchrun has started this process (TORCHELASTIC_RUN_ID is set)"
    if _is_srun_task(given):
        return f"srun has started {_srun_tasks(given)} tasks ({_tasks_variable(given)})"
    for size, rank in _MPI:
        if (_whole(given, size) or 1) > 1 and rank in given:
            return f"mpirun has started {given[size]} processes ({size})"
    if (_whole(given, "WORLD_SIZE") or 1) > 1 and "RANK" in given:
        return f"RANK={given['RANK']} and WORLD_SIZE={given['WORLD_SIZE']} are set"
    return ""


def _left(name: str) -> str:
    return (
        "a platform or an earlier job may have left it; "
        f"to train in this process alone, unset {name}"
    )


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _whole(given: Mapping[str, str], name: str) -> int | None:
    """The number in a variable; None if it is not set.

    Raises:
        ValueError: if it is no whole number from 0 on.
    """
    if name not in given:
        return None
    text = given[name].strip()
    if not (text.isascii() and text.isdigit() and len(text) <= _MOST_DIGITS):
        raise ValueError(
            f"{name}={given[name]!r}: is no whole number from 0 on; correct it, "
            f"or unset {name} if no launcher has started this process"
        )
    return int(text)


def local_processes(environment: Mapping[str, str]) -> int:
    """Processes of the run on this machine, as torchrun's variable or `Launched.variables` say; 1 for
    a process on its own, whatever a platform has left."""
    return max(1, count_in(environment, "LOCAL_WORLD_SIZE"))


def count_in(environment: Mapping[str, str], name: str) -> int:
    """The number in a variable; 0 for none and for what is no number, which `read_launcher` refuses
    with its name."""
    text = environment.get(name, "").strip()
    return int(text) if re.fullmatch(r"[0-9]{1,9}", text) else 0


def _require_processes(name: str, count: int | None) -> None:
    if count is not None and not 1 <= count <= MOST_PROCESSES:
        raise ValueError(
            f"{name}={count}: is a number of processes, from 1 on and at most {MOST_PROCESSES:,}; "
            f"correct it, or unset {name} if no launcher has started this process"
        )


def _address(given: Mapping[str, str]) -> str:
    address = given["MASTER_ADDR"].strip()
    if not _ADDRESS.fullmatch(address):
        raise ValueError(
            f"MASTER_ADDR={address!r}: is no name and no address of a machine; set that of the "
            "machine with rank 0, without a port"
        )
    return address


def _port(given: Mapping[str, str]) -> int:
    port = _whole(given, "MASTER_PORT") or 0
    if not 0 < port < 65536:
        raise ValueError(f"MASTER_PORT={given['MASTER_PORT']}: is a port from 1 to 65535")
    return port


def _refuse_mpi(given: Mapping[str, str]) -> None:
    """Raise an error in one of several processes of mpirun, unless torch's variables are set."""
    if "WORLD_SIZE" in given:
        return
    for size, rank in _MPI:
        if (_whole(given, size) or 1) > 1 and rank in given:
            raise ValueError(
                f"mpirun has started {given[size]} processes ({size}={given[size]}, "
                f"{rank}={given[rank]}); fastmoco does not use MPI: for several processes, {_HOW}; "
                f"to train in this process alone, unset {size}"
            )


def _srun_tasks(given: Mapping[str, str]) -> int:
    return _whole(given, _tasks_variable(given)) or 1


def _tasks_variable(given: Mapping[str, str]) -> str:
    """The variable that counts the tasks of srun: of the step, else of the job."""
    of_step = "SLURM_STEP_NUM_TASKS"
    return of_step if _whole(given, of_step) else "SLURM_NTASKS"


def _is_srun_task(given: Mapping[str, str]) -> bool:
    """Whether srun has started this process as one of several, and nothing else has given it a
    rank.

    The shell of a batch script has SLURM_PROCID=0 and SLURM_NTASKS too, but is in no step.

    Raises:
        ValueError: for another rank than 0 outside of a step.
    """
    if "SLURM_PROCID" not in given or "RANK" in given or _srun_tasks(given) < 2:
        return False
    rank = _whole(given, "SLURM_PROCID")
    if "SLURM_STEP_ID" not in given and rank != 0:
        raise ValueError(
            f"SLURM_PROCID={rank} and SLURM_NTASKS={_srun_tasks(given)} are set, but not "
            f"SLURM_STEP_ID, which srun sets: for several processes, {_HOW}; to train in this "
            "process alone, unset SLURM_PROCID"
        )
    return "SLURM_STEP_ID" in given


def _by_srun(given: Mapping[str, str]) -> Launched:
    """One of several tasks of srun. The ranks meet on the first machine of the step.

    MASTER_ADDR, MASTER_PORT and WORLD_SIZE of the job script are used if they are set.
    """
    rank = _whole(given, "SLURM_PROCID") or 0
    tasks = _srun_tasks(given)
    _require_processes(_tasks_variable(given), tasks)
    world_size = _whole(given, "WORLD_SIZE") or tasks
    if world_size != tasks:
        raise ValueError(
            f"WORLD_SIZE={world_size} is set, but srun has started {tasks} tasks; unset WORLD_SIZE"
        )
    if rank >= tasks:
        raise ValueError(f"SLURM_PROCID={rank} and SLURM_NTASKS={tasks}: ranks go to {tasks - 1}")
    here = given.get("SLURM_STEP_TASKS_PER_NODE") or given.get("SLURM_TASKS_PER_NODE", "1")
    counts = tasks_per_node(here)
    node = _whole(given, "SLURM_NODEID") or 0
    return Launched(
        rank=rank,
        world_size=tasks,
        local_rank=_whole(given, "SLURM_LOCALID") or 0,
        local_world_size=counts[node] if node < len(counts) else counts[0],
        address=_address(given) if "MASTER_ADDR" in given else _first_address(given),
        port=_port(given) if "MASTER_PORT" in given else _port_of_step(given),
    )


def _port_of_step(given: Mapping[str, str]) -> int:
    """A port for this step only, because several may share a machine.

    Below 32768: Linux assigns higher ports to outgoing connections, so one of those may be in use
    when the store starts.
    """
    job = _whole(given, "SLURM_JOB_ID")
    if job is None:
        raise ValueError(
            f"SLURM_PROCID={given['SLURM_PROCID']} is set without SLURM_JOB_ID: for several "
            f"processes, {_HOW}; to train in this process alone, unset SLURM_PROCID"
        )
    return 15000 + (job + 101 * (_whole(given, "SLURM_STEP_ID") or 0)) % 17000


def _first_address(given: Mapping[str, str]) -> str:
    """A name or an address of the first machine of a step, which this machine can resolve.

    Raises:
        ValueError: if there is none.
    """
    nodes = given.get("SLURM_STEP_NODELIST") or given.get("SLURM_JOB_NODELIST", "")
    if not nodes:
        raise ValueError(
            f"SLURM_PROCID={given['SLURM_PROCID']} is set without SLURM_JOB_NODELIST: for several "
            f"processes, {_HOW}; to train in this process alone, unset SLURM_PROCID"
        )
    host = first_host(nodes)
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        address = _address_of_node(host)
        if address is None:
            raise ValueError(
                f"the name of the first node, {host}, does not resolve: set MASTER_ADDR "
                "to an address of it before srun"
            ) from None
        return address
    return host


def _address_of_node(node: str) -> str | None:
    """The address that SLURM uses for a node."""
    if shutil.which("scontrol") is None:
        return None
    done = subprocess.run(  # noqa: S603 - no shell; scontrol takes `node` as one word
        ["scontrol", "--oneliner", "show", "node", node],  # noqa: S607 - as the site has it
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    found = re.search(r"\bNodeAddr=(\S+)", done.stdout)
    return found[1] if found and found[1] != node and HOST.fullmatch(found[1]) else None


def first_host(nodes: str) -> str:
    """The first host of a list of SLURM, such as `n[01-04,7],login` or `r[0-1]n[0-3]`.

    Raises:
        ValueError: if it is no host name.
    """
    host = re.sub(r"\[([0-9]+)[^\]]*\]", r"\1", _up_to_comma(nodes))
    if not HOST.fullmatch(host):
        raise ValueError(
            f"SLURM_JOB_NODELIST={nodes!r}: host name {host!r} refused; "
            "letters, digits, ., _ and - only"
        )
    return host


def _up_to_comma(nodes: str) -> str:
    """The part before the first comma that is outside of brackets."""
    found = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)
    return found[0] if found else ""


def tasks_per_node(text: str) -> list[int]:
    """Tasks of every node, from SLURM's `8(x4),2`.

    Raises:
        ValueError: if the text has another form.
    """
    counts: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"([1-9][0-9]{0,6})(?:\(x([1-9][0-9]{0,6})\))?", part.strip())
        nodes = int(found[2] or 1) if found else 0
        if found is None or len(counts) + nodes > MOST_PROCESSES:
            raise ValueError(f"SLURM_TASKS_PER_NODE={text!r}: has another form than 8(x4),2")
        counts += [int(found[1])] * nodes
    return counts
