"""Collect the state of a run as named tensors, and restore it.

Names: `model.*` (parameters and buffers of the objective), `optimizer.*` by parameter name, and
`rng.*` for random number generators. The data need only the step. Tensors may be sharded over
ranks, and each rank then reads and stores its own part.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fastmoco.checkpoint import Checkpoint, CheckpointError, flatten_optimizer, restore_optimizer
from fastmoco.distributed.mesh import group_rank
from fastmoco.errors import RunError
from fastmoco.optim.averaged import AveragedOptimizer
from fastmoco_kernels.tensors import local

MOST_RNG_BYTES = 1 << 20
"""The state of a generator has some kilobytes."""


def collect(objective: nn.Module, optimizer: AveragedOptimizer) -> dict[str, Tensor]:
    """Every tensor of the run's state by name.

    Only the states of random number generators are copies. Each rank has its own.
    """
    tensors = _model_tensors(objective, group_rank())
    tensors |= flatten_optimizer(optimizer.inner, objective.named_parameters())
    tensors[_of_rank("rng.cpu", group_rank())] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors[_of_rank("rng.cuda", group_rank())] = torch.cuda.get_rng_state()
    return tensors


def restore(
    objective: nn.Module,
    optimizer: AveragedOptimizer,
    checkpoint: Checkpoint,
    next_ema_momentum: float | None = None,
) -> None:
    """Restore a saved state in place; ranks and sharding may differ from those at the save.

    Ranks that did not exist at the save take the random numbers of rank 0. The momentum update ends
    a step, so saved averages are usually those that the next step needs. Two kinds of checkpoints
    are exceptions, and their averages are updated here: those of the last step of a run, and those
    of runs whose steps began with the update.

    Args:
        objective: of the run.
        optimizer: over the objective's trainable parameters.
        checkpoint: the state to restore.
        next_ema_momentum: momentum of the update that ends the checkpoint's last step; None without
            one.

    Raises:
        CheckpointError: if a tensor is missing, unknown or has another shape.
    """
    restore_model(objective, checkpoint)

    # State of the optimizer and of the random number generators, in one reading.
    parameters = dict(objective.named_parameters())
    moments = {
        name: _blank_like(name, entry, parameters)
        for name, entry in checkpoint.entries.items()
        if name.startswith("optimizer.")
    }
    rng = {}
    for kind in ("rng.cpu", "rng.cuda"):
        own = _of_rank(kind, group_rank())
        name = own if own in checkpoint.entries else kind
        if name in checkpoint.entries:
            _require_bytes(checkpoint, name)
            rng[name] = torch.empty_like(checkpoint.entries[name], device="cpu")
    checkpoint.read_into(moments | rng)

    # Put them in place.
    try:
        restore_optimizer(optimizer.inner, objective.named_parameters(), moments)
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint.path}: {error}. {checkpoint.cure}") from error
    for name, state in rng.items():
        try:
            if name.startswith("rng.cpu"):
                torch.set_rng_state(state)
            elif torch.cuda.is_available():
                torch.cuda.set_rng_state(state)
        except (RuntimeError, TypeError) as error:
            raise CheckpointError(
                f"{checkpoint.path}: {name} is no state of random numbers: {error}. "
                f"{checkpoint.cure}"
            ) from error

    if next_ema_momentum is not None and not checkpoint.state.get("twin_advanced", False):
        optimizer.move_averages(next_ema_momentum)


def restore_model(objective: nn.Module, checkpoint: Checkpoint) -> None:
    """Restore the objective's networks in place; they may be sharded.

    For buffers that differ between ranks, a rank that did not exist at the save takes those of rank
    0.

    Raises:
        CheckpointError: if a tensor is missing, unknown or has another shape.
    """
    own, first = (_model_tensors(objective, rank) for rank in (group_rank(), 0))
    targets = {
        name if name in checkpoint.entries else shared: tensor
        for (name, tensor), shared in zip(own.items(), first, strict=True)
    }

    # Refuse tensors that the model lacks, except for the per-rank buffers of other ranks.
    of_others = tuple(f"model.{name}.rank" for name in _per_rank(objective))
    known = targets.keys() | first.keys()
    beyond = [
        name
        for name in checkpoint.entries
        if name.startswith("model.")
        and name not in known
        and not (of_others and name.startswith(of_others))
    ]
    if beyond:
        raise CheckpointError(
            f"{checkpoint.path} contains {beyond[:5]}, which the model lacks. {checkpoint.cure}"
        )
    checkpoint.read_into(targets)


def _require_bytes(checkpoint: Checkpoint, name: str) -> None:
    """Refuse an entry that is no state of a random number generator, before it is read."""
    entry = checkpoint.entries[name]
    if entry.dtype != torch.uint8 or entry.dim() != 1 or entry.numel() > MOST_RNG_BYTES:
        raise CheckpointError(
            f"{checkpoint.path}: {name} is {entry.dtype} of shape {tuple(entry.shape)}, which is no "
            f"state of random numbers. {checkpoint.cure}"
        )


def _blank_like(name: str, entry: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
    """An empty tensor for an entry of the optimizer's state.

    It is sharded like the parameter if it has the parameter's shape.
    """
    parameter = parameters.get(name.removeprefix("optimizer.").rpartition(".")[0])
    if parameter is None or parameter.shape != entry.shape:
        return torch.empty_like(entry, device="cpu")
    return torch.empty_like(parameter.detach(), dtype=entry.dtype)


def _model_tensors(objective: nn.Module, rank: int) -> dict[str, Tensor]:
    """Parameters and buffers by the names under which a rank saves them."""
    own = _per_rank(objective)
    return {
        _of_rank(f"model.{name}", rank) if name in own else f"model.{name}": tensor
        for name, tensor in objective.state_dict().items()
    }


def _per_rank(objective: nn.Module) -> frozenset[str]:
    """Buffers that differ between ranks on purpose (`Objective.per_rank`)."""
    return getattr(objective, "per_rank", frozenset())


def _of_rank(kind: str, rank: int) -> str:
    return kind if rank == 0 else f"{kind}.rank{rank}"


def require_finite(tensors: Mapping[str, Tensor]) -> None:
    """Refuse to save a state from which no run could continue. Earlier checkpoints are kept.

    Raises:
        RunError: naming the first tensor with NaN or infinity.
    """
    for name, tensor in tensors.items():
        (own,) = local([tensor])
        if own.is_floating_point() and not bool(torch.isfinite(own).all()):
            raise RunError(
                f"{name} is not finite: this state is not saved, and earlier checkpoints are kept. "
                "Continue from them with a lower --optim.lr (and --allow optim.lr) or a longer "
                "--optim.warmup-epochs (and --allow optim.warmup_epochs)"
            )
