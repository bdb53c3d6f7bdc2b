"""Processes that are forked from one with DALI pipelines."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("nvidia.dali")

PROGRAM = """
import gc, os
import numpy as np
from nvidia.dali import fn, types
from fastmoco_pipelines.views.runtime import build_pipeline

def graph():
    return fn.external_source(name="x", dtype=types.UINT8, ndim=1)

gc.disable()
pipeline = build_pipeline(graph, batch_size=1, num_threads=1, device_id=None)
pipeline.feed_input("x", [np.zeros(1, np.uint8)])
pipeline.run()
cycle = [pipeline]
cycle.append(cycle)
del pipeline, cycle
child = os.fork()
if child == 0:
    gc.collect()
    os._exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
os._exit(0)
"""


def test_a_forked_process_does_not_end_the_pipelines_that_it_inherits() -> None:
    """It would wait for threads that only the parent has."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout == "7\n"
