"""How many heaps glibc makes: by itself, when told, and in a process that loads data."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest

from fastmoco_pipelines import pack_digits
from fastmoco_pipelines.loading.arenas import ARENAS, share_arenas

pytestmark = pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "malloc_info"), reason="needs glibc's malloc"
)

COUNT = """
import ctypes, sys
libc = ctypes.CDLL(None)
libc.open_memstream.restype = ctypes.c_void_p

def arenas():
    text, size = ctypes.c_char_p(), ctypes.c_size_t()
    stream = ctypes.c_void_p(libc.open_memstream(ctypes.byref(text), ctypes.byref(size)))
    libc.malloc_info(0, stream)
    libc.fclose(stream)
    return text.value.count(b"<heap nr=")
"""
THREADS = """
import threading
from fastmoco_pipelines.loading.arenas import share_arenas
told = sys.argv[1] == "shared" and share_arenas()
barrier = threading.Barrier(12)

def hold():
    data = bytes(50_000)
    barrier.wait()
    assert data

threads = [threading.Thread(target=hold) for _ in range(12)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(told, arenas())
"""
LOADER = """
from fastmoco_pipelines import LoaderSpec, build_loader, moco_v3_views
view1, view2 = moco_v3_views(16)
spec = LoaderSpec(shards=sys.argv[1], views=(view1, view2), global_batch_size=16, threads=4)
for step in range(3):  # the threads of the second and third find arenas of their own too, if they may
    with build_loader(spec, start_step=step) as loader:
        loader.next()
print(arenas())
"""


def _run(program: str, argument: str, **environment: str) -> list[str]:
    ours = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("MALLOC_") and name != "GLIBC_TUNABLES"
    }
    command = [sys.executable, "-c", COUNT + program, argument]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
        env=ours | {"OMP_NUM_THREADS": "1"} | environment,
    )
    return done.stdout.split()


def test_threads_share_what_they_would_each_have():
    told, alone = _run(THREADS, "own")
    assert told == "False"
    assert int(alone) > ARENAS + 2  # else this test shows nothing
    assert _run(THREADS, "shared") == ["True", str(ARENAS)]


@pytest.mark.parametrize(
    "setting", [{"MALLOC_ARENA_MAX": "6"}, {"GLIBC_TUNABLES": "glibc.malloc.arena_max=6"}]
)
def test_a_users_own_limit_stays(setting: dict[str, str]):
    assert _run(THREADS, "shared", **setting) == ["False", "6"]


def test_a_loader_bounds_them(tmp_path):
    pack_digits(tmp_path)
    assert int(_run(LOADER, str(tmp_path / "train-*.tar"))[0]) <= ARENAS


def test_none_at_all_is_refused():
    with pytest.raises(ValueError, match="arenas=0"):
        share_arenas(0)


TRIMMED = """
import sys
from fastmoco_pipelines.loading.arenas import give_back_memory

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

class Node:
    pass

def cycles():
    for _ in range(200):
        one, other = Node(), Node()
        one.other, other.other = other, one
        one.data = [bytes(1000) for _ in range(500)]

import gc
gc.disable()
cycles()
before = resident()
if sys.argv[1] == "given":
    give_back_memory()
print(before - resident())
"""


@pytest.mark.parametrize("given", [True, False])
def test_what_dead_cycles_held_goes_back_to_the_system(given: bool) -> None:
    done = subprocess.run(
        [sys.executable, "-c", TRIMMED, "given" if given else "kept"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert (int(done.stdout) > 50e6) is given


FAULTS = """
import resource
from fastmoco_pipelines.loading.arenas import keep_freed_memory
kept = sys.argv[1] == "kept" and keep_freed_memory()
size = 64 << 20
b"x" * size
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    b"x" * size
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_a_freed_block_is_the_next_one_of_its_size() -> None:
    told, pages = _run(FAULTS, "returned")
    assert told == "False"
    assert int(pages) > 3 * (64 << 20) // 65536  # else this test shows nothing
    told, pages = _run(FAULTS, "kept")
    assert told == "True"
    assert int(pages) < 100


@pytest.mark.parametrize(
    "setting",
    [
        {"MALLOC_TRIM_THRESHOLD_": "131072"},
        {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=131072"},
    ],
)
def test_a_users_own_thresholds_stay(setting: dict[str, str]) -> None:
    told, pages = _run(FAULTS, "kept", **setting)
    assert told == "False"
    assert int(pages) > 1000
