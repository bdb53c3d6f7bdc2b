"""A SLURM cluster of two nodes on this machine, in a folder of its own.

It needs Debian's packages slurm-wlm and munge, and root, because slurmd starts tasks as their
users. Nothing outside of the folder is changed; the daemons end with `stop`.
"""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=1,sched_interval=2,bf_interval=2
ReturnToService=2
JobRequeue=1
KillWait=5
MinJobAge=300
GresTypes=gpu
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 RealMemory=1000
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 RealMemory=1000
PartitionName=all Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE
"""


def why_not() -> str:
    """Why a cluster cannot be started here; empty if it can."""
    missing = [name for name in PROGRAMS if _find(name) is None]
    if missing:
        return f"SLURM is not installed (no {', '.join(missing)}): apt-get install slurm-wlm munge"
    return "" if os.geteuid() == 0 else "slurmd needs root to start tasks"


def _find(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


class Cluster:
    """The daemons of a cluster; `start` it, then submit with the variables of `environment`.

    Args:
        folder: for configuration, sockets, state and logs; its path must be short, because sockets
            have at most about 100 characters.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._daemons: list[subprocess.Popen[bytes]] = []
        self.environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("SLURM_", "SBATCH_", "MUNGE"))
        }
        self.environment["SLURM_CONF"] = str(folder / "slurm.conf")

    def start(self) -> None:
        """Start munge, the controller and two nodes, and wait until the nodes are idle."""
        self.folder.chmod(0o755)  # munge refuses folders that others can write
        (self.folder / "state").mkdir()
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        socket_name = self.folder / "munge.socket"
        self._daemon(
            "munged",
            "--foreground",
            "--force",
            f"--socket={socket_name}",
            f"--key-file={key}",
            f"--log-file={self.folder}/munged.log",
            f"--pid-file={self.folder}/munged.pid",
            f"--seed-file={self.folder}/munged.seed",
        )
        self._wait(socket_name.exists, "munge has no socket")
        text = CONFIG.format(folder=self.folder, host=socket.gethostname(), ports=_free_ports(3))
        (self.folder / "slurm.conf").write_text(text)
        (self.folder / "cgroup.conf").write_text("CgroupAutomount=no\n")
        self._daemon("slurmctld", "-D")
        for node in ("n1", "n2"):
            self._daemon("slurmd", "-D", "-N", node)
        self._wait(lambda: self.run("sinfo", "-h", "-o", "%D %t") == "2 idle", "no idle nodes")

    def run(self, *command: str, check: bool = False, seconds: float = 60) -> str:
        """The output of a command of SLURM, without spaces at its ends."""
        done = subprocess.run(
            command,
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=seconds,
        )
        if check and done.returncode:
            raise AssertionError(f"{command}: {done.returncode}\n{done.stdout}{done.stderr}")
        return (done.stdout + done.stderr).strip()

    def stop(self) -> None:
        """End all jobs and daemons."""
        if self._daemons:
            self.run("scancel", "--full", "--user", "root")
            time.sleep(1)
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in self._daemons:
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()

    def logs(self) -> str:
        """The ends of all logs, for the message of a failed test."""
        texts = {path.name: path.read_text() for path in sorted(self.folder.glob("*.log"))}
        return "\n".join(f"== {name}\n{text[-3000:]}" for name, text in texts.items())

    def _daemon(self, name: str, *arguments: str) -> None:
        command: Sequence[str] = [_find(name) or name, *arguments]
        with (self.folder / f"{name}.out.log").open("ab") as log:
            self._daemons.append(
                subprocess.Popen(command, env=self.environment, stdout=log, stderr=log)
            )

    def _wait(self, condition, failed: str, seconds: float = 40) -> None:  # type: ignore[no-untyped-def]
        until = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < until, f"{failed}\n{self.logs()}"
            time.sleep(0.1)


def _free_ports(count: int) -> list[int]:
    """Ports that are free now, below those that Linux hands out."""
    found: list[int] = []
    for port in range(20000 + os.getpid() % 5000, 32000):
        with socket.socket() as one:
            try:
                one.bind(("127.0.0.1", port))
            except OSError:
                continue
        found.append(port)
        if len(found) == count:
            return found
    raise AssertionError("no free ports")
