from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastmoco.evaluation.embed import embed, raw_pixels
from fastmoco_pipelines.loading.batch import EvalBatch


def batches(*sizes: int, side: int = 4) -> Iterator[EvalBatch]:
    rng, start = torch.Generator().manual_seed(0), 0
    for size in sizes:
        ids = np.arange(start, start + size, dtype=np.int64)
        images = torch.randn(size, 3, side, side, generator=rng)
        yield EvalBatch(images=images, labels=ids % 7, sample_ids=ids)
        start += size


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Flatten(), nn.Linear(48, 8), nn.BatchNorm1d(8), nn.Dropout(0.5)
        )
        self.modes: list[bool] = []

    def forward(self, images: Tensor) -> Tensor:
        assert (
            not torch.is_grad_enabled()
        )  # no graph is built, which would hold every layer's memory
        self.modes.append(self.training)
        features: Tensor = self.trunk(images)
        return features

    def encode(self, images: Tensor) -> Tensor:
        features: Tensor = self(images)
        return features.bfloat16()


def test_features_and_labels_in_order_as_eval_mode_gives_them() -> None:
    torch.manual_seed(0)
    encoder = Encoder()
    features, labels = embed(encoder, batches(5, 5, 2))
    assert (features.shape, features.dtype, features.device.type) == ((12, 8), torch.float32, "cpu")
    assert labels.tolist() == [i % 7 for i in range(12)]
    assert labels.dtype == torch.int64
    assert not features.requires_grad
    images = torch.cat([batch.images for batch in batches(5, 5, 2)])
    with torch.no_grad():
        torch.testing.assert_close(features, encoder.eval()(images))
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("as_method", [False, True])
def test_modes_and_buffers_come_back_as_they_were(as_method: bool) -> None:
    encoder = Encoder().train()
    encoder.trunk[3].eval()  # a part that differs from the whole
    buffers = {name: value.clone() for name, value in encoder.state_dict().items()}
    embed(encoder.encode if as_method else encoder, batches(4, 3))
    assert encoder.modes == [False, False]
    assert [
        part.training for part in (encoder, encoder.trunk, encoder.trunk[2], encoder.trunk[3])
    ] == [
        True,
        True,
        True,
        False,
    ]
    assert all(torch.equal(value, buffers[name]) for name, value in encoder.state_dict().items())


def test_modes_come_back_after_an_error() -> None:
    encoder = Encoder().train()

    def broken() -> Iterator[EvalBatch]:
        yield from batches(4)
        raise OSError("shard lost")

    with pytest.raises(OSError, match="shard lost"):
        embed(encoder, broken())
    assert encoder.training
    assert encoder.trunk[2].training


def test_any_function_and_low_precision_will_do() -> None:
    features, _ = embed(lambda images: images.flatten(1)[:, :3].bfloat16(), batches(4))
    assert features.dtype == torch.float32
    assert features.shape == (4, 3)


def test_raw_pixels_are_the_pixels_and_own_their_memory() -> None:
    kept = list(batches(3, 2))
    features, labels = raw_pixels(kept)
    expected = torch.cat([batch.images for batch in kept]).flatten(1).clone()
    for batch in kept:
        batch.images.zero_()
    assert torch.equal(features, expected)
    assert labels.tolist() == [0, 1, 2, 3, 4]


def test_what_cannot_be_embedded_is_named() -> None:
    with pytest.raises(ValueError, match="no images"):
        embed(lambda images: images, [])
    with pytest.raises(ValueError, match=r"\(4, 3, 4, 4\) for 4 images"):
        embed(lambda images: images, batches(4))
    with pytest.raises(ValueError, match=r"\(1, 48\) for 4 images"):
        embed(lambda images: images[:1].flatten(1), batches(4))
