"""From the parameters of a batch to small integer tables that both paths read."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from fastmoco_kernels.blur.boxes import extended_boxes

BRIGHTNESS, CONTRAST, SATURATION, HUE, NOTHING = range(5)
"""Codes of the jitter operations in an order; NOTHING replaces one that would change no level."""


class ViewColorParameters(NamedTuple):
    """Parameters of B images; row i is of image i.

    All on the CPU (where a loader draws them; then only what the batch needs is launched), or all
    on the images' device (then they are used without waiting). Floating-point fields may have any
    floating-point type; float32 is used.
    """

    brightness: Tensor
    """[B], factor >= 0; 1 changes nothing."""
    contrast: Tensor
    """[B], factor >= 0 about the image's own grey mean; 1 changes nothing."""
    saturation: Tensor
    """[B], factor >= 0 about each pixel's own grey; 1 changes nothing."""
    hue: Tensor
    """[B], shift in turns, -0.5 to 0.5; 0 changes nothing."""
    order: Tensor
    """[B, 4] uint8, the order: a permutation of 0 brightness, 1 contrast, 2 saturation, 3 hue."""
    grayscale: Tensor
    """[B] bool, whether the image becomes gray after the jitter."""
    blur_sigma: Tensor
    """[B], standard deviation of the Gaussian blur in pixels; 0 for none."""
    solarize: Tensor
    """[B] bool, whether levels from the threshold on are inverted after the blur."""
    flip: Tensor
    """[B] bool, whether the image is mirrored left to right."""

    @classmethod
    def neutral(cls, batch: int, device: torch.device | str = "cpu") -> ViewColorParameters:
        """Parameters that change nothing; replace fields with `._replace`."""
        ones, zeros = torch.ones(batch, device=device), torch.zeros(batch, device=device)
        order = torch.arange(4, dtype=torch.uint8, device=device).repeat(batch, 1)
        never = torch.zeros(batch, dtype=torch.bool, device=device)
        return cls(ones, ones, ones, zeros, order, never, zeros, never, never)


class Plan(NamedTuple):
    """The tables.

    Attributes:
        steps: [B, 4] int32, codes of the operations in each image's order; NOTHING where one would
            change no level.
        contrast_at: [B] int32, place of contrast in it; 4 for none.
        factors: [B, 4] float32, brightness, contrast, saturation, 0.
        shift: [B] int32, 0 to 255, what is added to the hue byte.
        flags: [B, 3] int32, greyscale, solarize, flip.
        boxes: [B, 4] int32, each image's blur (`extended_boxes`); radius -1 for none.
    """

    steps: Tensor
    contrast_at: Tensor
    factors: Tensor
    shift: Tensor
    flags: Tensor
    boxes: Tensor


def plan(parameters: ViewColorParameters) -> Plan:
    """Tables on the device of the parameters, without waiting for it."""
    p = parameters
    factors = torch.stack(
        [p.brightness, p.contrast, p.saturation, torch.zeros_like(p.brightness)], 1
    ).float()
    idle = torch.stack([*(factors[:, i] == 1 for i in range(3)), p.hue == 0], 1)
    order = p.order.long()
    steps = torch.where(idle.gather(1, order), NOTHING, order).to(torch.int32)
    is_contrast = steps == CONTRAST
    contrast_at = torch.where(is_contrast.any(1), is_contrast.int().argmax(1), 4).to(torch.int32)
    shift = torch.trunc(p.hue.float().double() * 255).to(torch.int32) & 255
    flags = torch.stack([p.grayscale, p.solarize, p.flip], 1).to(torch.int32)
    return Plan(steps, contrast_at, factors, shift, flags, extended_boxes(p.blur_sigma))


@functools.cache
def late_hues() -> tuple[bool, ...]:
    """For each exact hue byte, whether PIL's is one less.

    PIL computes `h = frac(((bc - gc), (2 + rc - bc) or (4 + gc - rc)) / 6)` with
    `rc = (max - r) / (max - min)` and so on in float32, and cuts `255 h`. Where that is a whole
    number E in exact arithmetic, h may come out just below E / 255; everywhere else the distance to
    the next whole number (1/1530 at least) dwarfs the rounding. For such a pixel the middle
    channel's share is (85 - 2 |j|) / 85 with j = E - 85 k in sector k, whatever the levels are, so
    there are only these 256 cases. A test compares all 2^24 colors.
    """
    exact = torch.arange(256)
    sector = ((exact + 42) // 85) % 3
    j = (exact + 42) % 85 - 42
    middle = ((85 - 2 * j.abs()).float() / torch.tensor(85.0)).float()
    one = torch.ones(256)
    first, second = torch.where(j > 0, one, middle), torch.where(j > 0, middle, one)
    raw = (first.double() - second.double() + 2 * sector).float()
    hue = torch.fmod(raw.double() / 6.0 + 1.0, 1.0).float()
    reached = (hue.double() * 255).floor().long()
    return tuple(bool(late) for late in (reached == exact - 1))
