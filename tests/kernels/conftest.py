"""Skip tests that hit a fault of Triton's interpreter under newer NumPy, which
kernels on a GPU do not have.
"""

from __future__ import annotations

from collections.abc import Generator

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
