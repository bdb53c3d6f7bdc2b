"""Every case, by name."""

from __future__ import annotations

from benchmarks.case import case_of
from benchmarks.cases import (
    adamw_ema,
    attention,
    checkpoint_stall,
    cut_views,
    ema,
    end_to_end,
    equality,
    fused_block,
    growth,
    info_nce,
    knn,
    large_batch,
    learning,
    loader,
    method_costs,
    methods,
    multi_crop,
    photographs,
    residual_norm,
    ring,
    scale,
    soft_cross_entropy,
    time_to_accuracy,
    train_step,
    train_vs_synthetic,
    transfers,
    view_color,
)

CASES = {
    module.NAME: case_of(module)
    for module in (
        adamw_ema,
        attention,
        checkpoint_stall,
        cut_views,
        ema,
        end_to_end,
        equality,
        fused_block,
        growth,
        info_nce,
        knn,
        large_batch,
        learning,
        loader,
        method_costs,
        methods,
        multi_crop,
        photographs,
        residual_norm,
        ring,
        scale,
        soft_cross_entropy,
        time_to_accuracy,
        train_step,
        train_vs_synthetic,
        transfers,
        view_color,
    )
}
