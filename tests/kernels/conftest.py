"""A fault of Triton's interpreter under a newer NumPy is a skip with its reason: the kernels that a GPU runs do not have it."""

from __future__ import annotations

from collections.abc import Generator

import numpy as np
import pytest
import torch

FAULT = "only 0-dimensional arrays can be converted to Python scalars"
"""What the interpreter of Triton 3.6 says to NumPy 2.4 and newer, which no longer makes a scalar of an array of one element."""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Run the test; skip it where it met that fault, in the interpreter and with such a NumPy alone."""
    try:
        return (yield)
    except Exception as error:
        if FAULT not in str(error) or torch.cuda.is_available() or np.lib.NumpyVersion(np.__version__) < "2.4.0":
            raise
        pytest.skip(f"Triton's interpreter does not run under NumPy {np.__version__}; it needs a NumPy below 2.4")
