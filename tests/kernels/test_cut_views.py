"""cut_views: whole views on the CPU, against Pillow, the plain path and view_color."""

from __future__ import annotations

import ctypes
import re

import numpy as np
import pytest
import torch
from PIL import Image

from fastmoco_kernels import ViewColorParameters, cut_views
from fastmoco_kernels.cut_views import native
from fastmoco_kernels.cut_views.op import INTERPOLATIONS
from fastmoco_kernels.cut_views.reference import resize_reference
from fastmoco_pipelines.views import reference
from tests.kernels.view_color_cases import LEVELS, by_pillow, drawn, pictures

BACKENDS = ("native", "torch")
SHAPES = [
    (375, 500),
    (500, 375),
    (30, 41),
    (1, 1),
    (224, 224),
    (640, 97),
    (97, 640),
    (33, 224),
    (480, 480),
    (7, 300),
]


def photos(seed: int = 0) -> list[np.ndarray]:
    """Noise and smooth images of several sizes."""
    rng = np.random.default_rng(seed)
    images = []
    for i, (height, width) in enumerate(SHAPES):
        noise = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        if i % 2:
            small = Image.fromarray(noise).resize((max(1, width // 9), max(1, height // 9)))
            noise = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC))
        images.append(noise)
    return images


def windows(images: list[np.ndarray], seed: int = 0) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    crops = np.zeros((len(images), 4), np.int32)
    for row, image in enumerate(images):
        for axis in range(2):
            length = rng.integers(1, image.shape[axis] + 1)
            crops[row, 2 + axis] = length
            crops[row, axis] = rng.integers(0, image.shape[axis] - length + 1)
    return torch.from_numpy(crops)


def resized(
    images: list[np.ndarray], crops: torch.Tensor, size: int, interpolation: str = "bilinear"
) -> torch.Tensor:
    """[B, size, size, 3] uint8 by Pillow."""
    cut = [
        np.asarray(
            reference.crop_and_resize(Image.fromarray(image), tuple(crop), size, interpolation)
        )
        for image, crop in zip(images, crops.tolist(), strict=True)
    ]
    return torch.from_numpy(np.stack(cut))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("size", [224, 96, 33, 8, 1])
def test_the_resize_is_pillows_to_the_bit(backend: str, interpolation: str, size: int) -> None:
    images = photos(size)
    neutral = ViewColorParameters.neutral(len(images))
    how = {"size": size, "backend": backend, "interpolation": interpolation}
    for seed in range(3):
        crops = windows(images, seed)
        views = cut_views(images, crops, neutral, **how, **LEVELS)
        want = resized(images, crops, size, interpolation)
        assert torch.equal(views, want.permute(0, 3, 1, 2).float())


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_the_resize_of_any_window_is_pillows_to_the_bit(interpolation: str) -> None:
    """Sizes spread evenly in the logarithm; noise of 0 and 255, whose cubic leaves the bytes; one
    window in four is a line of pixels."""
    rng = np.random.default_rng(11)
    for number in range(150):
        high, wide = np.exp(rng.uniform(0, np.log(700), 2)).astype(int)
        image = rng.integers(0, 256, (high, wide, 3), dtype=np.uint8)
        if number % 2:
            image = np.where(image > 127, np.uint8(255), np.uint8(0))
        crop = windows([image], seed=number)
        if number % 4 == 0:
            crop[0, 2 + rng.integers(2)] = 1
        size = int(rng.choice([1, 2, 7, 49, 96, 97, 224]))
        got = cut_views(
            [image],
            crop,
            ViewColorParameters.neutral(1),
            size=size,
            dtype=torch.uint8,
            interpolation=interpolation,
        )
        want = resized([image], crop, size, interpolation)
        assert torch.equal(got, want.permute(0, 3, 1, 2)), (high, wide, crop, size)


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize(("shape", "size"), [((1, 9000), 3), ((9000, 1), 3), ((2, 3), 700)])
def test_long_lines_and_large_views_are_pillows(
    interpolation: str, shape: tuple[int, int], size: int
) -> None:
    image = np.random.default_rng(4).integers(0, 256, (*shape, 3), dtype=np.uint8)
    crop = torch.tensor([[0, 0, *shape]], dtype=torch.int32)
    neutral, want = ViewColorParameters.neutral(1), resized([image], crop, size, interpolation)
    for backend in BACKENDS:
        how = {"size": size, "interpolation": interpolation, "backend": backend}
        got = cut_views([image], crop, neutral, dtype=torch.uint8, **how)
        assert torch.equal(got, want.permute(0, 3, 1, 2)), backend


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize(
    ("base", "size"), [(256, 224), (37, 32), (9, 8), (300, 1), (96, 40), (33, 33)]
)
def test_a_part_of_the_resized_window_is_pillows_to_the_bit(
    backend: str, interpolation: str, base: int, size: int
) -> None:
    """The filter ends at the window, not at the part."""
    images, rng = photos(size), np.random.default_rng(base)
    parameters, crops = drawn(len(images), seed=size), windows(images, size)
    room = base - size
    corners = rng.integers(0, room + 1, (len(images), 2)).astype(np.int32)
    corners[:2] = [[0, room], [room, 0]]
    whole = resized(images, crops, base, interpolation)
    parts = [whole[row, y : y + size, x : x + size] for row, (y, x) in enumerate(corners.tolist())]
    want = by_pillow(torch.stack(parts), parameters)
    how = {"size": size, "base_size": base, "interpolation": interpolation, "backend": backend}
    how["corners"] = torch.from_numpy(corners)
    assert torch.equal(cut_views(images, crops, parameters, **how, **LEVELS), want)
    levels = cut_views(images, crops, parameters, dtype=torch.uint8, threads=3, **how)
    assert torch.equal(levels.float(), want)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("size", "interpolation"), [(64, "bilinear"), (49, "bicubic")])
def test_a_whole_view_is_pillows_to_the_bit(backend: str, size: int, interpolation: str) -> None:
    images = photos(1) * 5  # fifty rows: every order of the jitter, and twice
    parameters = drawn(len(images), seed=2)
    crops = windows(images, 3)
    how = {"size": size, "interpolation": interpolation, "backend": backend}
    views = cut_views(images, crops, parameters, solarize_threshold=100, **how, **LEVELS)
    windows_by_pillow = resized(images, crops, size, interpolation)
    assert torch.equal(views, by_pillow(windows_by_pillow, parameters, threshold=100))


def test_every_colour_survives_each_operation_as_in_pillow() -> None:
    """All 2^24 colours once: where a hue lies on the border of two bytes, the last bit of a
    quotient decides."""
    levels = np.arange(256, dtype=np.uint8)
    rows = np.stack(np.meshgrid(levels, levels, indexing="ij"), -1).reshape(256, 256, 2)
    for red in range(256):
        image = np.concatenate([np.full((256, 256, 1), red, np.uint8), rows], axis=2)
        one = ViewColorParameters.neutral(1)._replace(hue=torch.tensor([0.1 if red % 2 else -0.07]))
        crop = torch.tensor([[0, 0, 256, 256]], dtype=torch.int32)
        got = cut_views([image], crop, one, size=256, backend="native", **LEVELS)
        want = np.asarray(reference.adjust_hue(Image.fromarray(image), float(one.hue[0])))
        assert np.array_equal(got[0].permute(1, 2, 0).numpy().astype(np.uint8), want), red


@pytest.mark.parametrize("sigma", [0.05, 0.1, 0.7, 1.3, 2.0, 2.6, 5.0, 40.0])
def test_blur_of_any_radius(sigma: float) -> None:
    images = [pictures(1, size, size, seed=size)[0].numpy() for size in (5, 31, 64)]
    for image in images:
        size = image.shape[0]
        crop = torch.tensor([[0, 0, size, size]], dtype=torch.int32)
        one = ViewColorParameters.neutral(1)._replace(blur_sigma=torch.tensor([sigma]))
        got = cut_views([image], crop, one, size=size, backend="native", **LEVELS)
        want = np.asarray(reference.gaussian_blur(Image.fromarray(image), sigma))
        assert np.array_equal(got[0].permute(1, 2, 0).numpy(), want), (size, sigma)


def test_normalised_values_are_equal_on_both_backends() -> None:
    images, parameters = photos(4), drawn(len(SHAPES), seed=5)
    crops = windows(images, 6)
    first, second = (
        cut_views(images, crops, parameters, size=40, backend=backend) for backend in BACKENDS
    )
    assert first.dtype == torch.float32
    assert torch.equal(first, second)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [40, 49, 1])
def test_levels_are_pillows_to_the_bit(backend: str, size: int) -> None:
    images, parameters = photos(4) * 2, drawn(2 * len(SHAPES), seed=5)
    crops = windows(images, 6)
    made = cut_views(
        images, crops, parameters, size=size, dtype=torch.uint8, threads=2, backend=backend
    )
    assert made.dtype == torch.uint8
    assert torch.equal(made.float(), by_pillow(resized(images, crops, size), parameters))


@pytest.mark.parametrize("threads", [2, 5, 64])
def test_threads_change_nothing(threads: int) -> None:
    images, parameters = photos(7), drawn(len(SHAPES), seed=8)
    crops = windows(images, 9)
    alone = cut_views(images, crops, parameters, size=65)
    assert torch.equal(cut_views(images, crops, parameters, size=65, threads=threads), alone)


def test_rows_of_any_distance_and_tensors_are_taken() -> None:
    image = photos(3)[0]
    wide = np.zeros((image.shape[0], image.shape[1] + 13, 3), np.uint8)
    wide[:, 5:-8] = image
    crop, neutral = windows([image], 1), ViewColorParameters.neutral(1)
    want = cut_views([image], crop, neutral, size=32)
    for other in (
        wide[:, 5:-8],
        np.asfortranarray(image),
        torch.from_numpy(image),
        image[:, ::-1][:, ::-1],
    ):
        assert torch.equal(cut_views([other], crop, neutral, size=32), want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_default_type_changes_nothing(backend: str) -> None:
    images, parameters = photos(4)[:3], drawn(3, seed=5)
    crops = windows(images, 6)
    want = cut_views(images, crops, parameters, size=20, backend=backend)
    torch.set_default_dtype(torch.float64)
    try:
        got = cut_views(images, crops, parameters, size=20, backend=backend)
    finally:
        torch.set_default_dtype(torch.float32)
    assert got.dtype == torch.float32
    assert torch.equal(got, want)


def test_no_images_give_no_views() -> None:
    empty = torch.zeros(0, 4, dtype=torch.int32)
    assert cut_views([], empty, ViewColorParameters.neutral(0), size=5).shape == (0, 3, 5, 5)


def test_without_a_compiled_library_torch_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    images, crops = photos(2)[:2], windows(photos(2)[:2], 2)
    neutral = ViewColorParameters.neutral(2)
    want = cut_views(images, crops, neutral, size=16, backend="torch")
    native.native_library.cache_clear()
    monkeypatch.setattr(native, "LIBRARY", "fastmoco_kernels.cut_views._absent")
    try:
        assert native.native_library() is None
        assert torch.equal(cut_views(images, crops, neutral, size=16), want)
        with pytest.raises(ValueError, match="install a C compiler"):
            cut_views(images, crops, neutral, size=16, backend="native")
    finally:
        native.native_library.cache_clear()


def test_a_thread_without_memory_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    class Short:
        @staticmethod
        def fastmoco_cut_views(batch: object) -> int:
            return -1

    monkeypatch.setattr(native, "native_library", lambda: Short)
    image = photos()[0]
    with pytest.raises(MemoryError, match="no memory to cut 1 views of 9 pixels"):
        cut_views(
            [image], windows([image]), ViewColorParameters.neutral(1), size=9, backend="native"
        )


def test_a_library_older_than_its_source_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    library = native.native_library()
    if library is None:
        pytest.skip("needs the compiled part")
    monkeypatch.setattr(native, "LEVELS", "fastmoco_cut_future")
    monkeypatch.setattr(native, "native_library", lambda: library)
    image = photos()[0]
    arguments = ([image], windows([image]), ViewColorParameters.neutral(1))
    assert cut_views(*arguments, size=9, backend="native").dtype == torch.float32
    cure = r"older than its source\. Install fastmoco again"
    with pytest.raises(RuntimeError, match=cure):
        cut_views(*arguments, size=9, dtype=torch.uint8, backend="native")
    monkeypatch.setattr(native, "BICUBIC", "_future")
    with pytest.raises(RuntimeError, match=f"no fastmoco_cut_views_future.*{cure}"):
        cut_views(*arguments, size=9, interpolation="bicubic", backend="native")
    monkeypatch.setattr(native, "PART", "_later")
    part = {"base_size": 9, "corners": torch.zeros(1, 2, dtype=torch.int32)}
    with pytest.raises(RuntimeError, match=f"no fastmoco_cut_views_later.*{cure}"):
        cut_views(*arguments, size=9, backend="native", **part)


def test_the_structure_is_laid_out_as_in_c() -> None:
    assert ctypes.sizeof(native._Batch) == 8 * (3 + len(native._POINTERS) + 3)


IMAGE = np.zeros((20, 30, 3), np.uint8)
CROP = torch.tensor([[2, 3, 10, 12]], dtype=torch.int32)
CORNER = torch.tensor([[0, 2]], dtype=torch.int32)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"images": [IMAGE[..., 0]]}, "image 0 is uint8 (20, 30); need uint8 [H, W, 3]"),
        ({"images": [IMAGE.astype(np.float32)]}, "image 0 is float32"),
        ({"images": [IMAGE[:0]]}, "image 0 is uint8 (0, 30, 3)"),
        ({"crops": CROP.long()}, "crops are torch.int64 (1, 4)"),
        ({"crops": CROP[:, :3]}, "1 images need torch.int32 (1, 4)"),
        (
            {"crops": CROP + torch.tensor([0, 20, 0, 0], dtype=torch.int32)},
            "image 0 of 20 x 30 pixels does not hold it",
        ),
        ({"crops": CROP * torch.tensor([1, 1, 0, 1], dtype=torch.int32)}, "(2, 3, 0, 12)"),
        ({"crops": -CROP}, "(-2, -3, -10, -12)"),
        (
            {"crops": torch.tensor([[2**31 - 1, 0, 2**31 - 1, 1]], dtype=torch.int32)},
            "does not hold it",
        ),
        ({"parameters": ViewColorParameters.neutral(2)}, "brightness is (2,)"),
        ({"size": 0}, "size=0 is outside 1 to 32768"),
        ({"solarize_threshold": 257}, "solarize_threshold=257"),
        ({"dtype": torch.float16}, "dtype=torch.float16 is neither torch.float32 nor torch.uint8"),
        ({"interpolation": "cubic"}, "interpolation='cubic' is none of ('bilinear', 'bicubic')"),
        ({"threads": 0}, "threads=0; needs at least one"),
        ({"base_size": 9}, "base_size=9 needs corners"),
        ({"corners": CORNER}, "base_size=0 needs corners, which need a base_size from size=8"),
        ({"base_size": 7, "corners": CORNER}, "base_size=7 needs corners"),
        ({"base_size": 10, "corners": CORNER.long()}, "corners are torch.int64 (1, 2)"),
        ({"base_size": 10, "corners": CORNER[:, :1]}, "1 images need torch.int32 (1, 2)"),
        ({"base_size": 9, "corners": CORNER}, "corner 0 is (top, left) = (0, 2); a view of 8"),
        ({"base_size": 10, "corners": -CORNER}, "corner 0 is (top, left) = (0, -2)"),
        ({"std": (1, 0, 1)}, "cut_views: std=(1, 0, 1) must be positive"),
        ({"mean": (1, 0)}, "cut_views: mean has 2 numbers"),
        ({"backend": "triton"}, "backend='triton' is none of ('auto', 'native', 'torch')"),
        (
            {"parameters": ViewColorParameters.neutral(1)._replace(hue=torch.tensor([0.7]))},
            "cut_views: hue of image 0 is 0.69",
        ),
    ],
)
def test_wrong_calls_are_named(changes: dict[str, object], text: str) -> None:
    arguments = {
        "images": [IMAGE],
        "crops": CROP,
        "parameters": ViewColorParameters.neutral(1),
        "size": 8,
    } | changes
    with pytest.raises(ValueError, match=re.escape(text)):
        cut_views(
            arguments.pop("images"),
            arguments.pop("crops"),
            arguments.pop("parameters"),
            **arguments,
        )


def test_the_plain_resize_knows_both_directions() -> None:
    """A ramp stays a ramp: not a comparison of two implementations of one formula."""
    ramp = torch.arange(0, 200, 2, dtype=torch.uint8)[None, :, None].expand(10, 100, 3)
    half = resize_reference(ramp, 50)
    assert (half[0, 1:-1, 0].float() - (torch.arange(1, 49) * 4 + 1)).abs().max() <= 1
    assert torch.equal(half[0], half[49])
