"""The checkup: probes in processes of their own, a few at a time, each with a limit in seconds."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shlex
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import IO

from fastmoco.training.checkup.findings import MARK, Checkup, Finding
from fastmoco.training.checkup.packages import (
    DALI,
    MODULES,
    fastmoco_finding,
    installed,
    package_findings,
    pip_install,
    python_finding,
    reinstall,
    requirements,
)
from fastmoco.training.checkup.surroundings import MORE_MEMORY, surroundings, temporary_folder
from fastmoco_pipelines.processes import child_environment, python_command

MODULE = "fastmoco.training.checkup.probes"
IMPORTS = "fastmoco.training.checkup.imports"
AT_ONCE = 2
"""Probes that run beside each other: most import torch, which takes a core for seconds. One that the
system kills, as it does where memory is short, is tried again alone."""
_POLL_S = 0.02
_LAST_S = 5.0
_LAST_LINE = 300


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """What one process tries."""

    name: str
    """On its command line."""
    title: str
    """Of the finding if it fails."""
    module: str = ""
    """Without it, it is not tried; empty: always."""
    absent: str = ""
    """What is said then."""
    cure: str = ""
    """Where the probe itself fails."""
    install: str = ""
    """What pip installs if the module is missing."""
    needed: bool = False
    """Training cannot run if it fails."""
    variables: Mapping[str, str] = field(default_factory=dict)


def check_machine(
    *,
    limit_s: float,
    command: Sequence[str] | None = None,
    modules: Mapping[str, str] = MODULES,
) -> Checkup:
    """Look at this machine. Changes nothing: what probes write is in temporary folders, which are
    removed.

    Args:
        limit_s: seconds that one probe may take; it is ended then.
        command: what to run in place of the probes' module, for tests; the name of a probe and the
            device follow.
        modules: what is imported of each package; one that is not installed is not tried.
    """
    words = list(command or python_command(MODULE))
    findings = [python_finding(), fastmoco_finding(), *package_findings(), *surroundings()]
    if temporary_folder() is None:  # nothing can be tried: probes write there
        return Checkup(device="cpu", findings=tuple(findings))
    faults = list(_import_faults(modules, limit_s))
    cures = {fault.text: fault.cure for fault in faults}  # of all that fails for the same reason
    first = run_probes([_torch()], "cpu", words, limit_s=limit_s)["torch"]
    usable = [found for found in first if found.name.startswith("GPU ")]
    device = "cuda" if usable and usable[0].state != "broken" else "cpu"
    rest = [probe for probe in _others(device) if _there(probe)]
    if any(found.name == "torch" and found.state == "broken" for found in first):
        rest = []  # each would fail for the same reason
    ended = run_probes(rest, device, words, limit_s=limit_s)
    missing = [_missing(probe) for probe in _others(device) if not _there(probe)]
    tried = [*first, *(found for probe in rest for found in ended[probe.name])]
    absent = {found.name for found in findings if found.needed and found.state == "broken"}
    tried = [
        replace(found, cure=cures.get(found.text, found.cure))
        for found in tried
        if found.name not in absent  # else it is told already
    ]
    return Checkup(device=device, findings=(*findings, *faults, *tried, *missing))


def _import_faults(modules: Mapping[str, str], limit_s: float) -> Iterator[Finding]:
    """Packages that are installed and cannot be imported. One that fails for the reason of another one
    is not named."""
    words = {found.name: found.words for found in requirements() if not found.extra}
    probes = [
        Probe(name=module, title=name, install=words.get(name, name), needed=True)
        for name, module in modules.items()
        if not words or installed(name)
    ]
    ended = run_probes(probes, "cpu", python_command(IMPORTS), limit_s=limit_s)
    found = [finding for probe in probes for finding in ended[probe.name]]
    first = {finding.text: finding for finding in reversed(found)}
    yield from (finding for finding in found if finding is first[finding.text])


def _torch() -> Probe:
    bounds = next((found.words for found in requirements() if found.name == "torch"), "torch")
    cure = pip_install("--force-reinstall", bounds)
    return Probe(name="torch", title="torch", cure=cure, needed=True)


def _others(device: str) -> list[Probe]:
    """Everything but torch, for a device."""
    words = {found.name: found.words for found in requirements()}
    on_gpu = device == "cuda"
    engine = next(filter(installed, DALI.values()), "pillow")  # a CPU does without DALI
    decoder = (
        "python -m pip check names what does not fit; or decode on the CPU: --data.device cpu"
        if on_gpu
        else pip_install("--force-reinstall", words.get(engine, engine))
    )
    return [
        Probe(name="training", title="training", needed=True),
        Probe(name="decoder", title="decoder", cure=decoder, needed=True),
        Probe(name="c-part", title="C part", cure=reinstall(from_source=True)),
        Probe(
            name="triton",
            title="Triton",
            module="triton",
            absent="not installed; only GPUs use it, and torch for CUDA brings it along",
            cure="apt-get install gcc python3-dev" if on_gpu else "",
            variables={} if on_gpu else {"TRITON_INTERPRET": "1"},
        ),
        Probe(name="attention", title="attention", cure="--model.attention explicit"),
        Probe(
            name="collectives",
            title="NCCL" if on_gpu else "gloo",
        ),
        Probe(
            name="xformers",
            title="xformers",
            module="xformers",
            absent="not installed; only --model.attention xformers needs it",
        ),
        Probe(
            name="flash-attn",
            title="flash-attn",
            module="flash_attn",
            absent="not installed; only --model.attention fa4 needs it",
        ),
        Probe(
            name="apex",
            title="apex",
            module="apex",
            absent="not installed; only --optim.fused-backend apex and LAMB need it, and it is "
            "NVIDIA's: the apex of the package index is unrelated",
        ),
        Probe(
            name="torchao",
            title="torchao",
            module="torchao",
            absent="not installed; only --model.linears float8 needs it",
            install=words.get("torchao", ""),
        ),
        Probe(
            name="tensorboard",
            title="tensorboard",
            module="tensorboard",
            absent="not installed; without it runs write no files for TensorBoard",
            install=words.get("tensorboard", ""),
        ),
    ]


def _there(probe: Probe) -> bool:
    try:
        return not probe.module or importlib.util.find_spec(probe.module) is not None
    except (ImportError, ValueError):  # a finder fails: its probe says why
        return True


def _missing(probe: Probe) -> Finding:
    cure = pip_install(probe.install) if probe.install else ""
    return Finding(name=probe.title, state="absent", text=probe.absent, cure=cure)


@dataclass(slots=True)
class _Running:
    probe: Probe
    command: Sequence[str]
    process: subprocess.Popen[bytes]
    out: IO[bytes]
    error: IO[bytes]
    files: contextlib.ExitStack
    until: float


def run_probes(
    probes: Sequence[Probe], device: str, command: Sequence[str], *, limit_s: float
) -> dict[str, list[Finding]]:
    """Their findings, by name. Each has a session of its own: what it has started ends with it.

    Args:
        probes: to run.
        device: "cpu" or "cuda".
        command: the name of a probe and the device follow.
        limit_s: seconds for each.
    """
    waiting, running = list(probes), list[_Running]()
    ended: dict[str, list[Finding]] = {}
    alone: list[Probe] = []
    try:
        while waiting or running or alone:
            while waiting and len(running) < AT_ONCE:
                running.append(_start(waiting.pop(0), device, command, limit_s))
            if not running:
                running.append(_start(alone.pop(0), device, command, limit_s))
            for child in list(running):
                late = time.monotonic() > child.until
                if child.process.poll() is None and not late:
                    continue
                running.remove(child)
                again = child.process.poll() == -signal.SIGKILL and child.probe.name not in ended
                ended[child.probe.name] = list(_result(child, late=late, limit_s=limit_s))
                alone += [child.probe] if again else []
            time.sleep(_POLL_S)
    finally:
        for child in running:
            _end(child)
    return ended


def _start(probe: Probe, device: str, command: Sequence[str], limit_s: float) -> _Running:
    # Files, not pipes: a process that a probe leaves behind would keep a pipe open.
    files = contextlib.ExitStack()
    out = files.enter_context(tempfile.TemporaryFile())  # noqa: SIM115 - in `files`
    error = files.enter_context(tempfile.TemporaryFile())  # noqa: SIM115 - in `files`
    words = [*command, probe.name, device]
    process = subprocess.Popen(  # noqa: S603 - this interpreter and our own module
        words,
        stdin=subprocess.DEVNULL,
        stdout=out,
        stderr=error,
        env=child_environment({**os.environ, **probe.variables}),
        start_new_session=True,
    )
    return _Running(probe, words, process, out, error, files, time.monotonic() + limit_s)


def _end(child: _Running) -> None:
    """End a probe and all that it has started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.process.wait(_LAST_S)
    child.files.close()


def _result(child: _Running, *, late: bool, limit_s: float) -> Iterator[Finding]:
    """The findings that a probe has printed, or that it failed."""
    code = child.process.poll()
    texts = [_text(file) for file in (child.out, child.error)]
    _end(child)
    if code is None and late:
        yield _failed(child, f"did not end within {limit_s:g} s")
        return
    found = [line for line in texts[0].splitlines() if line.startswith(MARK)]
    if found:  # a library may crash at the exit of the process, after its work
        for fields in json.loads(found[-1].removeprefix(MARK)):
            yield Finding(**fields)
        return
    if code == -signal.SIGKILL:
        reason = "its process was killed (SIGKILL), as the system does where memory is short"
        yield replace(_failed(child, reason), cure=MORE_MEMORY)
        return
    if code is not None and code < 0:
        yield _failed(child, f"its process died of {_signal(-code)}")
        return
    lines = [line.strip() for line in (texts[1] or texts[0]).splitlines() if line.strip()]
    yield _failed(child, lines[-1][:_LAST_LINE] if lines else f"ended with code {code}")


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _failed(child: _Running, reason: str) -> Finding:
    probe = child.probe
    cure = probe.cure or (pip_install("--force-reinstall", probe.install) if probe.install else "")
    if not cure:
        cure = f"for the whole error: {shlex.join(map(str, child.command))}"
    return Finding(name=probe.title, state="broken", text=reason, cure=cure, needed=probe.needed)
