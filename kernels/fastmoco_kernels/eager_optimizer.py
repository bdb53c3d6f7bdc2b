"""A base of optimizers that do not import torch._dynamo.

torch decorates some methods of its optimizers so that torch.compile leaves them alone. The first
call of a decorated method, one from every constructor, imports torch._dynamo, which takes as long
as half of the import of torch. Only a process that compiles needs it.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any, TypeVar

from torch.optim.optimizer import Optimizer

Method = TypeVar("Method", bound=Callable[..., Any])


def without_decorators(method: Method) -> Method:
    """A method of torch as it is written, below its decorators."""
    plain: Method = inspect.unwrap(method)
    return plain


def _suited(method: Method) -> Method:
    """The decorated method once torch._dynamo is imported, since a graph may contain the call;
    before that the method below the decorators."""
    return method if "torch._dynamo" in sys.modules else without_decorators(method)


class EagerOptimizer(Optimizer):
    """A torch optimizer that is built, saved, loaded and cleared without torch._dynamo.

    It behaves as `torch.optim.Optimizer` in every other respect. `step` belongs to the subclass.
    """

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in every torch optimizer."""
        _suited(Optimizer.add_param_group)(self, param_group)

    def state_dict(self) -> dict[str, Any]:
        """As in every torch optimizer."""
        return _suited(Optimizer.state_dict)(self)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in every torch optimizer."""
        _suited(Optimizer.load_state_dict)(self, state_dict)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in every torch optimizer."""
        _suited(Optimizer.zero_grad)(self, set_to_none)
