"""Every configuration of the kernels that the launcher may pick, for compilation ahead of time.

The streaming kernel: each tile as it computes loss and gradient; default tiles also as they count
ranks, as the second pass for the keys, without a gradient, and with the temperature on the device.
The epilogues: the widest.
"""

from __future__ import annotations

from typing import Any

from benchmarks.aot.machine_code import AotCase
from fastmoco_kernels.info_nce import epilogue_kernels, triton_kernels
from fastmoco_kernels.info_nce.chunked import EPS
from fastmoco_kernels.info_nce.cost import exponent_ceiling
from fastmoco_kernels.info_nce.tiles import FAMILIES, Tile, candidates

_ELEMENTS = {"bf16": "*bf16", "fp16": "*fp16", "tf32": "*fp32", "fp32": "*fp32"}
_WIDTHS = (64, 128, 256, 512)
_EPILOGUES = ("unit_rows", "own", "fold", "finish", "finish_keys")
_MODES: dict[str, dict[str, bool]] = {
    "gradient": {"GRADIENT": True},
    "ranks": {"GRADIENT": True, "COUNT": True},
    "keys": {"GRADIENT": True, "BIAS": True},
    "loss": {},
    "learnt": {"GRADIENT": True, "ON_DEVICE": True},
}


def aot_cases() -> list[AotCase]:
    """All of them, once each; a tile that several kinds of GPU share is one case with several
    targets.
    """
    cases = []
    for precision in _ELEMENTS:
        for D in _WIDTHS if precision != "fp16" else (256,):
            for tile, (targets, default_on) in _tiles(D, precision).items():
                modes = _modes(precision, D) if default_on else ["gradient"]
                cases += [
                    _stream_case(D, precision, tile, mode, targets, default_on) for mode in modes
                ]
    return cases + [_epilogue_case(D, kernel) for D in (256, 512) for kernel in _EPILOGUES]


def _modes(precision: str, D: int) -> list[str]:
    """What a default tile is compiled for: everything in bf16 at D=256, what differs in registers
    elsewhere.
    """
    if precision == "bf16":
        return list(_MODES) if D == 256 else ["gradient", "ranks", "keys"]
    return ["gradient", "ranks"] if precision == "tf32" else ["gradient"]


def _tiles(D: int, precision: str) -> dict[Tile, tuple[tuple[int, ...], tuple[int, ...]]]:
    """For each tile the architectures it may run on and those where it is the default; small chips
    compile as sm_80.
    """
    found: dict[Tile, tuple[set[int], set[int]]] = {}
    for family in FAMILIES:
        for place, tile in enumerate(candidates(family, D, precision)):
            targets, defaults = found.setdefault(tile, (set(), set()))
            targets.add(family or 80)
            if place == 0:
                defaults.add(family or 80)
    return {
        tile: (tuple(sorted(targets)), tuple(sorted(defaults)))
        for tile, (targets, defaults) in found.items()
    }


def _stream_case(
    D: int,
    precision: str,
    tile: Tile,
    mode: str,
    targets: tuple[int, ...],
    default_on: tuple[int, ...],
) -> AotCase:
    element = _ELEMENTS[precision]
    constexprs: dict[str, Any] = {
        "D": D,
        "BLOCK_X": tile.block_x,
        "BLOCK_Y": tile.block_y,
        **dict.fromkeys(("GRADIENT", "COUNT", "BIAS", "ON_DEVICE"), False),
        **_MODES[mode],
        "CEILING": exponent_ceiling(precision),
        "PRECISION": "ieee" if precision == "fp32" else "tf32",
    }
    pointers = {
        "x_ptr": element, "y_ptr": element, "acc_ptr": "*fp32", "sum_ptr": "*fp32",
        "count_ptr": "*i32", "own_ptr": "*fp32", "bias_ptr": "*fp32", "temperature_ptr": "*fp32",
    }  # fmt: skip
    integers = dict.fromkeys(
        ("x_padded", "y_rows", "y_padded", "positive_shift", "tiles_per_split"), "i32"
    )
    half = precision in ("bf16", "fp16")
    return AotCase(
        name=(
            f"info_nce.stream {mode} {precision} D{D} "
            f"{tile.block_x}x{tile.block_y} w{tile.warps} s{tile.stages}"
        ),
        kernel=triton_kernels.info_nce_stream_kernel,
        signature={
            **pointers,
            "scale_log2": "fp32",
            **integers,
            **dict.fromkeys(constexprs, "constexpr"),
        },
        constexprs=constexprs,
        num_warps=tile.warps,
        num_stages=tile.stages,
        targets=targets,
        default_on=default_on,
        aligned=(*pointers, "x_padded", "y_padded"),
        matrix=half,
        forbidden_in_loop=("FMUL", "FMNMX") if half else (),
    )


def _epilogue_case(D: int, kernel: str) -> AotCase:
    """A kernel around the pass, with float32 inputs and everything asked for."""
    module = epilogue_kernels if kernel in ("fold", "finish", "finish_keys") else triton_kernels
    function = getattr(module, f"info_nce_{kernel}_kernel")
    options: dict[str, dict[str, Any]] = {
        "unit_rows": {
            "EPS": EPS,
            "D": D,
            "ROWS": max(1, 1024 // D),
            "TF32": True,
            "NORMALISE": True,
        },
        "own": {"D": D, "ROWS": max(1, 1024 // D)},
        "fold": {"D": D, "ROWS": max(1, 1024 // D), "GRADIENT": True, "COUNT": True},
        "finish": {
            "EPS": EPS,
            "D": D,
            "ROWS": max(1, 1024 // D),
            "GRADIENT": True,
            "COUNT": True,
            "KEYS": True,
        }
        | {"ON_DEVICE": True, "CEILING": exponent_ceiling("bf16")},
        "finish_keys": {"EPS": EPS, "D": D, "ROWS": max(1, 1024 // D), "ON_DEVICE": True},
    }
    flags = options[kernel]
    kinds = {
        "count_ptr": "*i32",
        "new_count_ptr": "*i32",
        "scale_log2": "fp32",
        "factor": "fp32",
        "key_shift": "fp32",
        "unshift": "fp32",
    }
    if kernel == "own":
        kinds |= {"x_ptr": "*bf16", "y_ptr": "*bf16"}
    if kernel == "unit_rows":
        kinds |= {"unit_ptr": "*fp32"}
    signature = {
        name: "constexpr"
        if name in flags
        else kinds.get(name, "*fp32" if name.endswith("_ptr") else "i32")
        for name in function.arg_names
    }
    return AotCase(
        name=f"info_nce.{kernel} D{D}",
        kernel=function,
        signature=signature,
        constexprs=flags,
        num_warps=4,
        num_stages=3,
        default_on=(80, 90, 100),
        aligned=tuple(name for name in signature if name.endswith("_ptr")),
    )
