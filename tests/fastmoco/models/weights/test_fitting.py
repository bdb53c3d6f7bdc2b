"""Weights of a file in an encoder: everything has a place, or the error names what has none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastmoco.checkpoint import CheckpointError
from fastmoco.models.positions import sincos_positions
from fastmoco.models.resnet import resnet18, resnet_nano
from fastmoco.models.vit import VisionTransformer
from fastmoco.models.weights.fitting import fit_encoder, resample_positions
from fastmoco.models.weights.foreign import EncoderWeights, find_encoder, fixed_positions
from fastmoco.models.weights.reading import RawWeights
from tests.official_checkpoints import official_resnet18, official_vit, sincos_table


def weights(tensors: dict[str, Tensor], heads: int | None = 4) -> EncoderWeights:
    raw = RawWeights(path=Path("w.pth"), tensors=tensors)
    return replace(find_encoder(raw), heads=heads)


def target(**sizes: int) -> dict[str, Tensor]:
    """The state of a ViT with a projector."""
    sizes = {"image_size": 8, "patch_size": 2, "embed_dim": 64, "depth": 2, "num_heads": 4, **sizes}
    encoder = VisionTransformer(**sizes)  # type: ignore[arg-type]
    encoder.head = torch.nn.Linear(sizes["embed_dim"], 3)
    return encoder.state_dict()


def test_all_tensors_of_the_trunk_are_taken_and_what_is_left_is_listed() -> None:
    trunk = official_vit()
    fit = fit_encoder(
        target(), weights(trunk | {"head.weight": torch.ones(9, 64)}), positions="sincos", heads=4
    )
    assert fit.counts() == {"matched": 30, "resampled": 0, "left at start": 2, "not used": 1}
    assert fit.tensors.keys() == trunk.keys() - {"pos_embed"}
    assert all(fit.tensors[name] is trunk[name] for name in fit.tensors)
    lines = fit.lines()
    assert lines[0] == (
        "      matched   30  cls_token, pos_embed, patch_embed.proj.weight, "
        "patch_embed.proj.bias and 26 more"
    )
    assert lines[2:] == [
        "left at start    2  head.weight, head.bias",
        "     not used    1  classifier (head.weight)",
    ]


def test_the_fixed_tables_are_told_apart() -> None:
    for grid, width in ((4, 64), (7, 16)):
        assert fixed_positions(sincos_table(grid, width), grid) == "sincos"
        rows_and_columns = sincos_table(grid, width).split(width // 2, dim=2)
        of_mae = torch.cat(rows_and_columns[::-1], dim=2)
        assert fixed_positions(of_mae, grid) == "sincos_columns"
        assert fixed_positions(of_mae + 0.01, grid) is None


def test_fixed_positions_of_another_grid_are_computed_not_resampled() -> None:
    fit = fit_encoder(target(), weights(official_vit(grid=7)), positions="sincos", heads=4)
    assert list(fit.resampled) == ["pos_embed"]
    assert "computed for 4 x 4 instead of 7 x 7" in fit.resampled["pos_embed"]
    assert "pos_embed" not in fit.tensors
    learned = official_vit(positions=torch.rand(1, 17, 64))
    with pytest.raises(CheckpointError, match=r"give --model\.positions learned"):
        fit_encoder(target(), weights(learned), positions="sincos", heads=4)


def test_learned_positions_are_taken_or_resampled() -> None:
    table = torch.rand(1, 17, 64)
    same = fit_encoder(
        target(), weights(official_vit(positions=table)), positions="learned", heads=4
    )
    assert same.tensors["pos_embed"] is table
    assert same.counts()["resampled"] == 0
    table = torch.rand(1, 1 + 49, 64)
    other = fit_encoder(
        target(), weights(official_vit(positions=table)), positions="learned", heads=4
    )
    assert other.resampled == {"pos_embed": "(7 x 7 to 4 x 4, bicubic)"}
    found = other.tensors["pos_embed"]
    assert found.shape == (1, 17, 64)
    assert torch.equal(found[:, 0], table[:, 0])


def test_resampling_keeps_what_it_must() -> None:
    # A plane stays a plane inside, a constant stays everywhere, and the same grid changes nothing.
    rows = torch.arange(6.0)[:, None].expand(6, 6)
    plane = torch.stack([rows, torch.full((6, 6), 3.0)], dim=-1).reshape(1, 36, 2)
    same = resample_positions(plane, 6, 6, prefix=0)
    torch.testing.assert_close(same, plane)
    large = resample_positions(plane, 6, 12, prefix=0).reshape(12, 12, 2)
    torch.testing.assert_close(large[..., 1], torch.full((12, 12), 3.0))
    torch.testing.assert_close(large[4:8, 5, 0], (torch.arange(4.0, 8.0) + 0.5) / 2 - 0.5)


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"depth": 3}, r"blocks\.2\.norm1\.weight is missing.*width 64 and 2 blocks.*vit_nano"),
        ({"depth": 1}, r"blocks\.1\.norm1\.weight has no place here"),
        ({"embed_dim": 32}, r"cls_token has shape \(1, 1, 64\) in the file, \(1, 1, 32\) here"),
        ({"patch_size": 4}, r"patches of 2 pixels, the run of 4: give --model.patch-size 2"),
        ({"num_heads": 2}, "is of 4 attention heads, and the encoder of this run has 2"),
    ],
)
def test_what_does_not_fit_is_named_with_the_cure(sizes: dict[str, int], words: str) -> None:
    heads = sizes.get("num_heads", 4)
    with pytest.raises(CheckpointError, match=words):
        fit_encoder(target(**sizes), weights(official_vit()), positions="sincos", heads=heads)


def test_heads_that_the_file_does_not_show_are_those_of_the_run() -> None:
    fit = fit_encoder(target(), weights(official_vit(), None), positions="sincos", heads=4)
    assert fit.notes == ["4 attention heads, as the run has; the file does not show them"]

    # A ViT-S is of 6 heads in timm and of 12 here: the shapes do not tell.
    small = weights(official_vit(width=384, depth=12, positions=torch.rand(1, 17, 384)), None)
    place = target(embed_dim=384, depth=12, num_heads=12)
    with pytest.raises(CheckpointError, match=r"12 for MoCo v3 and 6 for timm.*--heads N"):
        fit_encoder(place, small, positions="learned", heads=12)


def test_a_resnet_fits_its_own_size_alone() -> None:
    found = weights(official_resnet18(), None)
    fit = fit_encoder(resnet18().state_dict(), found, positions="sincos")
    assert fit.counts() == {"matched": 120, "resampled": 0, "left at start": 0, "not used": 0}
    with pytest.raises(CheckpointError, match="The file is another ResNet"):
        fit_encoder(resnet_nano().state_dict(), found, positions="sincos")
    with pytest.raises(CheckpointError, match="a ResNet, the encoder of the run a ViT"):
        fit_encoder(target(), found, positions="learned", heads=4)


def test_weights_that_are_not_finite_are_refused() -> None:
    trunk = official_vit()
    trunk["norm.bias"][3] = torch.inf
    with pytest.raises(CheckpointError, match=r"norm\.bias is not finite"):
        fit_encoder(target(), weights(trunk), positions="sincos", heads=4)


def test_our_table_is_that_of_the_description() -> None:
    torch.testing.assert_close(sincos_positions(4, 64)[None], sincos_table(4, 64))
