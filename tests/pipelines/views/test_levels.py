"""Views as uint8 levels: normalised later they are the float32 views to the bit, from pipeline,
loader and kernel."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("nvidia.dali")

from fastmoco_pipelines import Batch, LoaderSpec, ViewSpec, build_loader, moco_v3_views, normalise
from fastmoco_pipelines.loading.synthetic import SyntheticLoader
from fastmoco_pipelines.views.exact_color import exact_color
from tests.pipelines.dali_cases import draw, photographs

ODD = {"mean": (0.1307, 0.5, 0.713), "std": (0.3081, 0.11, 0.29)}  # no ImageNet in the rounding
PAIRS = {
    "exact": moco_v3_views(24),
    "dali": moco_v3_views(24, color="dali"),
    "mixed": (moco_v3_views(24)[0], moco_v3_views(24, color="dali")[1]),
}


def loader_spec(folder: Path, pair: tuple[ViewSpec, ViewSpec], **changes) -> LoaderSpec:
    view1, view2 = pair
    options = {"views": (view1, view2), "global_batch_size": 12, "seed": 7, "threads": 1}
    return LoaderSpec(shards=str(folder), **options | changes)


def take(
    spec: LoaderSpec, steps: int = 4
) -> list[Batch]:  # 45 images, three steps an epoch: two epochs are seen
    with build_loader(spec) as loader:
        return [loader.next() for _ in range(steps)]


@pytest.mark.parametrize("numbers", [{}, ODD], ids=["imagenet", "odd"])
@pytest.mark.parametrize("name", PAIRS)
def test_levels_normalised_are_the_float32_views(packed, name: str, numbers) -> None:
    pair = tuple(replace(view, **numbers) for view in PAIRS[name])
    wanted = take(loader_spec(packed, pair))
    made = take(loader_spec(packed, pair, view_dtype="uint8"))
    for got, want in zip(made, wanted, strict=True):
        assert np.array_equal(got.sample_ids, want.sample_ids)
        assert got.step == want.step
        assert (got.normalised, want.normalised) == (False, True)
        for levels, view, spec in (
            (got.views[0], want.views[0], pair[0]),
            (got.views[1], want.views[1], pair[1]),
        ):
            assert levels.dtype == torch.uint8
            assert levels.is_contiguous()
            assert torch.equal(normalise(levels, spec), view)
            assert torch.equal(
                normalise(levels, spec, dtype=torch.bfloat16), view.to(torch.bfloat16)
            )


def test_every_level_of_every_channel() -> None:
    """All 256, of both colors, as NumPy rounds them."""
    levels = torch.arange(256, dtype=torch.uint8).expand(1, 3, 1, 256)
    for color in ("exact", "dali"):
        spec = ViewSpec(color=color, **ODD)
        made = normalise(levels, spec)[0, :, 0].numpy()
        for channel, (mean, std) in enumerate(zip(spec.mean, spec.std, strict=True)):
            level = np.arange(256).astype(np.float32)
            if color == "exact":
                expected = level * np.float32(1 / (255 * std)) + np.float32(-mean / std)
            else:
                expected = (level - np.float32(255 * mean)) * (
                    np.float32(1) / np.float32(255 * std)
                )
            assert np.array_equal(made[channel], expected)
            np.testing.assert_allclose(
                made[channel], (np.arange(256) / 255 - mean) / std, atol=2e-6
            )


def test_layout_and_default_type_change_nothing() -> None:
    spec = ViewSpec(color="exact")
    levels = torch.randint(
        256, (5, 3, 6, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    wanted = normalise(levels, spec)
    last = normalise(levels.to(memory_format=torch.channels_last), spec)
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(last, wanted)
    assert torch.equal(normalise(levels[1:3], spec), wanted[1:3])
    torch.set_default_dtype(torch.float64)
    try:
        again = normalise(levels, spec)
    finally:
        torch.set_default_dtype(torch.float32)
    assert again.dtype == torch.float32
    assert torch.equal(again, wanted)


def test_nothing_of_a_traced_graph_stays() -> None:
    """Shapes are counted with fake tensors; the next real batch must not meet one."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    spec = ViewSpec(color="exact", mean=(0.11, 0.22, 0.33))
    with FakeTensorMode() as mode:
        assert normalise(
            mode.from_tensor(torch.zeros(2, 3, 4, 4, dtype=torch.uint8)), spec
        ).shape == (2, 3, 4, 4)
    levels = torch.full((2, 3, 4, 4), 9, dtype=torch.uint8)
    eager = normalise(levels, spec)
    compiled = torch.compile(
        lambda view: normalise(view, spec), backend="aot_eager", fullgraph=True
    )
    assert torch.equal(compiled(levels), eager)


@pytest.mark.parametrize(
    ("view", "text"),
    [
        (torch.zeros(2, 3, 4, 4), r"the view is torch.float32 \(2, 3, 4, 4\); needs uint8"),
        (torch.zeros(2, 4, 4, 3, dtype=torch.uint8), r"\(2, 4, 4, 3\)"),
        (torch.zeros(3, 4, 4, dtype=torch.uint8), r"\(3, 4, 4\)"),
    ],
)
def test_what_is_no_view_of_levels_is_refused(view, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        normalise(view, ViewSpec())


def test_the_gpu_path_of_exact_colors_gives_the_same_levels() -> None:
    """On a GPU DALI resizes and ``exact_color`` does the rest; its arithmetic is the same on a
    CPU."""
    spec = moco_v3_views(24)[1]
    resized = torch.randint(
        256, (6, 24, 24, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    draws = draw(spec, photographs(6))
    levels = exact_color(resized, spec, draws, dtype=torch.uint8)
    assert torch.equal(normalise(levels, spec), exact_color(resized, spec, draws))


def test_synthetic_levels_and_unchanged_floats() -> None:
    view1, view2 = moco_v3_views(8)
    spec = LoaderSpec(shards="unused", views=(view1, view2), global_batch_size=12, seed=3)
    batch = SyntheticLoader(replace(spec, view_dtype="uint8"), sample_count=100).next()
    assert batch.views[0].dtype == batch.views[1].dtype == torch.uint8
    assert batch.views[0].shape == (12, 3, 8, 8)
    assert len(batch.views[0].unique()) > 200
    assert not torch.equal(batch.views[0], batch.views[1])
    noise = torch.Generator().manual_seed(3)
    floats = SyntheticLoader(spec, sample_count=100).next()
    for view in (floats.views[0], floats.views[1]):
        assert torch.equal(view, torch.randn(12, 3, 8, 8, generator=noise))


def test_the_spec_knows_two_types() -> None:
    assert LoaderSpec(shards="x", global_batch_size=2).view_dtype == "float32"
    with pytest.raises(ValueError, match=r"view_dtype='bf16': is \"float32\" or \"uint8\""):
        LoaderSpec(shards="x", global_batch_size=2, view_dtype="bf16")


@pytest.mark.gpu
@pytest.mark.parametrize("color", ["exact", "dali"])
def test_levels_normalised_are_the_float32_views_on_a_gpu(color: str) -> None:
    from fastmoco_pipelines.views.dali import ViewPipeline

    pair = moco_v3_views(48, color=color)
    encoded = photographs(9)
    draws = draw(pair[0], encoded), draw(pair[1], encoded, view=2)
    options = {"batch_size": 9, "sub_batch": 4, "threads": 2, "device": "gpu", "device_id": 0}
    floats = ViewPipeline(pair, **options).run(encoded, draws)
    levels = ViewPipeline(pair, view_dtype="uint8", **options).run(encoded, draws)
    for view, wanted, spec in zip(levels, floats, pair, strict=True):
        assert (view.dtype, view.is_cuda) == (torch.uint8, True)
        normalise(view, spec)  # brings the factors to the GPU, once
        torch.cuda.set_sync_debug_mode("error")
        try:
            made = normalise(view, spec)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.equal(made, wanted)
        assert torch.equal(made.cpu(), normalise(view.cpu(), spec))
