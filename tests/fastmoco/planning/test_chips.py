"""The table of chips: consistent, and found by name."""

from __future__ import annotations

import pytest

from fastmoco.planning.chips import CHIPS, chip_named


@pytest.mark.parametrize("chip", CHIPS.values(), ids=lambda chip: chip.name)
def test_nothing_exceeds_the_data_sheet(chip):
    assert chip.step_flops_per_s < chip.ceiling_flops_per_s < chip.peak_flops_per_s
    assert chip.step_bytes_per_s < chip.peak_bytes_per_s
    assert chip.link_bytes_per_s < chip.step_bytes_per_s


def test_a_chip_is_found_in_any_case_and_others_are_refused_by_name():
    assert chip_named("h100") is CHIPS["H100"]
    with pytest.raises(ValueError, match="chip='V100': must be one of A100, H100, H200, B200"):
        chip_named("V100")
