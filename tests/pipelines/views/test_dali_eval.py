"""The plain view of the evaluation: DALI against PIL, whatever the image's shape; bombs; the GPU's
stream."""

import io
import resource

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("nvidia.dali")

from fastmoco_pipelines.spec import IMAGENET_STD, EvalSpec
from fastmoco_pipelines.views.dali import DecodeError, EvalPipeline
from fastmoco_pipelines.views.reference import reference_eval


def encode(image: Image.Image) -> np.ndarray:
    out = io.BytesIO()
    image.save(out, "PNG")
    return np.frombuffer(out.getvalue(), dtype=np.uint8)


@pytest.fixture(scope="module")
def photograph() -> Image.Image:
    """One of the two photographs that scikit-learn carries (CC-BY), 640 x 427 pixels."""
    from sklearn.datasets import load_sample_images

    return Image.fromarray(load_sample_images().images[1])


def level_error(made: np.ndarray, expected: np.ndarray) -> float:
    """Mean absolute difference in levels of 0 to 255."""
    return float((np.abs(made - expected) * 255 * np.array(IMAGENET_STD)[:, None, None]).mean())


@pytest.mark.parametrize(
    ("width", "height"), [(640, 427), (333, 500), (301, 200), (97, 97), (2000, 30), (31, 900)]
)
def test_eval_view_equals_pil(width: int, height: int, photograph) -> None:
    spec = EvalSpec(size=64, resize=73)
    image = photograph.resize((width, height))
    made = EvalPipeline(spec, batch_size=2, threads=1).run([encode(image)]).numpy()
    assert level_error(made[0], reference_eval(image, spec)) < 0.3


def test_a_line_of_pixels_is_not_blown_up(photograph) -> None:
    """16384 x 1 pixels resized to a height of 256 would be 3 GiB; only the central square is
    made."""
    line = np.random.default_rng(0).integers(0, 256, (1, 16384, 3), dtype=np.uint8)
    pipeline = EvalPipeline(EvalSpec(), batch_size=1, threads=1)
    pipeline.run([encode(photograph)])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for turned in (line, line.transpose(1, 0, 2)):
        made = pipeline.run([encode(Image.fromarray(turned))]).numpy()
        middle = (
            turned[8142:8242] if turned.shape[1] == 1 else turned[:, 8142:8242]
        )  # about the same centre
        assert level_error(made[0], reference_eval(middle, EvalSpec())) < 0.3
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 << 10  # KiB


def test_a_bomb_is_refused_before_it_is_decoded() -> None:
    with pytest.raises(DecodeError, match=r"image 0: 8000x8000 pixels in .* bomb"):
        EvalPipeline(EvalSpec(), batch_size=1).run([encode(Image.new("1", (8000, 8000)))])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_views_do_not_wait_for_the_trainer(photograph) -> None:
    encoded = [encode(photograph)] * 24
    pipeline = EvalPipeline(EvalSpec(size=64, resize=73), batch_size=24, device="gpu", device_id=0)
    expected = pipeline.run(encoded).cpu()
    torch.cuda._sleep(4_000_000_000)  # cycles: about two seconds of work on the default stream
    made = pipeline.run(encoded)
    assert not torch.cuda.default_stream().query()
    assert torch.equal(made.cpu(), expected)
