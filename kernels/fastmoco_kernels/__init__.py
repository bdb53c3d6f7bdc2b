"""Fused ops for contrastive pre-training. They need torch, but not the trainer.

>>> from fastmoco_kernels import info_nce_loss, ema_update_, attention
"""

import fastmoco_kernels._openmp  # noqa: F401 (before torch)
from fastmoco_kernels.adamw_ema.op import adamw_ema_step_
from fastmoco_kernels.adamw_ema.optimizer import AdamWEMA
from fastmoco_kernels.attention.choice import AttentionChoice, choose_attention
from fastmoco_kernels.attention.op import attention
from fastmoco_kernels.blur.op import gaussian_blur
from fastmoco_kernels.cut_views.op import cut_views
from fastmoco_kernels.ema.op import ema_update_
from fastmoco_kernels.gelu_bias.op import gelu
from fastmoco_kernels.info_nce.op import InfoNCEResult, info_nce_loss, symmetric_info_nce_loss
from fastmoco_kernels.info_nce.over_blocks import KeyBlock, info_nce_over_blocks
from fastmoco_kernels.info_nce.with_queue import queued_info_nce_loss
from fastmoco_kernels.lars.op import lars_step_
from fastmoco_kernels.lars.optimizer import LARS
from fastmoco_kernels.residual_norm.op import residual_norm
from fastmoco_kernels.soft_cross_entropy.of_pairs import soft_cross_entropy_of_pairs
from fastmoco_kernels.soft_cross_entropy.op import (
    soft_cross_entropy,
    soft_cross_entropy_of_rows,
)
from fastmoco_kernels.stacked_qkv.op import split_qkv
from fastmoco_kernels.view_color.op import view_color
from fastmoco_kernels.view_color.plan import ViewColorParameters

__all__ = [
    "LARS",
    "AdamWEMA",
    "AttentionChoice",
    "InfoNCEResult",
    "KeyBlock",
    "ViewColorParameters",
    "adamw_ema_step_",
    "attention",
    "choose_attention",
    "cut_views",
    "ema_update_",
    "gaussian_blur",
    "gelu",
    "info_nce_loss",
    "info_nce_over_blocks",
    "lars_step_",
    "queued_info_nce_loss",
    "residual_norm",
    "soft_cross_entropy",
    "soft_cross_entropy_of_pairs",
    "soft_cross_entropy_of_rows",
    "split_qkv",
    "symmetric_info_nce_loss",
    "view_color",
]
