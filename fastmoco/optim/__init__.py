"""Optimizers and schedules."""

from fastmoco.optim.adamw import build_adamw
from fastmoco.optim.schedule import ema_momentum, learning_rate

__all__ = ["build_adamw", "ema_momentum", "learning_rate"]
