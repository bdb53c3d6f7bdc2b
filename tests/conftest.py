"""Shared by every test: golden numbers, and NaN in uninitialised memory."""

from __future__ import annotations

import atexit
import gc
import os
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

gc.disable()  # see pytest_collection

import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = (
        "1"  # before any kernel is imported: Triton reads it where a kernel is defined
    )

# Under nohup, and in the background of a script, processes would inherit that these are ignored, and
# what they do at them could not be tested.
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

GOLDEN = Path(__file__).parent / "golden"
FIRST = (
    "faults/test_fault_table.py",
    "tests/test_launch.py",
    "objectives/test_conformance.py",
    "benchmarks/test_gpu.py",
    "benchmarks/test_method_table.py",
    "training/test_rollback.py",
    "training/test_resume_everywhere.py",
    "cli/test_tune.py",
    "planning/test_costs.py",
)
"""Files that take minutes. They are begun before the others: a worker takes a file as a whole, and the
last one would be alone with it."""


@pytest.fixture(scope="session")
def golden() -> Callable[[str], dict[str, np.ndarray]]:
    """Reads one golden archive by name; see tests/golden/README.md for every array."""

    def read(name: str) -> dict[str, np.ndarray]:
        with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as archive:
            return {key: archive[key] for key in archive.files}

    return read


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """The random numbers of a test, and of a fixture that it is the first to need, do not depend on
    the tests before it in this process.
    """
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    if torch.cuda.is_available():
        torch.manual_seed(0)
    else:  # which would keep a call with its stack for every kind of device that is not there
        torch.default_generator.manual_seed(0)


@pytest.fixture(autouse=True)
def torch_threads() -> Iterator[None]:
    """Threads that a run in this process takes are not left to later tests: beside another worker
    they wait for each other by spinning, which is 30 times slower.
    """
    before = torch.get_num_threads()
    yield
    if torch.get_num_threads() != before:
        torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def nan_poisoned_memory() -> Iterator[None]:
    """`torch.empty` gives NaN, so that code that does not write a value fails
    instead of passing by chance.
    """
    deterministic, fill = (
        torch.are_deterministic_algorithms_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = fill


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With a mark that few files have, only these are read: every worker would import all the
    others too.
    """
    mark = config.option.markexpr
    if mark not in ("gpu", "long", "faults") or collection_path.suffix != ".py":
        return None
    return True if f"mark.{mark}" not in collection_path.read_text() else None


def _place(item: pytest.Item) -> int:
    path = str(item.path)
    return next((place for place, end in enumerate(FIRST) if path.endswith(end)), len(FIRST))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files come first. GPU tests are skipped, and counted, without a CUDA device."""
    items.sort(key=_place)
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):  # keywords are also the names of folders
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """What is imported and collected stays to the end. Looking through it for garbage would take a
    third of the collection, and half a second at each `gc.collect()` of a test.
    """
    try:
        return (yield)
    finally:
        gc.collect()
        gc.freeze()
        gc.enable()
        atexit.register(gc.unfreeze)  # else Triton's library reports leaks


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """NumPy 2.5 refuses a conversion of loop bounds in the interpreter of Triton 3.6; compiled
    kernels do not have it.
    """
    try:
        return (yield)
    except Exception as error:
        if type(
            error
        ).__name__ == "InterpreterError" and "only 0-dimensional arrays can be converted" in str(
            error
        ):
            pytest.skip("this Triton's interpreter does not run under this NumPy")
        raise


@pytest.fixture(scope="session")
def digits(tmp_path_factory) -> tuple[str, str]:
    """Patterns of the training and the held-out shards; tests that need them
    are skipped if shards cannot be packed.
    """
    pytest.importorskip("webdataset", reason="webdataset is not installed")
    from fastmoco_pipelines import pack_digits

    return pack_digits(tmp_path_factory.mktemp("digits"), seed=0)
