"""view_color's kernels against its torch path: equal to the bit, whatever is launched."""

import numpy as np
import pytest
import torch

from fastmoco_kernels.blur import launch as blur_launch
from fastmoco_kernels.blur.boxes import extended_boxes
from fastmoco_kernels.view_color import launch
from fastmoco_kernels.view_color.op import bytes_moved, view_color
from fastmoco_kernels.view_color.plan import ViewColorParameters
from tests.kernels.view_color_cases import LEVELS, by_pillow, drawn, pictures


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def on(device: str, parameters: ViewColorParameters) -> ViewColorParameters:
    return ViewColorParameters(*(field.to(device) for field in parameters))


def test_equals_pillow_in_every_order(device) -> None:
    images, parameters = pictures(24, 7, 9), drawn(24, blur_sigma=torch.zeros(24))
    made = view_color(images.to(device), parameters, **LEVELS, backend="triton").cpu()
    assert torch.equal(made, by_pillow(images, parameters))


# More pixels than a block; one pixel (Triton makes arguments of 1 constants); half precision;
# channels innermost; levels: with some images blurred, and with none.
@pytest.mark.parametrize(
    ("shape", "blurred", "options"),
    [
        ((27, 41), [1], {}),
        ((1, 1), [1], {}),
        ((5, 6), [2], {"dtype": torch.float16}),
        ((6, 5), [0], {"channels_last": True}),
        ((4, 4), [], {"channels_last": True, "dtype": torch.float16, "solarize_threshold": 90}),
        ((27, 41), [1], {"dtype": torch.uint8}),
        ((1, 1), [0, 2], {"dtype": torch.uint8, "channels_last": True}),
    ],
)
def test_equals_torch(shape, blurred, options, device) -> None:
    sigma = torch.zeros(3)
    sigma[blurred] = 1.7
    images, parameters = (
        pictures(3, *shape, seed=3),
        drawn(3, seed=5, blur_sigma=sigma, solarize=torch.ones(3) > 0),
    )
    made = view_color(images.to(device), parameters, backend="triton", **options)
    expected = view_color(images, parameters, backend="torch", **options)
    assert made.stride() == expected.stride()
    assert torch.equal(made.cpu(), expected)


def test_levels_are_pillows_to_the_bit(device) -> None:
    """Every level from 0 to 255."""
    images = (
        torch.arange(256, dtype=torch.uint8)
        .repeat_interleave(3)
        .view(1, 16, 16, 3)
        .repeat(2, 1, 1, 1)
    )
    images[1] = pictures(1, 16, 16)[0]
    parameters = ViewColorParameters.neutral(2)._replace(
        blur_sigma=torch.tensor([0, 1.2]), flip=torch.ones(2) > 0
    )
    made = view_color(images.to(device), parameters, dtype=torch.uint8, backend="triton").cpu()
    assert made.dtype == torch.uint8
    assert torch.equal(made.float(), by_pillow(images, parameters))
    assert len(made[0].unique()) == 256


@pytest.mark.gpu
def test_parameters_on_the_device_and_bf16() -> None:
    """Then the host looks at nothing: every launch is made, and images without a blur pass through
    the boxes unchanged."""
    images, parameters = pictures(48, 60, 44), drawn(48)
    there, parameters_there = images.cuda(), on("cuda", parameters)
    for dtype in (torch.float32, torch.bfloat16, torch.uint8):
        view_color(
            there, parameters_there, dtype=dtype, backend="triton"
        )  # compiles, and copies the table of late hues
        torch.cuda.set_sync_debug_mode("error")
        try:
            made = view_color(there, parameters_there, dtype=dtype, backend="triton")
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.equal(made.cpu(), view_color(images, parameters, dtype=dtype, backend="torch"))


@pytest.mark.gpu
def test_torch_on_a_gpu_rounds_as_on_a_cpu() -> None:
    """Where a quotient by a number would be a product with its reciprocal: boxes of device sigmas,
    grey means on a tie."""
    sigmas = torch.linspace(0.1, 2.0, 10_001)
    assert torch.equal(extended_boxes(sigmas.cuda()).cpu(), extended_boxes(sigmas))
    for pixels in range(2, 800, 2):
        images = torch.zeros(1, 1, pixels, 3, dtype=torch.uint8)
        images[:, :, : pixels // 2] = 1  # a mean of half a level
        parameters = ViewColorParameters.neutral(1)._replace(contrast=torch.zeros(1))
        made = view_color(images.cuda(), parameters, **LEVELS, backend="torch").cpu()
        assert torch.equal(made, view_color(images, parameters, **LEVELS, backend="torch")), pixels


def test_all_launches_give_what_the_needed_ones_give(device, monkeypatch) -> None:
    """The launches for parameters on a GPU, made here for parameters on any device."""
    images, parameters = pictures(2, 5, 5), drawn(2, blur_sigma=torch.tensor([0.0, 1.0]))
    needed = view_color(images.to(device), parameters, backend="triton")
    monkeypatch.setattr(launch, "_needs", lambda tables: (True, len(tables.steps)))
    assert torch.equal(view_color(images.to(device), parameters, backend="triton"), needed)


def test_bytes_are_those_of_the_launches(monkeypatch) -> None:
    """Pixels that the launches are given: all of the images and of the result, planes for blurred
    images alone."""
    moved = 0

    class Recorder:
        def __init__(self, *pixel_tensors: tuple[int, float]) -> None:
            self.pixel_tensors = (
                pixel_tensors  # position of the argument, share of it that is touched
            )

        def __getitem__(self, grid):
            def launch_one(*arguments, **options) -> None:
                nonlocal moved
                moved += round(
                    sum(arguments[at].nbytes * share for at, share in self.pixel_tensors)
                )

            return launch_one

    images, sigma = pictures(6, 10, 12), torch.tensor([0, 1.0, 0, 2.0, 0, 0])
    contrast = torch.tensor([1.5, 1, 1, 0.5, 1, 1])
    parameters = ViewColorParameters.neutral(6)._replace(contrast=contrast, blur_sigma=sigma)
    # Of the images only those with contrast are read for a mean; of the result either launch writes
    # its own images.
    monkeypatch.setattr(launch, "grey_sum_kernel", Recorder((0, 2 / 6)))
    monkeypatch.setattr(launch, "view_color_kernel", Recorder((0, 1), (5, 1), (6, 4 / 6)))
    monkeypatch.setattr(launch, "finish_kernel", Recorder((0, 1), (3, 2 / 6)))
    monkeypatch.setattr(blur_launch, "box_pass_kernel", Recorder((0, 1), (1, 1)))
    if torch.cuda.is_available():
        images = images.cuda()
    view_color(images, parameters, dtype=torch.float16, backend="triton")
    assert moved == bytes_moved(6, 10, 12, dtype=torch.float16, with_contrast=2, blurred=2)


def test_nothing_that_is_not_needed_is_launched(device, monkeypatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("launched")

    for name in ("grey_sum_kernel", "finish_kernel"):
        monkeypatch.setattr(launch, name, type("Refusing", (), {"__getitem__": refuse})())
    monkeypatch.setattr(launch, "blur_triton", refuse)
    images = pictures(1, 4, 4)
    parameters = ViewColorParameters.neutral(1)._replace(brightness=torch.tensor([0.5]))
    made = view_color(images.to(device), parameters, **LEVELS, backend="triton").cpu()
    assert np.array_equal(made, by_pillow(images, parameters))
