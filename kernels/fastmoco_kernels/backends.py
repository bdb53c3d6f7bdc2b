"""What every op shares: the choice of a backend, the arithmetic type, and where Triton can run."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os

import torch
from torch import Tensor

OLDEST_CAPABILITY = (8, 0)
"""Oldest compute capability that the Triton kernels are compiled and checked for."""
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What the Triton kernels read and write; float64 takes the plain path."""


def choose_backend(op: str, requested: str, default: str, available: tuple[str, ...]) -> str:
    """The backend an op runs on.

    Args:
        op: name of the op, for the error text.
        requested: `"auto"` or one of `available`.
        default: what `"auto"` means for this call.
        available: every backend of the op.

    Raises:
        ValueError: if `requested` is neither.
    """
    if requested == "auto":
        return default
    if requested not in available:
        raise ValueError(f"{op}: backend={requested!r} is none of {('auto', *available)}")
    return requested


def accumulation_dtype(tensor: Tensor) -> torch.dtype:
    """float64 stays; everything narrower is computed in float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def interpreting() -> bool:
    """Whether Triton's interpreter runs kernels on the CPU (`TRITON_INTERPRET=1`), for tests."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
"""Found once here: a graph compiler does not follow the search."""


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def triton_is_default(device: torch.device) -> bool:
    """Whether `backend="auto"` means Triton: a CUDA device new enough, and triton installed.

    False under the interpreter: it is asked for by name, in tests.
    """
    return (
        device.type == "cuda"
        and _TRITON_INSTALLED
        and not interpreting()
        and _capability(device) >= OLDEST_CAPABILITY
    )


def require_triton(op: str, device: torch.device) -> None:
    """Refuse `backend="triton"` where it cannot run, and name what is missing.

    Raises:
        ValueError: naming the op, the device and the cure.
    """
    if not _TRITON_INSTALLED:
        raise ValueError(
            f"{op}: backend='triton' but triton is not installed; pip install triton, "
            "or backend='auto'"
        )
    if device.type != "cuda" and not interpreting():
        raise ValueError(
            f"{op}: backend='triton' on {device}; Triton needs a CUDA device (or "
            "TRITON_INTERPRET=1, for tests)"
        )
    if device.type == "cuda" and _capability(device) < OLDEST_CAPABILITY:
        raise ValueError(
            f"{op}: backend='triton' on compute capability {_capability(device)}; "
            f"it needs {OLDEST_CAPABILITY} or newer"
        )


# What torch.compiler.assume_constant_result sets; calling that would import the compiler. Without it a
# graph compiler stops at the environment and leaves the capability in the graph.
_capability.__wrapped__._dynamo_marked_constant = True  # type: ignore[attr-defined]
triton_is_default._dynamo_marked_constant = True  # type: ignore[attr-defined]


def device_guard(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Make the tensor's CUDA device current: Triton launches on the current device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
