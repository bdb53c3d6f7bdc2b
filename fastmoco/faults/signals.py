"""The signals that ask a run to stop. Imports no torch: a run that starts has handlers from its
first second on."""

from __future__ import annotations

import signal

SIGNALS = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGHUP,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGXCPU,
)
"""All of them ask for the same. SIGHUP is sent when a terminal or an ssh connection is closed.
Schedulers send SIGUSR1, SIGUSR2 or SIGXCPU some time before the end of a job, for example SLURM by
`--signal=USR1@120`. SIGQUIT (Ctrl-\\) keeps its default effect and ends a process at once."""
PATIENCE_SECONDS = 2.0
"""A signal repeated within this time is the same request: schedulers and launchers both send it."""
INTERRUPT_PATIENCE_SECONDS = 0.5
"""The same for Ctrl-C without a launcher: only a person sends it."""


def to_handle() -> tuple[signal.Signals, ...]:
    """The signals that a run handles now: without SIGHUP if it is ignored, as under nohup."""
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        return tuple(number for number in SIGNALS if number != signal.SIGHUP)
    return SIGNALS
