"""DALI against the PIL reference, image by image with the same draws; formats, memory, errors."""

import dataclasses
import io

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("nvidia.dali")

from fastmoco_pipelines.spec import IMAGENET_STD, EvalSpec, ViewSpec, moco_v3_views
from fastmoco_pipelines.views.arguments import color_matrices, operations
from fastmoco_pipelines.views.dali import DecodeError, EvalPipeline, ViewPipeline
from fastmoco_pipelines.views.draws import ViewDraws, draw_views
from fastmoco_pipelines.views.reference import adjust_hue, reference_eval, reference_view
from tests.pipelines.dali_cases import JITTER, NOTHING

COUNT, SIZE = 24, 112


def encode(image: Image.Image, kind: str = "PNG", **options) -> np.ndarray:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return np.frombuffer(out.getvalue(), dtype=np.uint8)


def decode(encoded: np.ndarray) -> Image.Image:
    return Image.open(io.BytesIO(encoded.tobytes()))


@pytest.fixture(scope="module")
def photographs() -> list[Image.Image]:
    """Pieces of the two photographs that scikit-learn carries (CC-BY), about 300 pixels a side."""
    from sklearn.datasets import load_sample_images

    rng = np.random.default_rng(0)
    pieces = []
    for i in range(COUNT):
        levels = load_sample_images().images[i % 2]
        height, width = rng.integers(200, 400, size=2)
        top, left = (
            rng.integers(0, levels.shape[0] - height),
            rng.integers(0, levels.shape[1] - width),
        )
        pieces.append(Image.fromarray(levels[top : top + height, left : left + width]))
    return pieces


@pytest.fixture(scope="module")
def encoded(photographs: list[Image.Image]) -> list[np.ndarray]:
    return [encode(photograph, "JPEG", quality=92) for photograph in photographs]


def draw(spec: ViewSpec, encoded: list[np.ndarray], *, view: int = 1, seed: int = 0) -> ViewDraws:
    sizes = np.array([decode(image).size[::-1] for image in encoded], dtype=np.int32)
    return draw_views(
        spec, seed=seed, epoch=0, sample_ids=np.arange(len(encoded)), sizes=sizes, view=view
    )


def part(draws: ViewDraws, index) -> ViewDraws:
    return ViewDraws(
        **{field.name: getattr(draws, field.name)[index] for field in dataclasses.fields(draws)}
    )


def level_errors(made: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """[B] mean absolute difference of each image, in levels of 0 to 255."""
    return (np.abs(made - expected) * 255 * np.array(IMAGENET_STD)[:, None, None]).mean(
        axis=(1, 2, 3)
    )


CUBIC = {"interpolation": "bicubic"}
# name: (fields, largest mean level error, largest error of one image). The bounds are about one and
# a half times what was measured; docs/views.md says where the errors come from. Hue has a test of
# its own.
OPERATIONS = {
    "crop and resize": (NOTHING, 0.22, 0.3),
    "flip": (NOTHING | {"flip_probability": 0.5}, 0.22, 0.3),
    "bicubic and flip": (NOTHING | CUBIC | {"flip_probability": 0.5}, 0.3, 0.4),
    "brightness": (JITTER | {"brightness": 0.4}, 0.22, 0.4),
    "contrast": (JITTER | {"contrast": 0.4}, 0.27, 0.5),
    "brightness and contrast": (JITTER | {"brightness": 0.4, "contrast": 0.4}, 0.25, 0.5),
    "saturation": (JITTER | {"saturation": 0.2}, 0.27, 0.4),
    "greyscale": (NOTHING | {"grayscale_probability": 0.5}, 0.22, 0.3),
    "solarize": (NOTHING | {"solarize_probability": 0.5}, 0.22, 0.3),
    "blur": (NOTHING | {"blur_probability": 1}, 0.7, 1.4),
    "all but hue": ({"hue": 0, "solarize_probability": 0.2}, 0.75, 1.6),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_operation_equals_pil(name: str, photographs, encoded) -> None:
    fields, mean_bound, image_bound = OPERATIONS[name]
    spec = ViewSpec(**{"color": "dali", "size": SIZE, "blur_sigma": (0.1, 2.0), **fields})
    draws = draw(spec, encoded)
    made = (
        ViewPipeline((spec, spec), batch_size=COUNT, threads=1)
        .run(encoded, (draws, draws))[0]
        .numpy()
    )
    decoded = [decode(image) for image in encoded]
    expected = np.stack([reference_view(image, spec, draws, i) for i, image in enumerate(decoded)])
    untouched = ViewSpec(size=SIZE, color="dali", **NOTHING)
    plain_draws = dataclasses.replace(draw(untouched, encoded), crop=draws.crop)
    plain = np.stack(
        [reference_view(image, untouched, plain_draws, i) for i, image in enumerate(decoded)]
    )
    errors, moved = level_errors(made, expected), level_errors(expected, plain)
    print(
        f"\n{name}: mean {errors.mean():.3f}, worst image {errors.max():.3f}, itself moves {moved.mean():.2f}"
    )
    assert errors.mean() < mean_bound
    assert errors.max() < image_bound
    if fields is not NOTHING:
        assert moved.mean() > 1  # the operation did something here


def test_hue_is_the_nearest_rotation(encoded) -> None:
    """HSV's hue shift is no matrix. The rotation about grey misses it by less than it moves, and by
    less than YIQ's."""
    from nvidia.dali import Pipeline, fn, types

    spec = ViewSpec(**{"color": "dali", "size": SIZE, **JITTER, "hue": 0.1})
    draws = draw(spec, encoded)
    made = (
        ViewPipeline((spec, spec), batch_size=COUNT, threads=1)
        .run(encoded, (draws, draws))[0]
        .numpy()
    )
    decoded = [decode(image) for image in encoded]
    expected = np.stack([reference_view(image, spec, draws, i) for i, image in enumerate(decoded)])
    still = ViewSpec(size=SIZE, color="dali", **NOTHING)
    plain = (
        ViewPipeline((still, still), batch_size=COUNT, threads=1)
        .run(encoded, (draws, draws))[0]
        .numpy()
    )

    pipeline = Pipeline(batch_size=COUNT, num_threads=1, device_id=None, prefetch_queue_depth=1)
    with pipeline:
        levels = fn.external_source(name="levels", ndim=3, dtype=types.UINT8, layout="HWC")
        pipeline.set_outputs(
            fn.hsv(levels, hue=fn.external_source(name="hue", ndim=0, dtype=types.FLOAT))
        )
    std, mean = np.array(spec.std)[:, None, None], np.array(spec.mean)[:, None, None]
    levels = np.rint((plain * std + mean) * 255).astype(np.uint8).transpose(0, 2, 3, 1)
    pipeline.feed_input("levels", np.ascontiguousarray(levels))
    pipeline.feed_input("hue", draws.hue * np.float32(360))
    turned = np.asarray(pipeline.run()[0].as_tensor()).transpose(0, 3, 1, 2)
    in_yiq = (turned / 255 - mean) / std

    error, moved, yiq_error = (level_errors(a, expected).mean() for a in (made, plain, in_yiq))
    print(
        f"\nhue: mean {error:.2f}, itself moves {moved:.2f}, DALI's hsv would miss by {yiq_error:.2f}"
    )
    assert error < 0.9 * moved
    assert error < 0.7 * yiq_error


def test_a_third_of_a_turn_exchanges_the_channels(photographs) -> None:
    draws = draw(ViewSpec(color="dali", **JITTER), [encode(photographs[0])])
    draws = dataclasses.replace(draws, hue=np.array([1 / 3], dtype=np.float32))
    (matrix,) = color_matrices(draws)
    np.testing.assert_allclose(matrix, [[0, 0, 1], [1, 0, 0], [0, 1, 0]], atol=1e-6)
    levels = np.asarray(photographs[0])
    by_pil = np.asarray(adjust_hue(photographs[0], 1 / 3)).astype(int)
    assert np.abs(by_pil - levels @ matrix.T).mean() < 2  # PIL keeps its hue in one byte


def test_moco_pair_of_a_batch(photographs, encoded) -> None:
    """The default pair, both views: the whole chain with hue in it."""
    view1, view2 = moco_v3_views(SIZE, color="dali")
    draws1, draws2 = draw(view1, encoded, view=1), draw(view2, encoded, view=2)
    pipeline = ViewPipeline((view1, view2), batch_size=COUNT, threads=2)
    for spec, draws, made in zip(
        (view1, view2), (draws1, draws2), pipeline.run(encoded, (draws1, draws2)), strict=True
    ):
        assert made.shape == (COUNT, 3, SIZE, SIZE)
        assert str(made.dtype) == "torch.float32"
        expected = np.stack(
            [reference_view(decode(image), spec, draws, i) for i, image in enumerate(encoded)]
        )
        errors = level_errors(made.numpy(), expected)
        print(f"\nwhole view: mean {errors.mean():.2f}, worst image {errors.max():.2f}")
        assert errors.mean() < 6
        # Where hue is untouched or color is gone, nothing but rounding differs.
        assert (errors[draws.hue == 0] < 2).all()


def test_tiny_grey_images_crop_exactly() -> None:
    """8 x 8 greys: a window's border must not see what lies beyond it; three equal channels come
    out."""
    rng = np.random.default_rng(0)
    encoded = [
        encode(Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8))) for _ in range(64)
    ]
    spec = ViewSpec(size=16, crop_scale=(0.3, 1.0), color="dali", **NOTHING)
    draws = draw(spec, encoded)
    made = (
        ViewPipeline((spec, spec), batch_size=64, threads=1).run(encoded, (draws, draws))[0].numpy()
    )
    expected = np.stack(
        [reference_view(decode(image), spec, draws, i) for i, image in enumerate(encoded)]
    )
    assert level_errors(made, expected).max() < 0.5
    levels = made * np.array(spec.std)[:, None, None] + np.array(spec.mean)[:, None, None]
    assert np.ptp(levels, axis=1).max() < 1e-5


def test_operations_without_effect_are_not_in_the_graph() -> None:
    assert operations(ViewSpec()) == frozenset()  # with exact color all are done elsewhere
    assert operations(ViewSpec(color="dali", **NOTHING)) == frozenset()
    assert operations(ViewSpec(color="dali", **JITTER)) == frozenset()
    assert operations(ViewSpec(color="dali", **JITTER | {"hue": 0.1})) == {"color"}
    assert operations(ViewSpec(color="dali", **NOTHING | {"grayscale_probability": 0.1})) == {
        "color"
    }
    assert "blur" in operations(moco_v3_views(224, color="dali")[1])
    assert "blur" not in operations(
        moco_v3_views(16, color="dali")[0]
    )  # up to 0.14 pixels: a neighbour's share is exp(-24)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_depends_on_its_image_and_draws_alone(threads: int, encoded) -> None:
    """Order, neighbours, batch size and threads change nothing, to the bit."""
    view1, view2 = moco_v3_views(32, color="dali")
    draws1, draws2 = draw(view1, encoded), draw(view2, encoded, view=2)
    whole = ViewPipeline((view1, view2), batch_size=COUNT, threads=1).run(encoded, (draws1, draws2))
    order = np.random.default_rng(0).permutation(COUNT)[:7]
    pipeline = ViewPipeline((view1, view2), batch_size=COUNT, threads=threads)
    some = pipeline.run([encoded[i] for i in order], (part(draws1, order), part(draws2, order)))
    for a, b in zip(whole, some, strict=True):
        assert np.array_equal(a.numpy()[order], b.numpy())


def test_later_runs_leave_earlier_outputs_alone(encoded) -> None:
    view1, view2 = moco_v3_views(32, color="dali")
    pipeline = ViewPipeline((view1, view2), batch_size=COUNT, threads=2)
    kept = []
    for seed in range(8):
        outputs = pipeline.run(
            encoded, (draw(view1, encoded, seed=seed), draw(view2, encoded, view=2, seed=seed))
        )
        kept.append([(output, output.clone()) for output in outputs])
    del pipeline
    flat = [pair for pairs in kept for pair in pairs]
    assert len({output.data_ptr() for output, _ in flat}) == len(flat)
    for output, copy in flat:
        assert np.array_equal(output.numpy(), copy.numpy())


def formats(photograph: Image.Image) -> dict[str, np.ndarray]:
    small = photograph.resize((48, 40))
    grey, alpha = small.convert("L"), small.copy()
    alpha.putalpha(grey)
    turned = Image.Exif()
    turned[0x0112] = 6  # "rotate by 90 degrees"
    return {
        "JPEG": encode(small, "JPEG"),
        "JPEG grey": encode(grey, "JPEG"),
        "JPEG CMYK": encode(small.convert("CMYK"), "JPEG"),
        "JPEG progressive": encode(small, "JPEG", progressive=True),
        "JPEG with EXIF rotation": encode(small, "JPEG", exif=turned.tobytes()),
        "PNG": encode(small),
        "PNG grey": encode(grey),
        "PNG palette": encode(small.convert("P")),
        "PNG palette with transparency": encode(small.convert("P"), transparency=3),
        "PNG grey and alpha": encode(alpha.convert("LA")),
        "PNG alpha": encode(alpha),
        "PNG black and white": encode(small.convert("1")),
        "PNG 16 bit": encode(Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)),
        "WebP": encode(small, "WEBP"),
        "WebP lossless with alpha": encode(alpha, "WEBP", lossless=True),
    }


def test_every_format_decodes_as_pil_does(photographs) -> None:
    """To three channels, alpha dropped, EXIF rotation not applied (a rotated image would be 40 wide
    here, not 48)."""
    spec = EvalSpec(size=40, resize=40, mean=(0, 0, 0), std=(1, 1, 1))
    files = formats(photographs[0])
    made = (
        EvalPipeline(spec, batch_size=len(files), threads=1).run(list(files.values())).numpy() * 255
    )
    for levels, (name, data) in zip(made, files.items(), strict=True):
        image = decode(data)
        if image.mode == "I;16":
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        error = np.abs(levels - reference_eval(image, spec) * 255).mean()
        assert error < 0.01, (name, error)


def test_a_refused_image_is_named_and_the_pipeline_goes_on(encoded) -> None:
    spec = ViewSpec(size=16, color="dali", **NOTHING)
    draws = draw(spec, encoded[:4])
    pipeline = ViewPipeline((spec, spec), batch_size=4, threads=1)
    before = pipeline.run(encoded[:4], (draws, draws))[0]
    text = np.frombuffer(b"<html>", dtype=np.uint8)
    with pytest.raises(
        DecodeError, match=r"2 of 4 images .* image 1: neither JPEG nor PNG"
    ) as caught:
        pipeline.run([encoded[0], text, encoded[2], text[:0]], (draws, draws))
    assert [row for row, _ in caught.value.faults] == [1, 3]
    half = encoded[3][: len(encoded[3]) // 2]  # its header is whole: the decoder has to notice
    with pytest.raises(DecodeError, match="decod") as caught:
        pipeline.run([*encoded[:3], half], (draws, draws))
    assert caught.value.faults == ()
    assert np.array_equal(before.numpy(), pipeline.run(encoded[:4], (draws, draws))[0].numpy())


def test_wrong_counts_are_named(encoded) -> None:
    spec = ViewSpec(size=16, color="dali", **NOTHING)
    pipeline = ViewPipeline((spec, spec), batch_size=4, threads=1)
    draws = draw(spec, encoded[:5])
    with pytest.raises(ValueError, match="draws of view 1=5: needs one row for each of 4 images"):
        pipeline.run(encoded[:4], (draws, draws))
    with pytest.raises(ValueError, match="encoded=5: holds 1 to 4 images"):
        pipeline.run(encoded[:5], (draws, draws))
    with pytest.raises(ValueError, match="threads=0"):
        EvalPipeline(EvalSpec(), batch_size=1, threads=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_views_equal_cpu_views(encoded) -> None:
    view1, view2 = moco_v3_views(SIZE, color="dali")
    draws = draw(view1, encoded), draw(view2, encoded, view=2)
    by_cpu = ViewPipeline((view1, view2), batch_size=COUNT, device="cpu").run(encoded, draws)
    by_gpu = ViewPipeline((view1, view2), batch_size=COUNT, device="gpu", device_id=0).run(
        encoded, draws
    )
    for on_cpu, on_gpu in zip(by_cpu, by_gpu, strict=True):
        assert on_gpu.is_cuda
        errors = level_errors(on_gpu.cpu().numpy(), on_cpu.numpy())
        print(f"\nGPU against CPU: mean {errors.mean():.2f}")
        assert errors.mean() < 2  # the GPU's JPEG decoder rounds and upsamples color in its own way
