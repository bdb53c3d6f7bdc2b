"""A short soak: two processes, bad images, dropped connections, and not one batch that differs."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.slow
def test_a_short_soak_differs_in_nothing():
    options = (
        "--minutes",
        "0.15",
        "--images",
        "400",
        "--batch",
        "16",
        "--size",
        "16",
        "--bad-share",
        "0.03",
    )
    command = [sys.executable, "-m", "benchmarks.soak", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    ranks = [line.split() for line in lines[1:3]]
    assert [row[2] for row in ranks] == ["0", "0"]  # batches that differ
    assert all(int(row[1]) > 5 for row in ranks), done.stdout
    assert sum(int(row[3]) for row in ranks) > 0  # places that were refilled
    assert "12 bad images" in done.stdout
    held = [line.split() for line in lines if len(line.split()) == 6 and line.split()[1].isdigit()]
    assert [row[:2] for row in held if row not in ranks] == [
        [r, at] for r in "01" for at in ("10", "25", "50", "75", "100")
    ]
    assert done.stdout.count("not judged, the run was too short; over the second half: ") == 2
