"""Optimizers and schedules."""

from fastmoco.optim.adamw import build_adamw, build_adamw_ema
from fastmoco.optim.apex import build_apex
from fastmoco.optim.larc import build_larc
from fastmoco.optim.lars import build_lars, unless_named
from fastmoco.optim.schedule import (
    Steps,
    ema_momentum,
    learning_rate,
    run_learning_rate,
    simclr_steps,
)
from fastmoco.optim.sgd import build_sgd

__all__ = [
    "Steps",
    "build_adamw",
    "build_adamw_ema",
    "build_apex",
    "build_larc",
    "build_lars",
    "build_sgd",
    "ema_momentum",
    "learning_rate",
    "run_learning_rate",
    "simclr_steps",
    "unless_named",
]
