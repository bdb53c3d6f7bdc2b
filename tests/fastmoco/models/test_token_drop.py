"""Token dropping in the ViT: its fast path, its draws, and smaller views for larger patches."""

from __future__ import annotations

import copy
from typing import Any
from unittest import mock

import pytest
import torch
from torch.nn.functional import conv2d

from fastmoco.models import VisionTransformer, token_drop
from fastmoco.models.blocks import Block
from fastmoco.models.drop_path import PathDraws
from fastmoco.models.token_drop import TokenDraws, shrunk, taken

CPU = torch.device("cpu")
FORMS: dict[str, dict[str, Any]] = {
    "fixed positions": {},
    "trained": {"freeze_patch_embed": False, "positions": "learned"},
    "mean of tokens": {"pooling": "mean", "positions": "none"},
    "mean after norm": {"pooling": "norm_mean", "positions": "learned"},
    "class attention": {"pooling": "class_attention"},
    "conv stem": {"stem": "conv", "patch_size": 16, "image_size": 64},
}


def vit(**changes: Any) -> VisionTransformer:
    torch.manual_seed(0)
    sizes = {"image_size": 8, "patch_size": 2, "embed_dim": 16, "depth": 2, "num_heads": 2}
    encoder = VisionTransformer(**{**sizes, **changes}).double()
    with torch.no_grad():
        for parameter in encoder.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return encoder


def draw(images: int = 5, step: int = 0, view: int = 0) -> torch.Tensor:
    return TokenDraws(3)(images, view, tokens=16, kept=6, step=step, device=CPU)


@pytest.mark.parametrize("smaller", [False, True], ids=["own size", "smaller image"])
@pytest.mark.parametrize("form", FORMS)
def test_dropped_tokens_leave_no_trace(form: str, smaller: bool) -> None:
    encoder = vit(**FORMS[form])
    side = encoder.image_size // (2 if smaller else 1)
    images = torch.randn(5, 3, side, side, dtype=torch.float64)
    tokens = (side // encoder.patch_size) ** 2
    kept = TokenDraws(3)(5, 0, tokens=tokens, kept=tokens // 2, step=0, device=CPU)
    paths = PathDraws(0.6, 2, seed=3)(5, 1, 0, CPU)[:, 0]
    found = []
    for run in (
        encoder,
        lambda *given: encoder.encode(encoder.patch_tokens(given[0]), *given[1:]),
        encoder.plain,
    ):
        own = copy.deepcopy(dict(encoder.named_buffers()))
        encoder.zero_grad()
        feature = run(images, paths, kept)
        feature.square().sum().backward()
        found.append([feature, *(p.grad for p in encoder.parameters() if p.grad is not None)])
        encoder.load_state_dict(own, strict=False)
    for other in found[1:]:
        assert all(torch.allclose(a, b, 1e-11, 1e-11) for a, b in zip(found[0], other, strict=True))
    assert not torch.allclose(found[0][0], encoder(images, paths))

    # What is left out has no effect: a patch of other pixels changes nothing.
    if form != "conv stem":
        dropped = (set(range(tokens)) - set(kept[0].tolist())).pop()
        row, column = divmod(dropped, side // encoder.patch_size)
        images[0, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2] += 9
        assert torch.equal(encoder(images, paths, kept), found[0][0])


@pytest.mark.parametrize("form", ["trained", "class attention"])
def test_several_sets_of_tokens_are_several_passes(form: str) -> None:
    """Patches are embedded once, and the sets of an image are far apart in the batch."""
    encoder = vit(**FORMS[form] | {"freeze_patch_embed": False})
    images = torch.randn(5, 3, 8, 8, dtype=torch.float64)
    sets = [draw(), draw(view=1), draw(view=2)]
    kept = torch.cat(sets)
    alone = torch.cat([encoder.plain(images, None, one) for one in sets])
    weights = torch.randn_like(alone)
    gradients = []
    for features in (alone, encoder(images, None, kept), encoder.plain(images, None, kept)):
        assert torch.allclose(features, alone, 1e-12, 1e-12)
        encoder.zero_grad()
        (features * weights).sum().backward()
        gradients.append([p.grad for p in encoder.parameters() if p.requires_grad])
    for other in gradients[1:]:
        for a, b in zip(gradients[0], other, strict=True):
            assert torch.allclose(a, b, 1e-10, 1e-10)


@pytest.mark.parametrize("how", ["fused", "compiled", "selective", "full"])
def test_other_forms_of_the_blocks_give_the_same(how: str) -> None:
    encoder = vit()
    images, kept = torch.randn(5, 3, 8, 8, dtype=torch.float64), draw()
    expected = encoder(images, None, kept)
    for block in encoder.blocks:
        assert isinstance(block, Block)
        if how == "fused":
            block.fused = True
        elif how == "compiled":
            for name in ("forward", "class_row"):
                plain = getattr(block, name)
                setattr(block, name, torch.compile(plain, dynamic=False, backend="aot_eager"))
        else:
            block.recompute = how  # type: ignore[assignment]
    assert torch.allclose(encoder(images, None, kept), expected, 1e-12, 1e-12)


def test_tokens_that_stay_are_drawn_for_each_image_view_and_step() -> None:
    kept = draw(512)
    assert kept.shape == (512, 6)
    assert all(len(set(row)) == 6 for row in kept.tolist())
    counts = torch.bincount(kept.flatten(), minlength=16).double() / 512
    # Each token stays with probability 6 / 16: five standard deviations.
    assert float((counts - 6 / 16).abs().max()) < 5 * (6 / 16 * 10 / 16 / 512) ** 0.5
    # Order is that of the noise, not of the tokens.
    assert not torch.equal(kept, kept.sort(dim=1).values)
    sets = [tuple(draw(1, step, view)[0].tolist()) for step, view in ((0, 0), (0, 1), (1, 0))]
    assert len({tuple(row) for row in kept[:4].tolist()} | set(sets)) == 6


def test_a_rank_has_its_rows_whatever_the_number_of_ranks() -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    whole = draw(8, step=5)
    assert torch.equal(torch.get_rng_state(), state)
    for ranks in (2, 4):
        for rank in range(ranks):
            with mock.patch.object(token_drop, "group_rank", return_value=rank):
                own = draw(8 // ranks, step=5)
                assert torch.equal(own, whole[rank * len(own) :][: len(own)])


def test_taken_rows_may_be_shared_by_all_images() -> None:
    kept = draw(2)
    table = torch.randn(1, 16, 3)
    assert torch.equal(taken(table, kept), table[0][kept])


def test_a_smaller_view_is_the_projection_of_larger_patches() -> None:
    """By the same weights, each spread over a square of pixels: the pseudo-inverse of copying each
    pixel to such a square."""
    encoder = vit(freeze_patch_embed=False, positions="none")
    proj = encoder.patch_embed.proj
    images = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    (small,) = shrunk((images,), 4, 2)
    large = proj.weight.repeat_interleave(2, 2).repeat_interleave(2, 3) / 4
    expected = conv2d(images, large, proj.bias, stride=4).flatten(2).transpose(1, 2)
    assert torch.allclose(encoder.patch_tokens(small), expected, 1e-12, 1e-12)

    copies = torch.eye(4).view(4, 1, 2, 2).repeat_interleave(2, 2).repeat_interleave(2, 3)
    inverse = torch.linalg.pinv(copies.flatten(1)).double()  # of [4, 16], transposed
    spread = (inverse @ proj.weight.flatten(2).transpose(1, 2)).transpose(1, 2)
    assert torch.allclose(spread.reshape(large.shape), large, 1e-6, 1e-6)
