"""More views than two of one image: each against the reference, decoded once."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from fastmoco_pipelines.spec import IMAGENET_MEAN, IMAGENET_STD, ViewSpec, each_view, moco_v3_views
from fastmoco_pipelines.views import dali
from fastmoco_pipelines.views.dali import ViewPipeline
from fastmoco_pipelines.views.draws import draw_batch
from fastmoco_pipelines.views.reference import reference_view
from tests.pipelines.dali_cases import photographs

COUNT = 6
LARGE = moco_v3_views(64)
SMALL = replace(moco_v3_views(32)[0], crop_scale=(0.05, 0.4), copies=3, interpolation="bicubic")
GROUPS = (*LARGE, SMALL, replace(LARGE[1], size=24, color="dali", copies=2))
LIMIT = 12.0
"""Mean distance from Pillow, in levels of 255, of `color="dali"`: its hue is approximate
(docs/views.md)."""


@pytest.fixture(scope="module")
def encoded() -> list[np.ndarray]:
    return photographs(COUNT, "PNG")


@pytest.fixture(scope="module")
def draws(encoded):
    sizes = np.array(
        [Image.open(io.BytesIO(image.tobytes())).size[::-1] for image in encoded], dtype=np.int32
    )
    return draw_batch(GROUPS, seed=0, epoch=0, sample_ids=np.arange(COUNT), sizes=sizes)


def in_levels(view: np.ndarray) -> np.ndarray:
    return (
        view * np.array(IMAGENET_STD)[:, None, None] + np.array(IMAGENET_MEAN)[:, None, None]
    ) * 255


@pytest.mark.parametrize("sub_batch", [None, 4])
def test_each_view_is_the_reference_by_its_own_draws(encoded, draws, sub_batch) -> None:
    """Exact views to the bit, DALI's within its distance; no other view's draws would pass."""
    images = [Image.open(io.BytesIO(image.tobytes())).convert("RGB") for image in encoded]
    made = ViewPipeline(GROUPS, batch_size=COUNT, sub_batch=sub_batch, threads=1).run(
        encoded, draws
    )
    specs = each_view(GROUPS)
    assert [tuple(view.shape) for view in made] == [
        (COUNT, 3, spec.size, spec.size) for spec in specs
    ]
    for view, spec, drawn in zip(made, specs, draws, strict=True):
        expected = np.stack(
            [reference_view(image, spec, drawn, i) for i, image in enumerate(images)]
        )
        got, wanted = in_levels(view.numpy()), in_levels(expected)
        if spec.color == "exact":
            np.testing.assert_array_equal(np.rint(got), np.rint(wanted))
        distance = np.abs(got - wanted).mean()
        assert distance < LIMIT
        others = [other for other in draws if other is not drawn]
        apart = np.stack(
            [reference_view(image, spec, others[0], i) for i, image in enumerate(images)]
        )
        assert np.abs(in_levels(apart) - wanted).mean() > 2 * LIMIT


def test_an_image_is_decoded_once_for_all_views(encoded, draws, monkeypatch) -> None:
    decoders = []
    decode = dali.decode
    monkeypatch.setattr(dali, "decode", lambda device: decoders.append(device) or decode(device))
    ViewPipeline(GROUPS, batch_size=COUNT, threads=1).run(encoded, draws)
    assert decoders == ["cpu"]


def test_a_single_view(encoded, draws) -> None:
    (alone,) = ViewPipeline(LARGE[:1], batch_size=COUNT, threads=1).run(encoded, draws[:1])
    pair = ViewPipeline(LARGE, batch_size=COUNT, threads=1).run(encoded, draws[:2])
    assert torch.equal(alone, pair[0])


def test_draws_that_fit_no_view_are_refused(encoded, draws) -> None:
    pipeline = ViewPipeline(GROUPS, batch_size=COUNT, threads=1)
    with pytest.raises(ValueError, match="draws=6: needs one for each of 7 views"):
        pipeline.run(encoded, draws[:6])
    with pytest.raises(ValueError, match="draws of view 3=2: needs one row for each of 6 images"):
        pipeline.run(encoded, (*draws[:2], draws[2].rows(slice(2)), *draws[3:]))
    with pytest.raises(ValueError, match="there is no view"):
        ViewPipeline((ViewSpec(copies=0),), batch_size=COUNT)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_views_of_several_sizes_on_a_gpu(encoded, draws) -> None:
    on_cpu = ViewPipeline(GROUPS, batch_size=COUNT, threads=1).run(encoded, draws)
    on_gpu = ViewPipeline(GROUPS, batch_size=COUNT, sub_batch=4, device="gpu", device_id=0).run(
        encoded, draws
    )
    for view, other in zip(on_gpu, on_cpu, strict=True):
        assert np.abs(in_levels(view.cpu().numpy()) - in_levels(other.numpy())).mean() < LIMIT
