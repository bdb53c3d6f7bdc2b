"""Every way into the packages sets how long OpenMP's threads spin before libgomp reads it; a user's
own setting stays."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastmoco_pipelines import OPENMP_SPINS as SPINS
from fastmoco_pipelines import limit_spinning

WAYS = {
    "the trainer": "import fastmoco",
    "a module of the trainer": "import fastmoco.training.trainer",
    "the pipelines": "import fastmoco_pipelines",
    "a loader": "from fastmoco_pipelines import build_loader",
    "the kernels": "import fastmoco_kernels",
    "a module of the kernels": "import fastmoco_kernels.ema.op",
    "the benchmarks": "import benchmarks.command",
    "the command": "import runpy, sys; sys.argv = ['fastmoco', '--version'];"
    "\ntry: runpy.run_module('fastmoco', run_name='__main__')\nexcept SystemExit: pass",
}
FIRST = Path(torch.__file__).parent / "lib" / "libtorch_global_deps.so"
"""What an import of torch loads first, and libgomp with it; a test compares both."""
AT_TORCH = f"""
import ctypes, os, sys

class Torch:
    def find_spec(self, name, *_):
        if name == "torch":
            ctypes.CDLL({str(FIRST)!r})
            os._exit(0)

sys.meta_path.insert(0, Torch())
"""
"""Ends a process where it begins to import torch, which would take a second more."""
NAMES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")


@functools.cache
def shown_by_libgomp(way: str, **settings: str) -> dict[str, str]:
    """What libgomp has read, by its own report, after an import up to the start of that of torch."""
    environment = {name: value for name, value in os.environ.items() if name not in NAMES}
    done = subprocess.run(
        [sys.executable, "-c", f"{way}\nimport ctypes; ctypes.CDLL({str(FIRST)!r})"],
        env=environment | {"OMP_DISPLAY_ENV": "VERBOSE"} | settings,
        capture_output=True,
        text=True,
        check=True,
    )
    lines = [line.partition(" = ") for line in done.stderr.splitlines() if " = " in line]
    return {name.split()[-1]: value.strip("'") for name, _, value in lines}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_every_way_in_sets_it_before_torch_is_imported(way: str) -> None:
    assert shown_by_libgomp(AT_TORCH + way)["GOMP_SPINCOUNT"] == SPINS


def test_torch_alone_spins_longer() -> None:
    alone = shown_by_libgomp("import torch")
    assert int(alone["GOMP_SPINCOUNT"]) > 10 * int(SPINS)
    assert alone == shown_by_libgomp("")


@pytest.mark.parametrize("way", [WAYS["the trainer"], WAYS["the kernels"]])
def test_a_users_own_setting_stays(way: str) -> None:
    way = AT_TORCH + way
    assert shown_by_libgomp(way, GOMP_SPINCOUNT="77")["GOMP_SPINCOUNT"] == "77"
    active = shown_by_libgomp(way, OMP_WAIT_POLICY="active")
    assert (
        active["GOMP_SPINCOUNT"] == shown_by_libgomp("", OMP_WAIT_POLICY="active")["GOMP_SPINCOUNT"]
    )
    assert active["OMP_WAIT_POLICY"] == "ACTIVE"


def test_nothing_else_changes() -> None:
    environment = {"HOME": "/home/user"}
    limit_spinning(environment)
    assert environment == {"HOME": "/home/user", "GOMP_SPINCOUNT": SPINS}
    environment = {"OMP_WAIT_POLICY": ""}
    limit_spinning(environment)
    assert environment == {"OMP_WAIT_POLICY": ""}
