"""What is counted on fake tensors is what real ones take, and the FLOPs are those of the book."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastmoco.config import Config, ModelConfig
from fastmoco.config.phases import Phase
from fastmoco.models.blocks import Recompute
from fastmoco.objectives.build import build_model
from fastmoco.objectives.prepare import view_preparation
from fastmoco.planning import costs
from fastmoco.planning.costs import Line, StepCosts, measure_costs, most_of
from fastmoco.planning.plan import chunked_bytes, whole_bytes
from fastmoco.recipes import get_recipe, quickstart_digits
from fastmoco_kernels import soft_cross_entropy_of_pairs, soft_cross_entropy_of_rows
from fastmoco_pipelines.spec import each_view
from tests.real_peaks import RealPeaks


def _config() -> Config:
    """Activations of an eighth of a gigabyte at 128 images."""
    recipe = quickstart_digits()
    return replace(
        recipe,
        precision="fp32",
        model=replace(recipe.model, architecture="vit_micro", hidden_dim=128, projection_dim=32),
    )


@functools.cache
def _costs(recompute: Recompute) -> StepCosts:
    config = _config()
    return measure_costs(
        replace(config, model=replace(config.model, checkpointing=recompute)), "fp32"
    )


# whole; whole with less kept; chunks without graphs, and with some
@pytest.mark.slow
@pytest.mark.parametrize(
    ("recompute", "images", "chunk", "kept"),
    [
        ("none", 128, 0, 0),
        ("selective", 192, 0, 0),
        ("full", 256, 0, 0),
        ("none", 256, 64, 0),
        ("none", 256, 32, 4),
    ],
)
def test_the_peak_of_a_real_step_is_the_planned_one(
    real_peaks: RealPeaks, recompute: Recompute, images: int, chunk: int, kept: int
) -> None:
    config = _config()
    config = replace(config, model=replace(config.model, checkpointing=recompute))
    costs = _costs(recompute)
    planned = (
        chunked_bytes(costs, images, chunk, kept * chunk) if chunk else whole_bytes(costs, images)
    )
    real = real_peaks.peak(config, images, chunk, kept)
    assert real == pytest.approx(planned, rel=0.15)


def test_a_step_that_is_counted_as_it_runs_is_the_planned_one() -> None:
    counted, planned = costs.count_step(_config(), "fp32", 4096), _costs("none")
    assert counted.peak_bytes == pytest.approx(whole_bytes(planned, 4096), rel=0.02)
    assert counted.flops == pytest.approx(4096 * planned.step_flops, rel=0.02)
    assert counted.flops / counted.encoder_flops == pytest.approx(8, rel=0.05)


def test_the_backward_of_a_grouped_convolution_has_twice_the_products_of_its_forward() -> None:
    convolution = torch.nn.Conv2d(8, 8, 3, padding=1, groups=8)
    rows = convolution(torch.ones(2, 8, 5, 5, requires_grad=True))
    with costs._FlopsOfParts(None) as counter:
        rows.sum().backward()
    assert counter.flops[""] == 2 * 2 * rows.numel() * 9


def test_losses_that_multiply_are_counted() -> None:
    """Of 3 rows and 2 targets of 4 images, width 8, 16 outputs."""
    rows, weight = torch.ones(4, 3, 8, requires_grad=True), torch.ones(16, 8, requires_grad=True)
    targets, pairs = torch.ones(4, 2, 8), torch.ones(4, 3, 2)
    options: dict[str, Any] = {"temperature": 0.1, "target_temperature": 0.04}
    product = 2 * 4 * 8 * 16
    with costs._FlopsOfParts(None) as counter:
        soft_cross_entropy_of_pairs(rows, weight, targets, weight.detach(), pairs, **options)
    assert counter.flops[""] == product * (3 * 3 + 2 * 3) + 2 * 2 * 4 * 3 * 2 * 8
    with costs._FlopsOfParts(None) as counter:
        values = torch.ones(2, 3, 16)
        soft_cross_entropy_of_rows(rows, weight, values, **options)
    assert counter.flops[""] == product * 3 * 3


@pytest.mark.parametrize(("keep", "patch"), [(1.0, 0), (0.5, 0), (0.25, 32)])
def test_flops_of_a_phase_are_those_of_its_tokens(keep: float, patch: int) -> None:
    """The momentum encoder sees all tokens; patches are embedded once for both encoders."""
    config = get_recipe("vit_s16_e300_b4096")
    phase = Phase(keep=keep, patch_size=patch)
    schedule = f"{keep}@0"
    patches = f"{patch}@0,16@0.5" if patch else ""
    model = replace(config.model, keep_tokens=schedule, patch_schedule=patches)
    config = replace(config, model=model)
    costs = measure_costs(config, "bf16", phase=phase)
    E, hidden, tokens = 384, 4096, (224 // (patch or 16)) ** 2

    def blocks(patch_tokens: int) -> float:
        """Of both views, with the class token alone in the last block."""
        L = 1 + patch_tokens
        block = 2 * L * 12 * E * E + 4 * L * L * E
        return 2 * (11 * block + 2 * (4 * L * E * 12 + 4 * E * E + 8 * E * E))

    embedding = 2 * 2 * tokens * E * 3 * 16 * 16
    trained = blocks(int(tokens * keep))
    assert costs.query_flops == pytest.approx(trained + embedding, rel=0.02)
    heads = 2 * (E * hidden + hidden * hidden + 2 * hidden * 256 + hidden * 256)
    step = 3 * trained + blocks(tokens) + embedding + 8 * heads
    assert costs.step_flops == pytest.approx(step, rel=0.04)


def test_a_run_with_phases_is_planned_for_the_largest() -> None:
    config = quickstart_digits()
    patches = {"keep_tokens": "0.5@0,1@0.8", "patch_schedule": "4@0,2@0.9"}
    config = replace(config, model=replace(config.model, **patches))
    half, large, whole = (
        measure_costs(config, "fp32", phase=phase) for phase in config.model.phases.items
    )
    assert half.graph.per_image < large.graph.per_image < 0.5 * whole.graph.per_image
    assert half.step_flops < large.step_flops < whole.step_flops
    assert measure_costs(config, "fp32") == whole

    # Where none is the largest in all, the most of each figure.
    found = most_of([replace(half, forward=Line(9e9, 0.0)), whole])
    assert found == replace(whole, forward=Line(9e9, whole.forward.fixed))


def test_flops_and_parameters_are_those_of_the_book() -> None:
    config = get_recipe("vit_s16_e300_b4096")
    costs = measure_costs(config, "bf16")
    E, L, blocks, hidden = 384, 197, 12, 4096
    block = 2 * L * 12 * E * E + 4 * L * L * E
    class_row = 2 * (4 * L * E * 12 + 2 * E * E + 2 * E * E + 8 * E * E)
    patches = 2 * (L - 1) * E * 3 * 16 * 16
    assert costs.query_flops / 2 == pytest.approx(
        (blocks - 1) * block + class_row + patches, rel=0.02
    )
    heads = 2 * (E * hidden + hidden * hidden + 2 * hidden * 256 + hidden * 256)
    forward = costs.query_flops - 2 * patches
    # query forward and backward, key forward, heads of both (the loss is 0.1 %)
    assert costs.step_flops == pytest.approx(
        4 * forward + 2 * patches + 2 * (3 + 1) * heads, rel=0.03
    )
    assert costs.parameters == pytest.approx(43.2e6 + 41.1e6, rel=0.005)
    assert costs.coupling_reason == ""


def test_checkpointing_trades_bytes_for_flops_and_selective_costs_next_to_none() -> None:
    none, selective, full = (
        measure_costs(_config(), "bf16", recompute=how) for how in ("none", "selective", "full")
    )
    assert none.recompute_flops == 0
    assert (
        0 < selective.recompute_flops < 0.02 * none.step_flops
    )  # the class row alone, of one block in four
    assert 0.5 * none.query_flops < full.recompute_flops < none.query_flops
    assert selective.graph.per_image < 0.75 * none.graph.per_image
    assert full.graph.per_image < 0.3 * none.graph.per_image
    assert none.query_flops == selective.query_flops == full.query_flops


def test_products_with_everything_kept_are_counted_once_for_a_plan() -> None:
    config = replace(quickstart_digits(), epochs=99)
    counting = costs._Pieces.flops_of_an_image
    with mock.patch.object(costs._Pieces, "flops_of_an_image", autospec=True) as count:
        count.side_effect = counting
        none, full = (measure_costs(config, "fp32", recompute=how) for how in ("none", "full"))
        assert count.call_count == 2  # with everything kept, and with everything computed again
    assert none.step_flops == full.step_flops
    assert none.recompute_flops == 0 < full.recompute_flops


def test_bytes_of_parts_that_keep_nothing_are_counted_once_for_a_plan() -> None:
    config = replace(quickstart_digits(), epochs=98)
    counting = costs._Pieces.bytes_of_the_rest
    with mock.patch.object(costs._Pieces, "bytes_of_the_rest", autospec=True) as count:
        count.side_effect = counting
        for how in ("none", "full"):
            measure_costs(config, "fp32", recompute=how)
        assert count.call_count == 1


def test_a_number_of_images_passes_traced_blocks_once_before_it_is_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Both counters share the graphs of the first pass."""
    passes: list[int] = []
    runs_of = costs._Pieces._runs

    def counted(pieces: Any, images: int) -> dict[str, Any]:
        runs = runs_of(pieces, images)
        train = runs["train"]

        def noted(live: Any) -> int:
            passes.extend([images] if pieces.traced else [])
            return int(train(live))

        return runs | {"train": noted}

    monkeypatch.setattr(costs._Pieces, "_runs", counted)
    measure_costs(quickstart_digits(), "fp32", compiled=True)
    # Once to trace, then for the bytes, and the first number also for the FLOPs.
    assert [passes.count(images) for images in costs.SIZES] == [3, 2]


@pytest.mark.parametrize(
    ("model", "before", "asked"),
    [
        ({"blocks": "fused"}, {"recompute": "full"}, {"recompute": "none"}),
        ({"checkpointing": "full"}, {"recompute": "none"}, {"recompute": "none", "compiled": True}),
    ],
)
def test_costs_do_not_depend_on_what_was_counted_before(
    model: dict[str, Any], before: dict[str, Any], asked: dict[str, Any]
) -> None:
    config = quickstart_digits()
    config = replace(config, model=replace(config.model, **model))
    measure_costs(config, "fp32", **before)
    after_another = measure_costs(config, "fp32", **asked)
    costs._FLOPS.clear()
    costs._BYTES.clear()
    assert measure_costs(config, "fp32", **asked) == after_another


def test_two_depths_tell_what_all_blocks_cost() -> None:
    config = _config()
    config = replace(config, model=replace(config.model, architecture="vit_tiny"))  # twelve blocks
    by_two = measure_costs(config, "fp32")
    from fastmoco.planning import costs as step_costs

    before = step_costs.DEPTHS
    step_costs.DEPTHS = (11, 12)
    try:
        directly = measure_costs(config, "fp32")
    finally:
        step_costs.DEPTHS = before
    for name in ("graph", "train", "forward", "heads"):
        assert getattr(by_two, name).per_image == pytest.approx(
            getattr(directly, name).per_image, rel=1e-6
        ), name
    assert by_two.step_flops == pytest.approx(directly.step_flops, rel=1e-9)


def test_measuring_touches_neither_random_numbers_nor_the_default_dtype() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    config = replace(
        _config(),
        model=ModelConfig(architecture="vit_nano", image_size=8, patch_size=2, hidden_dim=32),
    )
    costs = measure_costs(config, "fp64")
    assert torch.equal(torch.rand(2), expected)
    assert torch.get_default_dtype() == torch.float32
    assert costs.view_bytes == 2 * 3 * 64 * 8


def test_small_crops_cost_what_their_sizes_cost() -> None:
    """Bytes of the views, and FLOPs of the query trunk: of each view by its own size."""
    recipe = get_recipe("swav_digits")
    small = replace(recipe.data.view1, size=4, copies=3)
    crops = replace(recipe, data=replace(recipe.data, more_views=(small,)))
    two, all_views = (measure_costs(config, "fp32") for config in (recipe, crops))
    assert two.view_bytes == 2 * 3 * 8**2 * 4
    assert all_views.view_bytes == two.view_bytes + 3 * 3 * 4**2 * 4
    encoder = build_model(recipe).encoder
    share = (2 * encoder.forward_flops(8) + 3 * encoder.forward_flops(4)) / (
        2 * encoder.forward_flops(8)
    )
    assert all_views.query_flops / two.query_flops == pytest.approx(share, rel=0.05)
    assert all_views.graph.per_image > two.graph.per_image * 1.2
    assert all_views.feature_bytes == two.feature_bytes * 5 / 2
    assert measure_costs(crops, "fp32", levels=True).view_bytes == all_views.view_bytes / 4


def test_groups_of_batch_norms_have_images_however_small_their_maps() -> None:
    # The last maps of `resnet_nano` have one position: a group needs two images there.
    config = get_recipe("moco_digits")
    views = each_view(config.data.views)
    with FakeTensorMode():
        pieces = costs._Pieces(
            build_model(config),
            [view.size for view in views],
            bf16=False,
            prepare=view_preparation(views, "fp32"),
            levels=False,
            at=costs._within(Phase()),
        )
        assert [rows.shape[0] for rows in pieces.features(images=3).online] == [3]
