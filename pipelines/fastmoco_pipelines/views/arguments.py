"""Draws turned into the per-sample arguments of DALI's operators.

Plain numpy, so that the mapping from the draws to DALI's units can be read and tested without DALI.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastmoco_pipelines.spec import ViewSpec
from fastmoco_pipelines.views.draws import ViewDraws

_LUMA = (0.299, 0.587, 0.114)  # ITU-R 601, the weights of PIL's mode "L"
_AROUND_GREY = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / np.sqrt(3)
"""The cross product with the unit vector along grey."""
_SMALLEST_SIGMA = 0.25
"""Below this the sampled Gaussian gives a neighbour exp(-8) at most, a third of a level: the image
stays as it is."""
TRUNCATION = -0.499
"""Levels added before DALI rounds, where Pillow cuts the fraction off; a whole number stays what it
is."""


def operations(spec: ViewSpec) -> frozenset[str]:
    """DALI's operations that can touch an image under this spec; the others are left out of the
    graph. With exact color everything after the resize is done elsewhere (`exact_color.py`)."""
    if spec.color == "exact":
        return frozenset()
    jitter = spec.jitter_probability > 0
    present = {
        "flip": spec.flip_probability > 0,
        "brightness": jitter and spec.brightness > 0,
        "contrast": jitter and spec.contrast > 0,
        "color": (jitter and (spec.saturation > 0 or spec.hue > 0))
        or spec.grayscale_probability > 0,
        "blur": spec.blur_probability > 0 and spec.blur_sigma[1] >= _SMALLEST_SIGMA,
        "solarize": spec.solarize_probability > 0,
    }
    return frozenset(name for name, used in present.items() if used)


def named_inputs(draws: ViewDraws, spec: ViewSpec, prefix: str) -> dict[str, NDArray[Any]]:
    """Per-sample arrays for the operations of `spec`, by input name: `prefix` and a word."""
    uses = operations(spec)
    inputs: dict[str, NDArray[Any]] = {
        "start": np.ascontiguousarray(draws.crop[:, :2]),
        "shape": np.ascontiguousarray(draws.crop[:, 2:]),
    }
    if spec.base_size:
        corner = draws.corner.astype(np.float64)
        inputs["roi_start"] = (corner / spec.base_size).astype(np.float32)
        inputs["roi_end"] = ((corner + spec.size) / spec.base_size).astype(np.float32)
    if "flip" in uses:
        inputs["flip"] = draws.flip.astype(np.int32)
    if "brightness" in uses:
        inputs["brightness"] = draws.brightness
    if "contrast" in uses:
        inputs["contrast"] = draws.contrast
    if "color" in uses:
        inputs["color"] = color_matrices(draws)
        # As in TRUNCATION: Pillow cuts after a change of saturation, while its greyscale rounds.
        cut = (draws.saturation != 1) & ~draws.grayscale
        inputs["color_shift"] = np.where(cut, np.float32(TRUNCATION), np.float32(0))[
            :, None
        ].repeat(3, axis=1)
    if "blur" in uses:
        blurred = draws.blur_sigma >= _SMALLEST_SIGMA
        sigma = np.where(blurred, draws.blur_sigma, np.float32(1))
        # 2.5 deviations to each side: as close to Pillow's blur, whose reach is finite too, as
        # DALI's usual 3.
        inputs |= {
            "blur": blurred,
            "blur_sigma": sigma,
            "blur_window": 2 * np.rint(2.5 * sigma).astype(np.int32) + 1,
        }
    if "solarize" in uses:
        inputs["solarize"] = draws.solarize
    return {prefix + name: value for name, value in inputs.items()}


def color_matrices(draws: ViewDraws) -> NDArray[np.float32]:
    """[B, 3, 3] float32: saturation, then hue, then greyscale, as one matrix acting on (R, G, B).

    Saturation s is s * I + (1 - s) * (luma in every row); greyscale is the luma in every row. Hue
    is the rotation by its angle about the grey axis (1, 1, 1), the linear map nearest to HSV's hue
    shift: equal to it at every third of a turn, where both exchange the channels. DALI's own `hsv`
    and `color_twist` rotate in YIQ instead, which keeps the luma and misses HSV by twice as much.
    """
    identity = np.eye(3)
    luma = np.tile(_LUMA, (3, 1))
    saturation = draws.saturation.astype(np.float64)[:, None, None]
    angle = 2 * np.pi * draws.hue.astype(np.float64)[:, None, None]
    cosine, sine = np.cos(angle), np.sin(angle)
    rotation = cosine * identity + (1 - cosine) / 3 + sine * _AROUND_GREY
    matrices = rotation @ (saturation * identity + (1 - saturation) * luma)
    matrices[draws.grayscale] = luma @ matrices[draws.grayscale]
    return np.asarray(matrices, dtype=np.float32)
