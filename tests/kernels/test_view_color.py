"""view_color in plain torch: equal to Pillow's arithmetic to the bit, in every order."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastmoco_kernels.view_color.op import IMAGENET_MEAN, IMAGENET_STD, level_factors, view_color
from fastmoco_kernels.view_color.plan import ViewColorParameters
from fastmoco_pipelines.views.reference import adjust_hue
from tests.kernels.view_color_cases import LEVELS, ORDERS, by_pillow, drawn, pictures

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "aug.npz")


# 72 images see each order three times. One pixel; sizes at which images go together; a ragged one;
# alone.
@pytest.mark.parametrize(
    ("count", "height", "width"), [(72, 1, 1), (72, 8, 8), (72, 40, 37), (24, 90, 120)]
)
def test_equals_pillow_in_every_order(count, height, width) -> None:
    images, parameters = pictures(count, height, width), drawn(count)
    assert len({tuple(order) for order in parameters.order.tolist()}) == 24
    made = view_color(images, parameters, **LEVELS, backend="torch")
    wrong = (made != by_pillow(images, parameters)).flatten(1).any(1)
    assert not wrong.any(), f"images {wrong.nonzero().view(-1).tolist()} differ"


@pytest.mark.parametrize(("first", "second"), [(0, 1), (1, 2), (1, 3)])
def test_the_order_matters(first, second) -> None:
    """What the test above would miss if both sides left the order out: two orders give two
    results."""
    images, parameters = (
        pictures(1, 16, 16),
        drawn(1, brightness=torch.tensor([1.5]), contrast=torch.tensor([0.5])),
    )
    parameters = parameters._replace(
        saturation=torch.tensor([1.8]), hue=torch.tensor([0.3]), order=torch.zeros(1, 4)
    )
    swapped = [i for i in range(4) if i not in (first, second)]
    one, other = (
        parameters._replace(order=torch.tensor([[*pair, *swapped]], dtype=torch.uint8))
        for pair in ((first, second), (second, first))
    )
    assert not torch.equal(view_color(images, one), view_color(images, other))


def test_every_colour_turns_as_in_pillow() -> None:
    """All 2^24 of them, by three sevenths of a turn."""
    axis = np.arange(256, dtype=np.uint8)
    for start in range(0, 256, 32):
        cube = np.stack(np.meshgrid(axis[start : start + 32], axis, axis, indexing="ij"), -1)
        parameters = ViewColorParameters.neutral(32)._replace(hue=torch.full((32,), 3 / 7))
        made = view_color(torch.from_numpy(cube), parameters, **LEVELS, dtype=torch.float16)
        expected = np.asarray(
            adjust_hue(Image.fromarray(cube.reshape(8192, 256, 3)), float(np.float32(3 / 7)))
        )
        assert np.array_equal(made.permute(0, 2, 3, 1).numpy().reshape(8192, 256, 3), expected)


@pytest.mark.parametrize(
    ("stored", "field", "value"),
    [
        ("brightness", "brightness", GOLDEN["brightness_factor"]),
        ("contrast", "contrast", GOLDEN["contrast_factor"]),
        ("saturation", "saturation", GOLDEN["saturation_factor"]),
        ("hue0", "hue", GOLDEN["hue0_factor"]),
        ("hue1", "hue", GOLDEN["hue1_factor"]),
        ("gray", "grayscale", True),
        ("solarize", "solarize", True),
        ("blur1", "blur_sigma", GOLDEN["blur1_sigma"]),
    ],
)
def test_equals_the_stored_operation(stored, field, value) -> None:
    value = torch.tensor([value.item() if isinstance(value, np.ndarray) else value])
    parameters = ViewColorParameters.neutral(1)._replace(**{field: value})
    made = view_color(torch.from_numpy(GOLDEN["img"])[None], parameters, **LEVELS)
    assert np.array_equal(made[0].permute(1, 2, 0).numpy(), GOLDEN[stored])


def test_normalises_as_stored_and_in_every_type() -> None:
    images, neutral = torch.from_numpy(GOLDEN["img"])[None], ViewColorParameters.neutral(1)
    made = view_color(images, neutral)
    np.testing.assert_allclose(made[0].numpy(), GOLDEN["normalized"], atol=1e-6)
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(view_color(images, neutral, dtype=dtype), made.to(dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(view_color(images, neutral), made)


@pytest.mark.parametrize("channels_last", [False, True])
def test_levels_are_what_is_normalised(channels_last) -> None:
    """As bytes, whatever mean and std are, and Pillow's."""
    images, parameters = pictures(30, 13, 11), drawn(30)
    made = view_color(
        images, parameters, dtype=torch.uint8, channels_last=channels_last, solarize_threshold=100
    )
    assert made.dtype == torch.uint8
    assert made.stride() == view_color(images, parameters, channels_last=channels_last).stride()
    assert torch.equal(made.float(), by_pillow(images, parameters, 100))
    scale, shift = (
        torch.tensor(x)[:, None, None] for x in level_factors(IMAGENET_MEAN, IMAGENET_STD)
    )
    assert torch.equal(made * scale + shift, view_color(images, parameters, solarize_threshold=100))


def test_a_large_image_has_its_exact_mean() -> None:
    """Beyond 2^16 pixels a float32 sum of levels would round."""
    images = pictures(1, 300, 301) // 2 + 127
    parameters = ViewColorParameters.neutral(1)._replace(contrast=torch.tensor([1.4]))
    assert torch.equal(view_color(images, parameters, **LEVELS), by_pillow(images, parameters))


def test_layout() -> None:
    images, parameters = pictures(6, 12, 9), drawn(6)
    plain = view_color(images, parameters)
    assert plain.is_contiguous()
    last = view_color(images, parameters, channels_last=True)
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(last, plain)
    strided = pictures(6, 12, 9).permute(0, 2, 1, 3).contiguous().permute(0, 2, 1, 3)
    assert torch.equal(view_color(strided, parameters), plain)
    assert torch.equal(images, pictures(6, 12, 9))  # the argument is as it was


def test_a_row_depends_on_its_own_image_and_parameters() -> None:
    images, parameters = pictures(48, 10, 10), drawn(48)
    whole = view_color(images, parameters)
    rows = torch.randperm(48, generator=torch.Generator().manual_seed(0))[:11]
    some = view_color(images[rows], ViewColorParameters(*(field[rows] for field in parameters)))
    assert torch.equal(some, whole[rows])


def test_threshold_of_solarize() -> None:
    images, parameters = (
        pictures(4, 6, 6),
        ViewColorParameters.neutral(4)._replace(solarize=torch.ones(4) > 0),
    )
    for threshold in (0, 100, 256):
        made = view_color(images, parameters, **LEVELS, solarize_threshold=threshold)
        assert torch.equal(made, by_pillow(images, parameters, threshold))


def test_is_an_operator_of_torch() -> None:
    images, parameters = pictures(4, 6, 5), drawn(4)
    scale, shift = (
        [1 / (255 * s) for s in IMAGENET_STD],
        [-m / s for m, s in zip(IMAGENET_MEAN, IMAGENET_STD, strict=True)],
    )
    for dtype, channels_last in (
        (torch.float32, False),
        (torch.bfloat16, True),
        (torch.uint8, False),
    ):
        arguments = (images, *parameters, scale, shift, 128, dtype, channels_last, False)
        torch.library.opcheck(torch.ops.fastmoco.view_color.default, arguments)
    compiled = torch.compile(lambda x, p: view_color(x, p) * 2, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(images, parameters), view_color(images, parameters) * 2)


@pytest.mark.parametrize(
    ("change", "options", "words"),
    [
        ({"brightness": torch.ones(2)}, {}, r"brightness is \(2,\) but 3 images need \(3,\)"),
        ({"order": torch.zeros(3)}, {}, r"order is \(3,\) but 3 images need \(3, 4\)"),
        (
            {"order": torch.tensor(ORDERS[:3]) % 2},
            {},
            r"order of image 0 is \[0, 1, 0, 1\]; must be a permutation",
        ),
        ({"contrast": torch.tensor([1.0, -0.1, 1.0])}, {}, "contrast of image 1 is -0.1"),
        (
            {"saturation": torch.tensor([1.0, 1.0, float("nan")])},
            {},
            "saturation of image 2 is nan",
        ),
        ({"hue": torch.tensor([0.6, 0.0, 0.0])}, {}, "hue of image 0 is 0.6"),
        ({"blur_sigma": torch.tensor([0.0, float("inf"), 0.0])}, {}, "sigma of image 1 is inf"),
        ({"flip": torch.zeros(3, dtype=torch.bool, device="meta")}, {}, "flip is on meta"),
        ({}, {"std": (1, 0, 1)}, r"std=\(1, 0, 1\) must be positive"),
        ({}, {"mean": (1, 0)}, "mean has 2 numbers but an image has 3 channels"),
        ({}, {"dtype": torch.float64}, "dtype=torch.float64"),
        ({}, {"solarize_threshold": 257}, "solarize_threshold=257"),
        ({}, {"backend": "dali"}, "backend='dali'"),
    ],
)
def test_wrong_calls_are_refused(change, options, words) -> None:
    parameters = ViewColorParameters.neutral(3)._replace(**change)
    with pytest.raises(ValueError, match=words):
        view_color(pictures(3, 4, 4), parameters, **options)


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (torch.zeros(1, 4, 4, 3), "torch.float32"),
        (torch.zeros(1, 3, 4, 4, dtype=torch.uint8), r"\(1, 3, 4, 4\); need uint8 \[B, H, W, 3\]"),
        (torch.zeros(1, 0, 4, 3, dtype=torch.uint8), "are empty"),
        (
            torch.zeros(1, 1, 1, 3, dtype=torch.uint8).expand(1, 4096, 4096, 3),
            "of 4096 x 4096 pixels",
        ),
    ],
)
def test_wrong_images_are_refused(images, words) -> None:
    with pytest.raises(ValueError, match=words):
        view_color(images, ViewColorParameters.neutral(1))
