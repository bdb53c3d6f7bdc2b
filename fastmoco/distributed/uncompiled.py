"""DDP without torch._dynamo, as long as nothing in the process is compiled.

DDP asks torch's compiler how gradients are averaged in compiled blocks, and has it leave one method
alone. The first question imports torch._dynamo, which takes as long as half of the import of torch.
Only a process that compiles needs the answers.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch._compile import _disable_dynamo
from torch.nn.parallel import DistributedDataParallel

COMPILER = "torch._dynamo"
ANSWER = "__dynamo_disable"
"""Where `torch._disable_dynamo` keeps what it calls."""


class _Absent(ModuleType):
    """A module that is yet to be imported, and is at the first question without an answer here."""

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module(self.__name__), name)


@contextmanager
def spared_compiler() -> Iterator[None]:
    """Build DDP in this context, and torch._dynamo is imported neither here nor by its forwards.

    Nothing changes in a process that has imported it, and nothing remains once one does.
    """
    if COMPILER in sys.modules:
        yield
        return
    _leave_alone(DistributedDataParallel._inside_ddp_forward)
    absent, utils = _Absent(COMPILER), _Absent(f"{COMPILER}.utils")
    # The mode of torch, which nobody has changed.
    vars(utils)["get_optimize_ddp_mode"] = lambda: "ddp_optimizer"
    vars(absent)["utils"] = utils
    vars(torch)["_dynamo"] = absent
    try:
        yield
    finally:
        if vars(torch).get("_dynamo") is absent:  # its import replaces this
            del vars(torch)["_dynamo"]


def _leave_alone(function: Any) -> None:
    """Let the decorator of a function call it without the compiler, until that is imported."""
    decorator = function
    while getattr(decorator, "__code__", None) is not DECORATOR:
        if not hasattr(decorator, "__wrapped__"):
            return  # this torch does not decorate it
        decorator = decorator.__wrapped__
    plain = decorator.__wrapped__

    def call(*args: Any, **options: Any) -> Any:
        if COMPILER not in sys.modules:
            return plain(*args, **options)
        if getattr(plain, ANSWER, None) is call:
            delattr(plain, ANSWER)
        return decorator(*args, **options)

    if not hasattr(plain, ANSWER):
        setattr(plain, ANSWER, call)


DECORATOR = getattr(_disable_dynamo(lambda: None), "__code__", None)
"""The code of everything that `torch._disable_dynamo` decorates."""
