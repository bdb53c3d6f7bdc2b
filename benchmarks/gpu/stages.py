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
    ahead: tuple[str, ...] | None = None
    """Options, after the others, of a short run that compiles what the row runs; None: none."""


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
    words: tuple[str, ...] = ()
    """Further arguments of the module."""
    limited: bool = False
    """The module is told its limit, and ends its work by itself."""
    beside: bool = False
    """It times nothing, so it runs beside its neighbours of this kind."""


@dataclass(frozen=True, kw_only=True)
class Trunk:
    """The trunk of a training step that is compiled ahead.

    Attributes:
        name: of the model.
        recipe: of the step.
        chunk: images of a micro-batch, as the planner chooses it.
        budget: share of its activations that a compiled block keeps.
        run: as of the stage that runs it.
    """

    name: str
    recipe: str
    run: str = "a"
    chunk: int = 128
    budget: float = 0.9


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
_SHORT = ("rounds=1",)
_CHUNKS = ("chunk=128", "activation_budget=0.9")
"""As the planner chooses for 4096 images, so that the graphs are the same."""
_PROFILED = ("batch=1024", *_CHUNKS, "profile=1", "steps=4")
_VIT_B, _VIT_L = "recipe=vit_b16_e300_b4096", "recipe=vit_l16_e300_b4096"

TRUNKS = (
    Trunk(name="ViT-S", recipe="vit_s16_e300_b4096"),
    Trunk(name="ViT-B", recipe="vit_b16_e300_b4096"),
    Trunk(name="ViT-L", recipe="vit_l16_e300_b4096", run="b"),
)
"""Each is compiled by a process of its own."""

ENVIRONMENT = Stage(name="env", run="a", limit=90, module="benchmarks.gpu.environment")
SMOKE = Stage(
    name="smoke",
    run="a",
    limit=110,
    module="benchmarks.gpu.smoke",
    beside=True,
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
TESTS = Stage(
    name="tests",
    run="a",
    limit=110,
    module="benchmarks.gpu.kernel_tests",
    limited=True,
    beside=True,
)
COMPILE, COMPILE_B = (
    Stage(
        name=name,
        run=run,
        limit=110,
        module="benchmarks.gpu.compile_ahead",
        words=("--run", run),
        limited=True,
        beside=True,
    )
    for name, run in (("compile", "a"), ("compile_b", "b"))
)
CEILINGS = Stage(name="ceilings", run="a", limit=30, module="benchmarks.gpu.ceilings")
PROFILE = Stage(
    name="profile",
    run="a",
    limit=100,
    rows=(
        Row(
            name="ViT-S 1024 compiled",
            case="train_step",
            op="step",
            options=(*_PROFILED, "compile=1", *_STEP),
            dry=(*_SMALL_STEP, "processes=1", "profile=1"),
        ),
        Row(
            name="ViT-S 1024 fused",
            case="train_step",
            op="step",
            options=(*_PROFILED, "blocks=fused", *_STEP),
            dry=(*_SMALL_STEP, "blocks=fused"),
        ),
    ),
)
STEP_S = Stage(
    name="vit_s",
    run="a",
    limit=90,
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
LOSS = Stage(
    name="loss",
    run="a",
    limit=80,
    rows=tuple(
        Row(
            name=f"loss {shape}",
            case="info_nce",
            op="info_nce",
            options=("directions=2", *options),
            dry=_SMALL_LOSS,
            ahead=None if shape == "65536" else _SHORT,  # others need memory beside it
        )
        for shape, options in (
            ("16384", ("rows=16384",)),
            ("4096", ("rows=4096", "compile=0")),
            ("512 x 4096", ("rows=512", "keys=4096", "compile=0")),
            ("65536", ("rows=65536", "compile=0", "rounds=3")),
        )
    ),
)
ATTENTION = Stage(
    name="attention",
    run="a",
    limit=80,
    rows=(
        Row(
            name="attention d=32",
            case="attention",
            op="attention",
            options=("d=32", "compile=0"),
            dry=_SMALL_ATTENTION,
            ahead=_SHORT,
        ),
        Row(
            name="attention d=64",
            case="attention",
            op="attention",
            options=("d=64", "A=12", "B=512", "compile=0"),
            dry=_SMALL_ATTENTION,
            ahead=_SHORT,
        ),
    ),
)
STEP_B = Stage(
    name="vit_b",
    run="b",
    limit=120,
    rows=(
        Row(
            name="ViT-B 4096",
            case="train_step",
            op="step",
            options=(_VIT_B, "compile=1", "steps=1", *_STEP),
            dry=_SMALL_STEP,
        ),
    ),
)
SWEEPS = Stage(
    name="sweeps",
    run="a",
    limit=60,
    rows=(
        Row(
            name="AdamW ViT-S",
            case="adamw_ema",
            op="adamw_ema",
            dry=_SMALL_SWEEP,
            ahead=_SHORT,
        ),
        Row(
            name="AdamW ViT-B",
            case="adamw_ema",
            op="adamw_ema",
            options=("width=768",),
            dry=_SMALL_SWEEP,
        ),
        Row(name="EMA ViT-S", case="ema", op="ema", dry=_SMALL_SWEEP, ahead=_SHORT),
    ),
)
KNN = Stage(
    name="knn",
    run="a",
    limit=120,
    module="benchmarks.gpu.end_to_end",
    words=("--seconds", "30"),
    limited=True,
    ops=("loader", "step"),
)
PEERS, PEERS_B = (
    Stage(
        name=name,
        run=run,
        limit=120,
        rows=tuple(
            Row(
                name=f"{model} peer, {side}",
                case="train_step",
                op="step",
                options=(
                    *recipe,
                    *("batch=512", f"sides={side}", "processes=1", "rounds=3", "steps=2"),
                ),
                dry=(*_SMALL_STEP, "sides=eager"),
                ahead=("rounds=1", "steps=1") if side == "compiled" else None,
            )
            for side in ("eager", "compiled")
        ),
    )
    for name, run, model, recipe in (
        ("peers", "a", "ViT-S", ()),
        ("peers_b", "b", "ViT-B", (_VIT_B,)),
    )
)
STEP_L = Stage(
    name="vit_l",
    run="b",
    limit=120,
    rows=(
        Row(
            name="ViT-L 1024",
            case="train_step",
            op="step",
            options=(_VIT_L, "batch=1024", "compile=1", "steps=1", *_STEP),
            dry=_SMALL_STEP,
        ),
    ),
)
VARIANTS = Stage(
    name="variants",
    run="b",
    limit=150,
    rows=tuple(
        Row(
            name=f"ViT-S 1024, {name}",
            case="train_step",
            op="step",
            options=("batch=1024", *_CHUNKS, "steps=4", *options, *_STEP),
            dry=(*_SMALL_STEP, "attention=auto"),
        )
        for name, options in (
            ("cuDNN attention", ("compile=1", "attention=cudnn")),
            ("short attention", ("compile=1", "attention=triton")),
            ("eager modules", ("compile=0",)),
        )
    ),
)
FUSED = Stage(
    name="fused",
    run="b",
    limit=150,
    rows=(
        Row(
            name="ViT-B 4096 fused, momentum float8",
            case="train_step",
            op="step",
            options=(_VIT_B, "blocks=fused", "momentum_linears=float8", "steps=1", *_STEP),
            dry=(*_SMALL_STEP, "blocks=fused", "momentum_linears=native"),  # float8 needs CUDA
        ),
        Row(
            name="block ViT-S",
            case="fused_block",
            op="fused_block",
            dry=("E=32", "heads=4", "tokens=5", "compile=0"),
            ahead=(),
        ),
        Row(
            name="residual_norm ViT-S",
            case="residual_norm",
            op="residual_norm",
            dry=("rows=64", "E=32", "compile=0", "rounds=1"),
            ahead=_SHORT,
        ),
        Row(
            name="soft cross-entropy DINO",
            case="soft_cross_entropy",
            op="soft_cross_entropy",
            dry=("views=3", "images=2", "outputs=64", "dim=16", "compile=0", "rounds=1"),
            ahead=_SHORT,
        ),
    ),
)
EQUALITY = Stage(
    name="equality",
    run="b",
    limit=70,
    rows=(
        Row(
            name="equality",
            case="equality",
            op="step",
            needs="webdataset",
            options=(
                *("device=cuda", "precisions=fp32,bf16", "batch=1024", "warmup_steps=20000"),
                *("total_steps=150000", "loader_steps=1", "distinct=10", "workers=14", "threads=8"),
            ),
            dry=(
                *("batch=16", "hidden=64", "steps=3", "distinct=2", "workers=0", "threads=1"),
                "precisions=fp32",
            ),
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
            ahead=(),
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

STAGES = (
    *(ENVIRONMENT, SMOKE, TESTS, COMPILE, CEILINGS),
    *(PROFILE, STEP_S, LOSS, ATTENTION, PEERS, SWEEPS, KNN),
    *(COMPILE_B, STEP_B, PEERS_B, STEP_L, VARIANTS, EQUALITY, FUSED, COLOR, LOADER),
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


def ahead_of(stage: Stage, only: str) -> list[tuple[int, Row]]:
    """The rows of a stage that `ONLY` selects and that are compiled ahead, with their numbers."""
    return [
        (number, row)
        for number, row in enumerate(stage.rows)
        if row.ahead is not None and concerns(only, row.name, row.op, row.case)
    ]


def within(stage: Stage, only: str) -> bool:
    """Whether `ONLY` selects any part of a stage."""
    if stage.rows:
        return any(concerns(only, row.name, row.op, row.case) for row in stage.rows)
    if stage.module == COMPILE.module:
        trunks = [trunk.name for trunk in TRUNKS if trunk.run == stage.run]
        return concerns(only, "step", *trunks) or any(
            ahead_of(other, only) for other in STAGES if other.run == stage.run
        )
    if stage.name == SMOKE.name:
        return any(checked(only, op) for op in stage.ops)
    return not stage.ops or concerns(only, *stage.ops)
