"""The Gaussian blur equals Pillow's to the bit: any sigma, any shape, on every backend that runs
here."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from fastmoco_kernels.blur import launch
from fastmoco_kernels.blur.op import bytes_moved, gaussian_blur

GOLDEN = Path(__file__).parents[1] / "golden" / "aug.npz"


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def by_pillow(images: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
    """[B, C, H, W], a plane at a time: Pillow blurs every channel alone."""
    planes = [
        [
            np.asarray(
                Image.fromarray(plane.numpy()).filter(ImageFilter.GaussianBlur(float(sigma)))
            )
            for plane in image.contiguous()
        ]
        for image, sigma in zip(images, sigmas, strict=True)
    ]
    return torch.from_numpy(np.array(planes))


# One pixel, lines shorter than a box, ragged sizes, and a plane beyond one piece; one channel,
# three and four.
@pytest.mark.parametrize(
    "shape", [(3, 1, 1), (3, 1, 7), (1, 2, 40), (3, 23, 31), (4, 64, 48), (1, 260, 270)]
)
def test_equals_pillow(shape, device) -> None:
    # No blur, boxes of radius 0 (below 1.41), 1 (below 2.45: the end of MoCo v3's range), 2, and
    # wide ones.
    sigmas = torch.tensor([0.0, 0.1, 0.7, 1.4142, 1.4143, 2.0, 2.46, 5.0, 11.0])
    images = noise(len(sigmas), *shape)
    made = gaussian_blur(images.to(device), sigmas, backend="torch").cpu()
    assert torch.equal(made, by_pillow(images, sigmas))


@pytest.mark.parametrize("i", range(5))
def test_equals_the_stored_blur(i: int) -> None:
    golden = np.load(GOLDEN)
    image = torch.from_numpy(golden["img"]).permute(2, 0, 1)[None]
    made = gaussian_blur(image, torch.tensor([float(golden[f"blur{i}_sigma"])]))
    assert np.array_equal(made[0].permute(1, 2, 0).numpy(), golden[f"blur{i}"])


def test_is_near_a_true_gaussian() -> None:
    """What the boxes stand for; Pillow's own distance is 0.6 levels in the mean at worst here,
    where the blur moves 10."""
    coarse = Image.fromarray(noise(12, 12).numpy()).resize((96, 96), Image.Resampling.BICUBIC)
    image = torch.from_numpy(np.array(coarse))[None, None]
    for sigma in (0.5, 1.0, 2.0):
        taps = torch.arange(-9, 10, dtype=torch.float64)
        weights = torch.exp(-(taps**2) / (2 * sigma**2))
        weights /= weights.sum()
        padded = torch.nn.functional.pad(image.double(), (9, 9, 9, 9), mode="replicate")
        truth = torch.nn.functional.conv2d(padded, (weights[:, None] * weights)[None, None])
        error = (gaussian_blur(image, torch.tensor([sigma])).double() - truth).abs().mean()
        assert error < 0.8


def test_triton_equals_torch(device) -> None:
    """Two blocks a plane with a ragged end; radii -1, 0, 1 and 3 in one launch."""
    images, sigmas = noise(4, 1, 31, 41, seed=1), torch.tensor([0.0, 1.1, 2.2, 4.0])
    made = gaussian_blur(images.to(device), sigmas, backend="triton").cpu()
    assert torch.equal(made, gaussian_blur(images, sigmas, backend="torch"))


def test_sigmas_on_the_device_and_any_layout(device) -> None:
    images = noise(2, 9, 11, 3, seed=2).permute(0, 3, 1, 2)
    sigmas = torch.tensor([0.5, 2.0], dtype=torch.float64)
    made = gaussian_blur(images.to(device), sigmas.to(device))
    assert made.is_contiguous()
    assert torch.equal(made.cpu(), by_pillow(images, sigmas))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_the_argument_is_not_changed(backend, device) -> None:
    images = noise(1, 1, 8, 8).to(device)
    before = images.clone()
    gaussian_blur(images, torch.tensor([1.5]), backend=backend)
    assert torch.equal(images, before)


def test_is_an_operator_of_torch(device) -> None:
    images, sigmas = noise(2, 3, 6, 5).to(device), torch.tensor([1.0, 0.0])
    torch.library.opcheck(torch.ops.fastmoco.gaussian_blur.default, (images, sigmas, False))
    compiled = torch.compile(
        lambda x, s: gaussian_blur(x, s) + 1, backend="aot_eager", fullgraph=True
    )
    assert torch.equal(compiled(images, sigmas), gaussian_blur(images, sigmas) + 1)


@pytest.mark.parametrize(
    ("images", "sigmas", "words"),
    [
        (torch.zeros(1, 1, 2, 2), torch.ones(1), r"torch.float32 \(1, 1, 2, 2\); need uint8"),
        (
            torch.zeros(1, 2, 2, dtype=torch.uint8),
            torch.ones(1),
            r"\(1, 2, 2\); need uint8 \[B, C, H, W\]",
        ),
        (torch.zeros(1, 1, 0, 2, dtype=torch.uint8), torch.ones(1), "are empty"),
        (
            torch.zeros(2, 1, 2, 2, dtype=torch.uint8),
            torch.ones(3),
            r"2 images but sigmas of shape \(3,\)",
        ),
        (
            torch.zeros(2, 1, 2, 2, dtype=torch.uint8),
            torch.tensor([1.0, -1.0]),
            "sigma of image 1 is -1.0",
        ),
        (
            torch.zeros(1, 1, 2, 2, dtype=torch.uint8),
            torch.tensor([float("nan")]),
            "sigma of image 0 is nan",
        ),
    ],
)
def test_wrong_calls_are_refused(images, sigmas, words) -> None:
    with pytest.raises(ValueError, match=words):
        gaussian_blur(images, sigmas)
    with pytest.raises(ValueError, match=r"backend='cuda' is none of"):
        gaussian_blur(torch.zeros(1, 1, 2, 2, dtype=torch.uint8), torch.ones(1), backend="cuda")


def test_bytes_are_those_of_the_launches(monkeypatch) -> None:
    """Every pass gets one tensor to read and one to write, each of the images' size."""
    moved = 0

    class Recorder:
        def __getitem__(self, grid):
            def launch_one(source, target, *arguments, **options) -> None:
                nonlocal moved
                moved += source.nbytes + target.nbytes

            return launch_one

    monkeypatch.setattr(launch, "box_pass_kernel", Recorder())
    launch.blur_triton(
        torch.zeros(4, 3, 10, 12, dtype=torch.uint8), torch.zeros(4, 4, dtype=torch.int32)
    )
    assert moved == bytes_moved(4, 10, 12)
