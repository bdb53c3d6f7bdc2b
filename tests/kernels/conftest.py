"""Triton's interpreter: tests that hit a fault of it under newer NumPy, which kernels on a GPU do
not have, are skipped, and it prepares its language once a launch.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch

FAULT = "only 0-dimensional arrays can be converted to Python scalars"
"""The error of Triton 3.6's interpreter under NumPy 2.4 and newer, which
refuses to convert arrays of one element."""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Run the test; skip it after that fault, in the interpreter and with such a NumPy only."""
    try:
        return (yield)
    except Exception as error:
        if (
            FAULT not in str(error)
            or torch.cuda.is_available()
            or np.lib.NumpyVersion(np.__version__) < "2.4.0"
        ):
            raise
        pytest.skip(
            f"Triton's interpreter does not run under NumPy {np.__version__}; it needs a NumPy below 2.4"
        )


@pytest.fixture(scope="module", autouse=True)
def language_prepared_once() -> Iterator[None]:
    """A launch in the interpreter replaces the functions of `triton.language`. So does each call of
    a function under `@triton.jit`, such as `tl.sum`, in a launch: it finds nothing left to replace,
    and its search takes up to a third of a test's time.
    """
    if torch.cuda.is_available() or find_spec("triton") is None:
        yield
        return
    import triton.language as tl
    from triton.runtime import interpreter

    prepare: Callable[[Any], Any] = interpreter._patch_lang
    nothing_to_restore: Callable[[], Any] = getattr(interpreter, "_LangPatchScope", lambda: None)

    def prepare_once(function: Any) -> Any:
        used = [m for m in function.__globals__.values() if m is tl or m is tl.core]
        if used and not any(tl.core.is_builtin(module.load) for module in used):
            return nothing_to_restore()
        return prepare(function)

    interpreter._patch_lang = prepare_once
    yield
    interpreter._patch_lang = prepare
