"""color="exact": the views of the PIL reference to the bit, through pipeline, loader and
preview."""

import dataclasses
import importlib
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("nvidia.dali")

from fastmoco_pipelines.inspecting.preview import denormalise, save_view_grid
from fastmoco_pipelines.loading.batch import Batch
from fastmoco_pipelines.loading.loader import build_loader
from fastmoco_pipelines.sets.shard_set import ShardSet
from fastmoco_pipelines.spec import IMAGENET_STD, LoaderSpec, ViewSpec, moco_v3_views
from fastmoco_pipelines.views.arguments import named_inputs, operations
from fastmoco_pipelines.views.dali import ViewPipeline
from fastmoco_pipelines.views.draws import ViewDraws, draw_views
from fastmoco_pipelines.views.reference import reference_view
from tests.pipelines.dali_cases import JITTER, NOTHING

COUNT, SIZE = 24, 112
OPERATIONS = {
    "flip": NOTHING | {"flip_probability": 0.5},
    "brightness": JITTER | {"brightness": 0.4},
    "contrast": JITTER | {"contrast": 0.4},
    "saturation": JITTER | {"saturation": 0.2},
    "hue": JITTER | {"hue": 0.1},
    "the four in their own order": JITTER
    | {"brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1},
    "greyscale": NOTHING | {"grayscale_probability": 0.5},
    "blur": NOTHING | {"blur_probability": 1.0},
    "solarize": NOTHING | {"solarize_probability": 0.5},
    "all of view 1": {},
    "all of view 2": {"blur_probability": 0.1, "solarize_probability": 0.2},
}


def dali_pair(size: int) -> tuple[ViewSpec, ViewSpec]:
    return moco_v3_views(size, color="dali")


def encode(image: Image.Image, kind: str = "PNG", **options) -> np.ndarray:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return np.frombuffer(out.getvalue(), dtype=np.uint8)


def decode(encoded: np.ndarray) -> Image.Image:
    return Image.open(io.BytesIO(encoded.tobytes())).convert("RGB")


def draw(spec: ViewSpec, encoded: list[np.ndarray], *, view: int = 1) -> ViewDraws:
    sizes = np.array([decode(image).size[::-1] for image in encoded], dtype=np.int32)
    return draw_views(
        spec, seed=0, epoch=0, sample_ids=np.arange(len(encoded)), sizes=sizes, view=view
    )


def level_errors(made: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """[B] mean absolute difference of each image, in levels of 0 to 255."""
    return (np.abs(made - expected) * 255 * np.array(IMAGENET_STD)[:, None, None]).mean(
        axis=(1, 2, 3)
    )


@pytest.fixture(scope="module")
def photographs() -> list[np.ndarray]:
    """Pieces of the two photographs that scikit-learn carries (CC-BY), 200 to 400 pixels a side."""
    from sklearn.datasets import load_sample_images

    rng, pieces = np.random.default_rng(0), []
    for i in range(COUNT):
        levels = load_sample_images().images[i % 2]
        height, width = rng.integers(200, 400, size=2)
        top, left = (
            rng.integers(0, levels.shape[0] - height),
            rng.integers(0, levels.shape[1] - width),
        )
        pieces.append(
            encode(
                Image.fromarray(levels[top : top + height, left : left + width]), "JPEG", quality=92
            )
        )
    return pieces


@pytest.mark.parametrize("name", OPERATIONS)
def test_operation_equals_pil(name: str, photographs) -> None:
    """From the decoded image to the normalised view, Pillow's levels to the bit."""
    spec = ViewSpec(**{"size": SIZE, "color": "exact", **OPERATIONS[name]})
    draws = draw(spec, photographs)
    made = ViewPipeline((spec, spec), batch_size=COUNT, threads=2).run(photographs, (draws, draws))[
        0
    ]
    expected = np.stack(
        [reference_view(decode(image), spec, draws, i) for i, image in enumerate(photographs)]
    )
    np.testing.assert_array_equal(
        denormalise(made, spec), denormalise(torch.from_numpy(expected), spec)
    )
    np.testing.assert_allclose(made.numpy(), expected, atol=1e-6)


def test_only_the_cut_is_left_to_dali_on_a_gpu(photographs) -> None:
    spec = moco_v3_views(SIZE)[1]
    assert operations(spec) == frozenset()
    assert set(named_inputs(draw(spec, photographs), spec, "view2_")) == {
        "view2_start",
        "view2_shape",
    }


def test_without_a_compiled_library_the_views_are_the_same_and_somebody_is_told(
    photographs, monkeypatch
) -> None:
    specs = moco_v3_views(24)
    draws = draw(specs[0], photographs[:3]), draw(specs[1], photographs[:3], view=2)
    compiled = ViewPipeline(specs, batch_size=3, threads=1).run(photographs[:3], draws)
    for module in ("fastmoco_pipelines.views.dali", "fastmoco_kernels.cut_views.op"):
        monkeypatch.setattr(importlib.import_module(module), "native_library", lambda: None)
    with pytest.warns(RuntimeWarning, match="without a C compiler: views are cut by plain torch"):
        plain = ViewPipeline(specs, batch_size=3, threads=1)
    assert all(
        torch.equal(a, b) for a, b in zip(compiled, plain.run(photographs[:3], draws), strict=True)
    )


def test_the_two_modes_may_stand_side_by_side(photographs) -> None:
    """Each view has its own mode, with the draws of either the same."""
    (dali1, dali2), (exact1, exact2) = dali_pair(32), moco_v3_views(32)
    draws1, draws2 = draw(dali1, photographs), draw(dali2, photographs, view=2)
    again = draw(exact1, photographs)
    for field in dataclasses.fields(ViewDraws):
        assert np.array_equal(getattr(again, field.name), getattr(draws1, field.name))

    def run(one: ViewSpec, two: ViewSpec) -> tuple[torch.Tensor, torch.Tensor]:
        return ViewPipeline((one, two), batch_size=COUNT, threads=1).run(
            photographs, (draws1, draws2)
        )

    mixed, plain, exact = run(exact1, dali2), run(dali1, dali2), run(exact1, exact2)
    assert torch.equal(mixed[0], exact[0])
    assert torch.equal(mixed[1], plain[1])
    assert not torch.equal(plain[0], exact[0])


def spec_of(folder, **changes) -> LoaderSpec:
    view1, view2 = moco_v3_views(16)
    options = {"views": (view1, view2), "global_batch_size": 12, "seed": 7, "threads": 1}
    return LoaderSpec(shards=str(folder), **options | changes)


def take(spec: LoaderSpec, steps: int, **options) -> list[Batch]:
    with build_loader(spec, **options) as loader:
        return [loader.next() for _ in range(steps)]


@pytest.fixture(scope="module")
def whole(packed) -> list[Batch]:
    return take(spec_of(packed), 5)  # 45 images: the second epoch begins with step 3


def test_the_loader_delivers_the_reference(packed, whole) -> None:
    spec = spec_of(packed)
    with ShardSet.open(str(packed)) as shards:
        for batch in whole:
            ids = batch.sample_ids
            images = [decode(image) for image in shards.read(ids)]
            for number, made in ((1, batch.views[0]), (2, batch.views[1])):
                view = spec.views[number - 1]
                draws = draw_views(
                    view,
                    seed=7,
                    epoch=batch.step // 3,
                    sample_ids=ids,
                    sizes=shards.sizes[ids],
                    view=number,
                )
                expected = np.stack(
                    [reference_view(image, view, draws, i) for i, image in enumerate(images)]
                )
                np.testing.assert_allclose(made.numpy(), expected, atol=1e-6)
    assert all(
        batch.views[0].dtype == torch.float32 and batch.views[0].is_contiguous() for batch in whole
    )


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("start", [0, 3])
def test_ranks_and_restarts_are_bit_identical(packed, whole, world_size, start) -> None:
    spec = spec_of(packed, threads=2, prefetch=1)
    ranks = [
        take(spec, 2, rank=rank, world_size=world_size, start_step=start)
        for rank in range(world_size)
    ]
    for i, wanted in enumerate(whole[start : start + 2]):
        parts = [batches[i] for batches in ranks]
        assert {part.step for part in parts} == {wanted.step}
        assert torch.equal(torch.cat([part.views[0] for part in parts]), wanted.views[0])
        assert torch.equal(torch.cat([part.views[1] for part in parts]), wanted.views[1])


def test_preview_shows_the_mode(packed, tmp_path) -> None:
    pictures = {
        name: save_view_grid(str(packed), pair, tmp_path / f"{name}.png", rows=2).read_bytes()
        for name, pair in {
            "dali": dali_pair(32),
            "exact": moco_v3_views(32),
            "again": moco_v3_views(32),
        }.items()
    }
    assert pictures["exact"] == pictures["again"] != pictures["dali"]


def test_spec_knows_two_modes() -> None:
    assert ViewSpec().color == "exact"
    assert {view.color for view in moco_v3_views()} == {"exact"}
    with pytest.raises(ValueError, match=r"color='pil': is \"dali\" or \"exact\""):
        ViewSpec(color="pil")


def test_configs_carry_the_mode() -> None:
    """Reachable from the command line, absent from older files, and a change when a run
    continues."""
    from fastmoco.config.serial import differences, flatten, from_json, to_json
    from fastmoco.recipes import get_recipe

    exact = get_recipe("vit_s16_e300_b1024")
    assert flatten(exact)["data.view1.color"] == flatten(exact)["data.view2.color"] == "exact"
    assert from_json(json.loads(json.dumps(to_json(exact)))) == exact
    older = json.loads(json.dumps(to_json(exact)))
    del older["data"]["view1"]["color"]
    assert differences(from_json(older), exact) == ["data.view1.color: 'dali' -> 'exact'"]


@pytest.mark.gpu
def test_gpu_equals_cpu_but_for_the_resize(photographs) -> None:
    """DALI decodes and resizes on a GPU, a level away from Pillow; what is done to the bytes then
    is the same."""
    view1, view2 = moco_v3_views(SIZE)
    draws1, draws2 = draw(view1, photographs), draw(view2, photographs, view=2)
    expected = ViewPipeline((view1, view2), batch_size=COUNT, threads=2).run(
        photographs, (draws1, draws2)
    )
    pipeline = ViewPipeline((view1, view2), batch_size=COUNT, threads=2, device="gpu", device_id=0)
    first = pipeline.run(photographs, (draws1, draws2))
    again = pipeline.run(photographs, (draws1, draws2))
    for a, b, cpu in zip(first, again, expected, strict=True):
        assert a.is_cuda
        assert torch.equal(a, b)
        assert level_errors(a.cpu().numpy(), cpu.numpy()).mean() < 1
