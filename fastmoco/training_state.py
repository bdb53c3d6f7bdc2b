"""Everything a run is, as named tensors and JSON; and a run made from them again.

Tensors: ``model.*`` (encoder, twin and predictor with their BatchNorm buffers), ``optimizer.*`` by parameter name, ``rng.*``.
The data need nothing but the step.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fastmoco.checkpoint import flatten_optimizer, restore_optimizer
from fastmoco.errors import RunError


def collect(objective: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Every tensor of the run's state, by name; none is copied."""
    tensors = {f"model.{name}": tensor for name, tensor in objective.state_dict().items()}
    tensors |= flatten_optimizer(optimizer, objective.named_parameters())
    tensors["rng.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["rng.cuda"] = torch.cuda.get_rng_state()
    return tensors


def restore(objective: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put a collected state back, in place.

    Raises:
        RuntimeError: if a tensor is missing, left over or of another shape.
    """
    restore_model(objective, tensors)
    restore_optimizer(optimizer, objective.named_parameters(), tensors)
    torch.set_rng_state(tensors["rng.cpu"].cpu())
    if torch.cuda.is_available() and "rng.cuda" in tensors:
        torch.cuda.set_rng_state(tensors["rng.cuda"].cpu())


def restore_model(objective: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put encoder, twin and predictor back, in place.

    Raises:
        RuntimeError: if a tensor is missing, left over or of another shape.
    """
    model = {name.removeprefix("model."): tensor for name, tensor in tensors.items() if name.startswith("model.")}
    objective.load_state_dict(model, strict=True)


def require_finite(tensors: Mapping[str, Tensor]) -> None:
    """Refuse to save a state that no run could go on from; the checkpoints before it stay.

    Raises:
        RunError: naming the first tensor with NaN or infinity.
    """
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise RunError(
                f"{name} is not finite: this state is not saved, and the checkpoints before it are kept. "
                "Continue from them with a lower --optim.lr or a longer --optim.warmup-epochs in a new --out"
            )
