"""A process that waits for peers that may never come says so."""

from __future__ import annotations

import time

import pytest

from fastmoco.config.launched import Launched
from fastmoco.distributed import mesh

pytestmark = pytest.mark.faults


@pytest.mark.parametrize("seconds", [0.0, 60.0])
def test_a_long_wait_for_peers_is_reported(
    seconds: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(mesh, "WAIT_SECONDS", seconds)
    launched = Launched(rank=1, world_size=2, address="n1", port=29500)
    said, guard = "", time.monotonic() + 60
    with mesh._announced_wait(launched):
        while seconds == 0 and not said.endswith("\n") and time.monotonic() < guard:
            time.sleep(0.005)
            said += capsys.readouterr().err
    said += capsys.readouterr().err
    assert ("rank 1 of 2 waits for its peers at n1:29500" in said) == (seconds == 0)


def test_a_port_in_use_is_named_with_the_cure() -> None:
    launched = Launched(rank=0, world_size=2, address="n1", port=29500)
    taken = RuntimeError("The server socket has failed to listen: EADDRINUSE, address in use")
    assert "port 29500 of this machine is in use: set MASTER_PORT" in mesh._no_store(
        launched, taken
    )
    other = mesh._no_store(Launched(rank=1, world_size=2, address="n1", port=1), OSError("late\nx"))
    assert other.endswith("at n1:1 (MASTER_ADDR and MASTER_PORT): late")
