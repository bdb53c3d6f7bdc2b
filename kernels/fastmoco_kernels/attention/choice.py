"""The choice of the attention backend: where each one runs, and which one `"auto"` means."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
from dataclasses import dataclass

import torch

from fastmoco_kernels.backends import choose_backend, require_triton

BACKENDS = (
    "sdpa",
    "flash",
    "cudnn",
    "efficient",
    "fa4",
    "xformers",
    "explicit",
    "triton",
    "reference",
)
"""`sdpa`: torch's scaled_dot_product_attention, which picks a kernel by itself; `flash`, `cudnn`,
`efficient`: that one of its kernels or an error; `fa4`: flash-attention 4 through torch's own
switch; `xformers`: its memory_efficient_attention; `explicit`: softmax(q k^T) v written out in the
inputs' dtype; `triton`: this package's kernels for short sequences; `reference`: written out in
float32 or wider.
"""
TRITON_HEAD_DIMS = (32, 64)
TRITON_LONGEST = 256
TRITON_DTYPES = (torch.bfloat16, torch.float16)
"""What the compiled kernels take. Triton's interpreter has no bf16 and takes float32 instead."""
_DTYPES = {
    "flash": (torch.float16, torch.bfloat16),
    "cudnn": (torch.float16, torch.bfloat16),
    "efficient": (torch.float16, torch.bfloat16, torch.float32),
    "fa4": (torch.float16, torch.bfloat16),
    "xformers": (torch.float16, torch.bfloat16, torch.float32),
    "triton": TRITON_DTYPES,
}
_XFORMERS = ((0, 0, 34), (0, 0, 36))
_log = logging.getLogger(__name__)
_checked: set[tuple[object, ...]] = set()
_said: set[AttentionChoice] = set()


@dataclass(frozen=True)
class AttentionChoice:
    """A backend and why it was taken.

    Attributes:
        backend: one of `BACKENDS`.
        reason: a clause for the log.
    """

    backend: str
    reason: str

    def __str__(self) -> str:
        return f"{self.backend} ({self.reason})"


def choose_attention(
    device: torch.device,
    dtype: torch.dtype,
    queries: int,
    keys: int,
    head_dim: int,
    *,
    backend: str = "auto",
) -> AttentionChoice:
    """The backend for one kind of call, and the reason.

    Args:
        device: where the tensors are.
        dtype: theirs, after autocast.
        queries: L, rows of queries.
        keys: M, rows of keys.
        head_dim: d.
        backend: `"auto"`, or one of `BACKENDS`, which is taken or refused with the reason.

    Raises:
        ValueError: naming the backend, what it lacks and the cure.

    Example:
        >>> import torch
        >>> choose_attention(torch.device("cpu"), torch.float32, 197, 197, 32).backend
        'sdpa'
    """
    name = choose_backend("attention", backend, default_backend(device, dtype), BACKENDS)
    if backend != "auto":
        _require(name, device, dtype, queries, keys, head_dim)
        return AttentionChoice(name, "asked for by name")
    if name == "explicit":
        return AttentionChoice(
            name, "bf16 on a CPU: written out it trains faster there than torch's own kernel"
        )
    if device.type != "cuda":
        return AttentionChoice(name, f"{_short(dtype)} on {device.type}: torch's own kernel")
    fault = triton_fault(device, dtype, queries, keys, head_dim)
    other = (
        f"triton cannot: {fault}"
        if fault
        else "triton fits, but has not been measured on a GPU and is opt-in"
    )
    return AttentionChoice(
        name, f"{_short(dtype)} on cuda: torch picks flash, cuDNN or memory-efficient; {other}"
    )


def default_backend(device: torch.device, dtype: torch.dtype) -> str:
    """What `"auto"` means: by device and dtype alone, so that a graph compiler can follow it."""
    return "explicit" if device.type == "cpu" and dtype == torch.bfloat16 else "sdpa"


def triton_fault(
    device: torch.device, dtype: torch.dtype, queries: int, keys: int, head_dim: int
) -> str:
    """Why the kernels for short sequences do not take a call; empty where they do."""
    if dtype == torch.float32 and device.type == "cuda":
        return (
            "float32 operands of a product are in registers, "
            "and one head's keys need more than a thread has"
        )
    if dtype not in (*TRITON_DTYPES, torch.float32):
        return f"{_short(dtype)} is none of {', '.join(map(_short, TRITON_DTYPES))}"
    if head_dim not in TRITON_HEAD_DIMS:
        return f"head dimension {head_dim} is none of {TRITON_HEAD_DIMS}"
    if max(queries, keys) > TRITON_LONGEST:
        return f"{queries} queries and {keys} keys, where at most {TRITON_LONGEST} fit on chip"
    return ""


def announce(
    device: torch.device, dtype: torch.dtype, queries: int, keys: int, head_dim: int, backend: str
) -> None:
    """Check a call as `choose_attention` does, once for each kind; log each choice once a process.

    Raises:
        ValueError: as `choose_attention`.
    """
    kind = (device, dtype, queries, keys, head_dim, backend)
    if kind in _checked:
        return
    choice = choose_attention(device, dtype, queries, keys, head_dim, backend=backend)
    _checked.add(kind)
    if choice not in _said:
        _said.add(choice)
        _log.info("attention: %s", choice)


def _require(
    name: str, device: torch.device, dtype: torch.dtype, queries: int, keys: int, head_dim: int
) -> None:
    """Refuse a backend that was asked for by name and cannot run."""
    if name not in _DTYPES:
        return
    if name == "triton":
        fault = triton_fault(device, dtype, queries, keys, head_dim)
        if fault:
            raise ValueError(
                f"attention: backend='triton': {fault}; backend='auto' takes any shape"
            )
        require_triton("attention", device)
        return
    if device.type != "cuda":
        raise ValueError(
            f"attention: backend={name!r} on {device}; it needs a CUDA device, "
            "or take backend='auto'"
        )
    if dtype not in _DTYPES[name]:
        raise ValueError(
            f"attention: backend={name!r} in {_short(dtype)}; "
            f"it takes {', '.join(map(_short, _DTYPES[name]))}"
        )
    if name == "fa4":
        require_fa4(torch.cuda.get_device_capability(device))
    if name == "xformers":
        require_xformers()


def require_fa4(capability: tuple[int, int]) -> None:
    """Refuse flash-attention 4 where it cannot run.

    Raises:
        ValueError: naming what is missing and the cure.
    """
    import torch.nn.attention

    if not hasattr(torch.nn.attention, "activate_flash_attention_impl"):
        raise ValueError(
            f"attention: backend='fa4', but torch {torch.__version__} has no "
            "torch.nn.attention.activate_flash_attention_impl; a newer torch has"
        )
    if capability[0] not in (9, 10):
        raise ValueError(
            f"attention: backend='fa4' on compute capability {capability}; it needs 9.x or 10.x"
        )
    if (
        importlib.util.find_spec("flash_attn") is None
        or importlib.util.find_spec("flash_attn.cute") is None
    ):
        raise ValueError(
            "attention: backend='fa4', but flash-attn 4 is not installed; pip install flash-attn-4"
        )


def require_xformers() -> None:
    """Refuse xformers where it is missing or of a version with another interface.

    Raises:
        ValueError: naming what is missing and the cure.
    """
    wanted = "pip install 'xformers>=0.0.34,<0.0.36'"
    try:
        version = importlib.metadata.version("xformers")
    except importlib.metadata.PackageNotFoundError:
        raise ValueError(
            f"attention: backend='xformers', but xformers is not installed; {wanted}"
        ) from None
    numbers = tuple(
        int("".join(c for c in part if c.isdigit()) or 0)
        for part in version.split("+")[0].split(".")[:3]
    )
    if not _XFORMERS[0] <= numbers < _XFORMERS[1]:
        raise ValueError(f"attention: backend='xformers', but xformers is {version}; {wanted}")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
