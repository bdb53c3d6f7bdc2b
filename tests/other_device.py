"""A device that is not the host's, on a machine without one: torch's meta device under fake tensors.

What meets a tensor of the host there raises, and so does what reads a number. `Waits` collects the
rest of what would make the host of a GPU wait: copies from memory that is not pinned, or to the host.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = torch.device("meta")
MADE = ("tensor", "as_tensor", "asarray")
"""Functions of torch that copy numbers of Python to a device."""
READ = ("tolist", "cpu", "numpy")
"""Methods that copy to the host."""


class _Off(contextlib.nullcontext):  # type: ignore[type-arg]
    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()


@contextlib.contextmanager
def other_device() -> Iterator[FakeTensorMode]:
    """A context in which `DEVICE` can be used as a GPU is. There is no autocast on it."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with (
        mock.patch("torch.autocast", _Off),
        mock.patch("torch.is_autocast_enabled", return_value=False),
        mode,
    ):
        yield mode


def moved_(module: nn.Module, mode: FakeTensorMode) -> None:
    """Put all parameters and buffers there, in place; those that modules share stay shared."""
    known: dict[torch.Tensor, torch.Tensor] = {}

    def there(tensor: torch.Tensor) -> torch.Tensor:
        fake: torch.Tensor = mode.fake_tensor_converter.from_meta_and_device(
            mode, tensor.detach().to("meta"), DEVICE
        )
        return fake

    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is None:
                continue
            if parameter not in known:
                known[parameter] = nn.Parameter(there(parameter), parameter.requires_grad)
            part._parameters[name] = known[parameter]  # type: ignore[assignment]
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = there(buffer)


class Waits:
    """Collects what would wait for the device.

    Attributes:
        found: a name for each.
    """

    def __init__(self) -> None:
        self.found: list[str] = []
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Waits:
        self._stack.enter_context(_Calls(self.found))
        self._stack.enter_context(_Copies(self.found))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


class _Calls(TorchFunctionMode):
    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self._found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        on_device = name in MADE and kwargs.get("device") not in (None, "cpu", torch.device("cpu"))
        of_device = name in ("new_tensor", *READ) and args[0].device == DEVICE
        if on_device or of_device:
            self._found.append(name)
        return func(*args, **kwargs)


class _Copies(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, found: list[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func._overloadpacket.__name__
        if name in ("_to_copy", "copy_"):
            source = args[0] if name == "_to_copy" else args[1]
            target = kwargs.get("device") if name == "_to_copy" else args[0].device
            behind = kwargs.get("non_blocking") or (name == "copy_" and args[2:] == (True,))
            if target not in (None, source.device) and not (behind and target == DEVICE):
                self._found.append(f"copy from {source.device} to {target}")
        indexed = name in ("index", "index_put", "index_put_", "_index_put_impl_")
        if indexed and any(ids is not None and ids.device != args[0].device for ids in args[1]):
            self._found.append("indices of the host")
        return func(*args, **kwargs)
