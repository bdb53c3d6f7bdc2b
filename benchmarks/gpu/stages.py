"""The stages as data: their order, time limits, rows, and small shapes for a dry run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Row:
    """A benchmark case with the options of one figure."""

    name: str
    """Name in results and goals."""
    case: str
    op: str
    """The op whose tests gate this row."""
    options: tuple[str, ...] = ()
    dry: tuple[str, ...] = ()
    """Options of the dry run, after the others."""
    needs: str = ""
    """A module that the row needs."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One process with one limit."""

    name: str
    run: str
    """"a" or "b"."""
    limit: float
    """Limit in seconds."""
    module: str = "benchmarks.gpu.rows"
    rows: tuple[Row, ...] = ()
    ops: tuple[str, ...] = ()
    """Ops of a stage without rows; empty: it runs for every `ONLY`."""


_SMALL_STEP = (
    *(
        "recipe=quickstart_digits",
        "batch=16",
        "chunk=none",
        "rounds=1",
        "steps=1",
        "checked=4",
        "compile=0",
    ),
    *("profile=0", "processes=0"),
)
_SMALL_SWEEP = ("width=16", "depth=1", "hidden=16", "rounds=1")
_SMALL_LOSS = ("rows=64", "keys=96", "dim=32", "rounds=1", "compile=0")
_SMALL_ATTENTION = (
    "B=2",
    "A=2",
    "L=17",
    "M=17",
    "rounds=1",
    "dtype=fp32",
    "subject=sdpa",
    "compile=0",
)
_STEP = ("sides=fastmoco", "processes=1", "rounds=3")

ENVIRONMENT = Stage(name="env", run="a", limit=90, module="benchmarks.gpu.environment")
SMOKE = Stage(
    name="smoke",
    run="a",
    limit=150,
    module="benchmarks.gpu.smoke",
    ops=(
        "info_nce",
        "attention",
        "ema",
        "adamw_ema",
        "lars",
        "blur",
        "view_color",
        "residual_norm",
        "soft_cross_entropy",
        "fused_block",
        "gelu_bias",
        "split_qkv",
        "cut_views",
        "step",
    ),
)
CEILINGS = Stage(name="ceilings", run="a", limit=60, module="benchmarks.gpu.ceilings")
STEP_1024 = Stage(
    name="vit_s_1024",
    run="a",
    limit=150,
    rows=(
        Row(
            name="ViT-S 1024 compiled",
            case="train_step",
            op="step",
            options=("batch=1024", "compile=1", "profile=1", "steps=4", *_STEP),
            dry=(*_SMALL_STEP, "processes=1", "profile=1"),
        ),
        Row(
            name="ViT-S 1024 eager",
            case="train_step",
            op="step",
            options=("batch=1024", "compile=0", "profile=1", "steps=4", *_STEP),
            dry=_SMALL_STEP,
        ),
    ),
)
TESTS = Stage(name="tests", run="a", limit=150, module="benchmarks.gpu.kernel_tests")
LOSS = Stage(
    name="loss",
    run="b",
    limit=110,
    rows=tuple(
        Row(
            name=f"loss {shape}",
            case="info_nce",
            op="info_nce",
            options=("directions=2", *options),
            dry=_SMALL_LOSS,
        )
        for shape, options in (
            ("16384", ("rows=16384",)),
            ("4096", ("rows=4096", "compile=0")),
            ("512 x 4096", ("rows=512", "keys=4096", "compile=0")),
            ("65536", ("rows=65536", "compile=0", "rounds=3")),
        )
    ),
)
SWEEPS = Stage(
    name="sweeps",
    run="b",
    limit=60,
    rows=(
        Row(name="AdamW ViT-S", case="adamw_ema", op="adamw_ema", dry=_SMALL_SWEEP),
        Row(
            name="AdamW ViT-B",
            case="adamw_ema",
            op="adamw_ema",
            options=("width=768",),
            dry=_SMALL_SWEEP,
        ),
        Row(name="EMA ViT-S", case="ema", op="ema", dry=_SMALL_SWEEP),
    ),
)
ATTENTION = Stage(
    name="attention",
    run="b",
    limit=90,
    rows=(
        Row(
            name="attention d=32",
            case="attention",
            op="attention",
            options=("d=32",),
            dry=_SMALL_ATTENTION,
        ),
        Row(
            name="attention d=64",
            case="attention",
            op="attention",
            options=("d=64", "A=6"),
            dry=_SMALL_ATTENTION,
        ),
        Row(
            name="attention d=64, flash-attn 4",
            case="attention",
            op="attention",
            options=("d=64", "A=6", "fa4=1", "compile=0"),
            dry=_SMALL_ATTENTION,
            needs="flash_attn",
        ),
    ),
)
STEP_S = Stage(
    name="vit_s",
    run="b",
    limit=130,
    rows=(
        Row(
            name="ViT-S 4096",
            case="train_step",
            op="step",
            options=("compile=1", "steps=2", *_STEP),
            dry=_SMALL_STEP,
        ),
    ),
)
STEP_B = Stage(
    name="vit_b",
    run="b",
    limit=210,
    rows=(
        Row(
            name="ViT-B 4096",
            case="train_step",
            op="step",
            options=("recipe=vit_b16_e300_b4096", "compile=1", "steps=1", *_STEP),
            dry=_SMALL_STEP,
        ),
    ),
)
FUSED = Stage(
    name="fused",
    run="b",
    limit=210,
    rows=(
        Row(
            name="ViT-S 4096 fused",
            case="train_step",
            op="step",
            options=("blocks=fused", "steps=2", *_STEP),
            dry=(*_SMALL_STEP, "blocks=fused"),
        ),
        Row(
            name="ViT-B 4096 fused",
            case="train_step",
            op="step",
            options=("recipe=vit_b16_e300_b4096", "blocks=fused", "steps=1", *_STEP),
            dry=(*_SMALL_STEP, "blocks=fused"),
        ),
        Row(
            name="ViT-B 4096 fused, momentum float8",
            case="train_step",
            op="step",
            options=(
                "recipe=vit_b16_e300_b4096",
                "blocks=fused",
                "momentum_linears=float8",
                "steps=1",
                *_STEP,
            ),
            dry=(*_SMALL_STEP, "blocks=fused", "momentum_linears=native"),  # float8 needs CUDA
        ),
        Row(
            name="block ViT-S",
            case="fused_block",
            op="fused_block",
            dry=("E=32", "heads=4", "tokens=5", "compile=0"),
        ),
        Row(
            name="residual_norm ViT-S",
            case="residual_norm",
            op="residual_norm",
            dry=("rows=64", "E=32", "compile=0", "rounds=1"),
        ),
        Row(
            name="soft cross-entropy DINO",
            case="soft_cross_entropy",
            op="soft_cross_entropy",
            dry=("views=3", "images=2", "outputs=64", "dim=16", "compile=0", "rounds=1"),
        ),
    ),
)
COLOR = Stage(
    name="color",
    run="b",
    limit=60,
    rows=(
        Row(
            name="color",
            case="view_color",
            op="view_color",
            options=("images=64", "rounds=2"),  # Pillow, which is timed too, is slow
            dry=("images=3", "size=32", "rounds=1"),
        ),
    ),
)
LOADER = Stage(
    name="loader",
    run="b",
    limit=120,
    rows=(
        Row(
            name="loader",
            case="loader",
            op="loader",
            options=(
                "device=gpu",
                "batch=4096",
                "threads=14",
                "batches=2",
                "rounds=3",
                "memory=5",
                "feeds=fastmoco",
            ),
            dry=("device=cpu", "size=32", "batch=8", "threads=1", "batches=1", "rounds=1"),
        ),
    ),
)
KNN = Stage(
    name="knn", run="b", limit=120, module="benchmarks.gpu.end_to_end", ops=("loader", "step")
)
PEERS = Stage(
    name="peers",
    run="b",
    limit=150,
    rows=tuple(
        Row(
            name=f"ViT-S 4096 peer, {side}",
            case="train_step",
            op="step",
            options=(f"sides={side}", "processes=1", "rounds=2", "steps=1"),
            dry=(*_SMALL_STEP, "sides=eager"),
        )
        for side in ("eager", "compiled")
    ),
)

STAGES = (
    *(ENVIRONMENT, SMOKE, CEILINGS, STEP_1024, TESTS),
    *(LOSS, SWEEPS, ATTENTION, STEP_S, FUSED, COLOR, STEP_B, LOADER, KNN, PEERS),
)
"""In the order of execution."""


def chosen(names: str) -> list[Stage]:
    """The stages of a comma-separated list, in the order of execution.

    Raises:
        ValueError: for a name that is neither a stage nor a run.
    """
    asked = [name.strip() for name in names.split(",") if name.strip()] or ["a", "b"]
    known = {"a", "b", *(stage.name for stage in STAGES)}
    for name in asked:
        if name not in known:
            raise ValueError(
                f"STAGES={names!r}: {name!r} is none of "
                f"{', '.join(['a', 'b', *(s.name for s in STAGES)])}"
            )
    return [stage for stage in STAGES if stage.name in asked or stage.run in asked]


def concerns(only: str, *texts: str) -> bool:
    """Whether `ONLY` selects one of these names; empty selects all."""
    return not only or any(only.lower() in text.lower() for text in texts)


def checked(only: str, op: str) -> bool:
    """Whether `ONLY` selects tests and checks of an op: it names the op or one of its rows."""
    rows = [row for stage in STAGES for row in stage.rows if row.op == op]
    return concerns(only, op) or any(concerns(only, row.name, row.case) for row in rows)


def within(stage: Stage, only: str) -> bool:
    """Whether `ONLY` selects any part of a stage."""
    if stage.rows:
        return any(concerns(only, row.name, row.op, row.case) for row in stage.rows)
    if stage.name == SMOKE.name:
        return any(checked(only, op) for op in stage.ops)
    return not stage.ops or concerns(only, *stage.ops)
