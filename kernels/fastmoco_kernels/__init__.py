"""Fused ops for contrastive pre-training, usable alone: they need torch, and nothing of the trainer.

>>> from fastmoco_kernels import info_nce_loss, ema_update_, attention
"""

from fastmoco_kernels.attention.op import attention
from fastmoco_kernels.ema.op import ema_update_
from fastmoco_kernels.info_nce.op import info_nce_loss

__all__ = ["attention", "ema_update_", "info_nce_loss"]
