"""Float8 in the momentum encoder alone: the product against its reference, what goes stale, chunks,
state, and refusals.

``emulate`` multiplies what was rounded to float8 in float32, on any device; without it a CPU takes
the call a GPU would (`torch._scaled_mm`), where its torch has that for scales by row.
"""

from __future__ import annotations

import copy
import functools
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from fastmoco.distributed.mesh import World
from fastmoco.models import VisionTransformer, float8
from fastmoco.models.compiled import compile_blocks
from fastmoco.models.float8_inference import (
    Float8Linear,
    float8_layers,
    multiply,
    multiply_emulated,
    quantise_rows,
    use_float8_inference_,
)
from fastmoco.objectives import MoCoV3
from fastmoco.objectives.chunked import ChunkedStep
from fastmoco.recipes import quickstart_digits
from fastmoco.training.forward_backward import ForwardBackward
from tests.golden_objective import features_of, move_apart_

LAYERS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
BATCH = 13
autocast = functools.partial(torch.autocast, "cpu", torch.bfloat16)


def scaled_mm_runs_here() -> bool:
    """torch 2.11 multiplies with one scale a tensor on a CPU, later ones by row."""
    try:
        multiply(
            quantise_rows(torch.ones(16, 16)),
            quantise_rows(torch.ones(16, 16)),
            torch.zeros(16).bfloat16(),
        )
    except (RuntimeError, NotImplementedError):
        return False
    return True


needs_scaled_mm = pytest.mark.skipif(
    not scaled_mm_runs_here(), reason="this torch scales no rows on a CPU"
)


def encoder(depth: int = 3) -> VisionTransformer:
    return VisionTransformer(image_size=32, patch_size=8, embed_dim=64, depth=depth, num_heads=4)


def objectives(depth: int = 3) -> tuple[MoCoV3, MoCoV3, tuple[Tensor, Tensor]]:
    """An objective with its encoders apart, the same with a momentum encoder in float8, and two
    views."""
    torch.manual_seed(50)
    native = MoCoV3(functools.partial(encoder, depth=depth), projection_dim=32, hidden_dim=64)
    move_apart_(native, 0.02)
    ours = copy.deepcopy(native)
    use_float8_inference_(ours.momentum_encoder, emulate=True)
    view1, view2 = torch.randn(2, BATCH, 3, 32, 32).unbind()
    return native, ours, (view1, view2)


def relative(ours: Tensor, other: Tensor) -> float:
    return ((ours - other).norm() / other.norm()).item()


# The product


def rows_of_all_sizes() -> Tensor:
    """Rows 2^40 apart, one of zeros, one with entries far below its largest."""
    torch.manual_seed(51)
    matrix = torch.randn(50, 64) * torch.exp2(torch.linspace(-20, 20, 50))[:, None]
    matrix[7] = 0
    matrix[8, 1:] *= 1e-6
    return matrix


def test_rows_are_rounded_to_float8_by_scales_that_round_nothing() -> None:
    matrix = rows_of_all_sizes()
    values, scales = quantise_rows(matrix)
    assert values.dtype == torch.float8_e4m3fn
    assert torch.equal(scales, torch.exp2(scales.log2().round()))
    largest = values.float().abs().amax(dim=1)
    used = matrix.abs().amax(dim=1) > 0
    assert ((largest > 208) & (largest <= 448))[
        used
    ].all()  # an octave below 448, and what rounds down to it
    off = (values.float() * scales - matrix).abs()
    assert (off <= matrix.abs() * 2**-4 + scales * 2**-10).all()
    assert torch.equal(quantise_rows(matrix[3:9]).values.float(), values[3:9].float())
    assert torch.equal(
        quantise_rows(matrix.bfloat16()).values.float(),
        quantise_rows(matrix.bfloat16().float()).values.float(),
    )


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_so_and_stays_in_its_row(bad: float) -> None:
    matrix, weight = torch.randn(4, 32), quantise_rows(torch.randn(16, 32))
    matrix[2, 5] = bad
    out = multiply_emulated(quantise_rows(matrix), weight, torch.zeros(16).bfloat16())
    assert out[2].isnan().all()
    assert out[[0, 1, 3]].isfinite().all()


@needs_scaled_mm
def test_the_product_is_that_of_its_reference() -> None:
    torch.manual_seed(52)
    weight, bias = quantise_rows(torch.randn(48, 64)), torch.randn(48).bfloat16()
    x = quantise_rows(rows_of_all_sizes())
    ours, other = multiply(x, weight, bias), multiply_emulated(x, weight, bias)
    assert ours.dtype == other.dtype == torch.bfloat16
    wide = (x.values.float() * x.scales).abs() @ (weight.values.float() * weight.scales).abs().t()
    assert ((ours.float() - other.float()).abs() <= 2**-8 * other.float().abs() + 1e-6 * wide).all()


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [197 * 2 * 4, 63])
def test_on_a_gpu_it_is_too(rows: int) -> None:
    if torch.cuda.get_device_capability() < float8.CAPABILITY:
        pytest.skip("no float8 products here")
    torch.manual_seed(53)
    for K, N in ((384, 1152), (384, 384), (1536, 384)):
        x = torch.randn(rows, K, device="cuda") * torch.exp2(
            4 * torch.randn(rows, 1, device="cuda")
        )
        linear = nn.Linear(K, N, device="cuda")
        layer, reference = (Float8Linear(linear, emulate=emulate) for emulate in (False, True))
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
            ours, other = layer(x).float(), reference(x).float()
        # Both round to bf16, 2^-9; fast sums are cut to about 2^-14 once for every 32 of up to 1536
        # summands.
        assert ((ours - other).norm(dim=1) <= 2**-6 * other.norm(dim=1)).all()
        compiled = torch.compile(layer.forward, fullgraph=True, dynamic=False)
        layer.refresh_()
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
            again = compiled(x).float()
        assert ((again - ours).norm(dim=1) <= 2**-5 * ours.norm(dim=1)).all()
    torch.cuda.synchronize()


# Layers and state


def test_linears_of_all_blocks_but_the_last_are_taken_and_state_is_what_it_was() -> None:
    native, ours, _ = objectives()
    found = {name for name, part in ours.named_modules() if isinstance(part, Float8Linear)}
    assert found == {f"momentum_encoder.blocks.{i}.{layer}" for i in range(2) for layer in LAYERS}
    for layer in float8_layers(ours):
        layer.refresh_()
    assert list(ours.state_dict()) == list(native.state_dict())
    assert [n for n, _ in ours.named_buffers()] == [n for n, _ in native.named_buffers()]
    linear = nn.Linear(32, 32)
    assert Float8Linear(linear).weight is linear.weight


def test_the_average_is_taken_in_the_weights_and_seen_by_the_product() -> None:
    native, ours, views = objectives()
    with autocast(), torch.no_grad():
        before = features_of(ours.momentum_encoder, views)
    layer = float8_layers(ours)[0]
    assert layer.rounded is not None
    addresses = [t.data_ptr() for t in (*layer.rounded[0], layer.rounded[1])]
    for objective in (native, ours):
        objective.update_momentum_encoder(0.5)
    assert all(
        torch.equal(a, b) for a, b in zip(native.parameters(), ours.parameters(), strict=True)
    )
    fresh = copy.deepcopy(native)
    use_float8_inference_(fresh.momentum_encoder, emulate=True)
    with autocast(), torch.no_grad():
        after, expected = (features_of(o.momentum_encoder, views) for o in (ours, fresh))
    assert torch.equal(after, expected)
    assert not torch.equal(after, before)
    assert [t.data_ptr() for t in (*layer.rounded[0], layer.rounded[1])] == addresses


def test_a_step_sees_weights_that_were_written_past_torchs_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As a kernel writes that is handed addresses."""
    _, ours, views = objectives()
    config = replace(quickstart_digits(), global_batch_size=BATCH)
    forward_backward = ForwardBackward(config, ours, World(), "bf16")
    forward_backward(*views)
    for layer in float8_layers(ours):
        layer.weight.data.mul_(1.5)
    fresh = copy.deepcopy(ours)
    for layer in float8_layers(fresh):
        layer.rounded, layer._seen = None, None
    with autocast():
        expected = fresh(*views).watch["keys"][0]
    assert torch.equal(forward_backward(*views).watch["keys"][0], expected)
    for layer in float8_layers(ours):
        layer.weight.data.mul_(1.5)
    monkeypatch.setattr(Float8Linear, "refresh_", lambda self: None)
    assert torch.equal(
        forward_backward(*views).watch["keys"][0], expected
    )  # without the step's refresh they would pass unseen


# How near, and chunks


def test_keys_are_within_the_rounding_of_float8_and_gradients_follow() -> None:
    """e4m3 rounds to 2^-4, bf16 to 2^-9. The query side is that of bf16, so only keys move its
    gradient."""
    native, ours, views = objectives()
    native_keys = features_of(native.momentum_encoder, views)
    with autocast(), torch.no_grad():
        bf16, found = (
            relative(features_of(o.momentum_encoder, views), native_keys) for o in (native, ours)
        )
        query = [features_of(o.encoder, views) for o in (native, ours)]
    assert torch.equal(*query)
    assert 5 * bf16 < found < 0.09
    losses, gradients = [], []
    for objective in (native, ours):
        with autocast():
            output = objective(*views)
        output.loss.backward()
        losses.append(output.loss.item())
        gradients.append(
            torch.cat([p.grad.flatten() for p in objective.parameters() if p.grad is not None])
        )
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert 0 < relative(gradients[1], gradients[0]) < 0.2


def test_keys_hang_on_no_chunk() -> None:
    _, ours, views = objectives()
    runs = []
    for chunk, kept in ((4, 1), (5, 0), (BATCH, 0)):
        objective = copy.deepcopy(ours)
        runs.append(ChunkedStep(objective, chunk=chunk, kept=kept, autocast=autocast)(*views))
    with autocast():
        whole = ours(*views)
    for run in runs:
        assert torch.equal(run.watch["keys"], whole.watch["keys"])


def test_all_blocks_share_one_graph_without_breaks(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    _, ours, views = objectives(depth=4)
    for layer in float8_layers(ours):
        layer.refresh_()
    with autocast(), torch.no_grad():
        expected = features_of(ours.momentum_encoder, views)
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    monkeypatch.setattr(
        torch, "compile", functools.partial(torch.compile, backend=counter, fullgraph=True)
    )
    compile_blocks(ours.momentum_encoder.blocks and nn.ModuleList([ours.momentum_encoder]))
    for _ in range(2):
        with autocast(), torch.no_grad():
            assert torch.equal(features_of(ours.momentum_encoder, views), expected)
        ours.update_momentum_encoder(0.5)
        for layer in float8_layers(ours):
            layer.refresh_()
        with autocast(), torch.no_grad():
            moved = features_of(ours.momentum_encoder, views)
        assert not torch.equal(moved, expected)
        expected = moved
    assert counter.frame_count == 2  # forward, and the last block's class row


def test_before_the_first_refresh_a_compiled_layer_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with pytest.raises(RuntimeError, match="before its first refresh_"):
        Float8Linear(nn.Linear(32, 32))(torch.randn(2, 32))
