"""The test files that gate the rows of each op."""

from __future__ import annotations

TESTS_OF = {
    "info_nce": (
        "tests/kernels/test_info_nce.py",
        "tests/kernels/test_info_nce_blocks.py",
        "tests/kernels/test_info_nce_operator.py",
        "tests/kernels/test_info_nce_paths.py",
        "tests/kernels/test_info_nce_queue.py",
        "tests/kernels/test_tiles.py",
    ),
    "attention": (
        "tests/kernels/test_attention.py",
        "tests/kernels/test_attention_short.py",
        "tests/kernels/test_attention_choice.py",
        "tests/kernels/test_other_kernels.py",
    ),
    "ema": (
        "tests/kernels/test_ema.py",
        "tests/kernels/test_ema_triton.py",
        "tests/kernels/test_tensors.py",
    ),
    "adamw_ema": (
        "tests/kernels/test_adamw_ema.py",
        "tests/kernels/test_adamw_ema_optimizer.py",
        "tests/kernels/test_unchanged.py",
    ),
    "lars": ("tests/kernels/test_lars.py", "tests/kernels/test_lars_optimizer.py"),
    "view_color": (
        "tests/kernels/test_view_color.py",
        "tests/kernels/test_view_color_triton.py",
        "tests/kernels/test_blur.py",
    ),
    "residual_norm": ("tests/kernels/test_residual_norm*.py",),
    "soft_cross_entropy": ("tests/kernels/test_soft_cross_entropy*.py",),
    "fused_block": (
        "tests/kernels/test_fused_block.py",
        "tests/kernels/test_gelu_bias.py",
        "tests/kernels/test_split_qkv.py",
        "tests/fastmoco/models/test_fused_block.py",
    ),
    "cut_views": ("tests/kernels/test_cut_views.py",),
    "tuning": ("tests/kernels/test_tuning.py",),
    "step": (
        "tests/fastmoco/*/*_gpu.py",
        "tests/fastmoco/checkpoint/test_saver.py",
        "tests/fastmoco/evaluation/test_nearest.py",
        "tests/fastmoco/telemetry/test_histograms.py",
    ),
    "float8": (
        "tests/fastmoco/models/test_float8.py",
        "tests/fastmoco/models/test_float8_momentum.py",
    ),
}
"""The tests of each op, as patterns: rows of an op are timed if these passed,
independently of others."""
QUICK_TEST = ("tests/kernels/test_tensors.py",)
"""Tests for the dry run."""
