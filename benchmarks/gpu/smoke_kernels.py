"""One call of every kernel, forward and backward, and its error relative to
float64 or to its plain path.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.contest import relative_error
from benchmarks.gpu.checks import Check, Place, Unavailable
from benchmarks.gpu.smoke_apex import apex_check
from fastmoco_kernels import (
    ViewColorParameters,
    adamw_ema_step_,
    attention,
    cut_views,
    ema_update_,
    gaussian_blur,
    gelu,
    info_nce_loss,
    lars_step_,
    queued_info_nce_loss,
    residual_norm,
    soft_cross_entropy_of_rows,
    split_qkv,
    symmetric_info_nce_loss,
    view_color,
)
from fastmoco_kernels.attention.choice import choose_attention
from fastmoco_kernels.fused_block.op import gelu_backward, norm_backward, norm_forward, stack_qkv

Errors = dict[str, tuple[float, float]]
SWEPT = 2e-6
"""Largest error of one optimizer step in float32: a few roundings."""


def _loss_inputs(place: Place) -> tuple[Tensor, Tensor, str]:
    rows, keys, width = (9, 21, 32) if place.dry else (1000, 1500, 256)
    q = place.random(rows, width, seed=1)
    k = 0.4 * place.random(keys, width, seed=2, dtype=torch.float32)
    k[:rows] += q.float()
    return q, k, "fp32" if place.dry else "auto"


def _info_nce(place: Place) -> Errors:
    q, k, precision = _loss_inputs(place)

    def gradient(
        rows: Tensor, keys: Tensor, backend: str, precision: str = "auto"
    ) -> tuple[Tensor, Tensor]:
        leaf = rows.detach().requires_grad_()
        loss = info_nce_loss(leaf, keys, temperature=0.2, backend=backend, precision=precision)
        return loss, torch.autograd.grad(loss, leaf)[0]

    loss, dq = gradient(q, k, "triton", precision)
    exact, truth = gradient(q.double(), k.double(), "reference")
    limit = 1e-3 + place.unit
    return {"loss": (relative_error(loss, exact), limit), "dq": (relative_error(dq, truth), limit)}


def _symmetric(place: Place) -> Errors:
    q, k, precision = _loss_inputs(place)
    p = q.flip(0).contiguous()

    def both(a: Tensor, b: Tensor, keys: Tensor, backend: str, precision: str = "auto") -> Tensor:
        found = symmetric_info_nce_loss(
            a, keys, b, keys, temperature=0.2, backend=backend, precision=precision
        )
        return found.loss

    loss = both(q, p, k, "triton", precision)
    exact = both(q.double(), p.double(), k.double(), "reference")
    return {"loss": (relative_error(loss, exact), 1e-3 + place.unit)}


def _queue(place: Place) -> Errors:
    q, k, precision = _loss_inputs(place)
    queue = torch.nn.functional.normalize(k.flip(0), dim=1)

    def loss(q: Tensor, k: Tensor, queue: Tensor, backend: str, precision: str = "auto") -> Tensor:
        how: dict[str, Any] = {"backend": backend, "precision": precision}
        return queued_info_nce_loss(q, k[: len(q)], queue, temperature=0.2, **how).loss

    leaf, exact = q.detach().requires_grad_(), q.double().requires_grad_()
    ours = loss(leaf, k, queue, "triton", precision)
    truth = loss(exact, k.double(), queue.double(), "reference")
    gradients = (torch.autograd.grad(ours, leaf)[0], torch.autograd.grad(truth, exact)[0])
    limit = 1e-3 + place.unit
    return {
        "loss": (relative_error(ours, truth), limit),
        "dq": (relative_error(*gradients), limit),
    }


def _attention(backend: str, head_dim: int, tokens: int = 197) -> Check:
    def check(place: Place) -> Errors:
        images, heads, rows = (1, 1, 17) if place.dry else (4, 6, tokens)
        inputs = [place.random(images, heads, rows, head_dim, seed=i) for i in range(4)]
        try:
            choose_attention(place.device, place.narrow, rows, rows, head_dim, backend=backend)
        except ValueError as reason:
            raise Unavailable(str(reason)) from None

        def results(tensors: list[Tensor], name: str) -> list[Tensor]:
            *leaves, grad = (t.detach().requires_grad_() for t in tensors)
            out = attention(*leaves, backend=name)
            return [out, *torch.autograd.grad(out, leaves, grad.detach())]

        ours = results(inputs, backend)
        plain = results(inputs, "explicit")
        truth = results([t.double() for t in inputs], "reference")
        # As accurate as the explicit form, which also rounds its weights: twice
        # its error plus some units.
        return {
            name: (relative_error(mine, exact), 2 * relative_error(other, exact) + 4 * place.unit)
            for name, mine, other, exact in zip(
                ("out", "dq", "dk", "dv"), ours, plain, truth, strict=True
            )
        }

    return check


def _tensors(place: Place, seed: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    shapes = (
        [(1,), (33, 7), (257,), (2, 1025)]
        if place.dry
        else [(1,), (1537,), (384, 1536), (65, 1025), (4096, 257)]
    )
    return [place.random(*shape, seed=seed + i, dtype=dtype) for i, shape in enumerate(shapes)]


def _ema(place: Place) -> Errors:
    averages, sources = _tensors(place, 1), _tensors(place, 50)
    truth = [0.99 * a.double() + 0.01 * s.double() for a, s in zip(averages, sources, strict=True)]
    ema_update_(averages, sources, 0.99, backend="triton")
    return {"average": (max(map(relative_error, averages, truth)), 1e-6)}


def _adamw(place: Place) -> Errors:
    def step(backend: str, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
        params, grads, averages = (
            [t.to(dtype) for t in _tensors(place, seed)] for seed in (1, 50, 100)
        )
        first, second = ([torch.zeros_like(p) for p in params] for _ in range(2))
        steps = [torch.zeros((), device=place.device) for _ in params]
        adamw_ema_step_(
            params,
            grads,
            first,
            second,
            steps,
            lr=1e-2,
            averages=averages,
            ema_momentum=0.9,
            backend=backend,
        )
        return params, averages

    params, averages = step("triton", torch.float32)
    exact, exact_averages = step("reference", torch.float64)
    return {
        "param": (max(map(relative_error, params, exact)), SWEPT),
        "average": (max(map(relative_error, averages, exact_averages)), SWEPT),
    }


def _lars(place: Place) -> Errors:
    def step(backend: str, dtype: torch.dtype) -> list[Tensor]:
        params, grads = ([t.to(dtype) for t in _tensors(place, seed)] for seed in (1, 50))
        buffers = [torch.zeros_like(p) for p in params]
        lars_step_(params, grads, buffers, lr=0.5, weight_decay=0.1, backend=backend)
        return params

    pairs = zip(step("triton", torch.float32), step("reference", torch.float64), strict=True)
    return {"param": (max(relative_error(mine, exact) for mine, exact in pairs), SWEPT)}


def _residual_norm(place: Place) -> Errors:
    rows, width = (5, 48) if place.dry else (1970, 384)
    stream = place.random(rows, width, seed=1, dtype=torch.float32)
    branch, grad = place.random(rows, width, seed=2), place.random(rows, width, seed=3)
    weight, bias = (place.random(width, seed=i, dtype=torch.float32) for i in (4, 5))

    def results(cast: Callable[[Tensor], Tensor], out: torch.dtype, backend: str) -> list[Tensor]:
        leaves = [cast(t).detach().requires_grad_() for t in (stream, branch, weight, bias)]
        x, b, w, c = leaves
        total, y = residual_norm(x, b, w, c, 1e-6, out, backend=backend)
        return [
            total,
            y,
            *torch.autograd.grad((total, y), leaves, (torch.ones_like(total), grad.to(y.dtype))),
        ]

    ours = results(lambda t: t, place.narrow, "triton")
    truth = results(lambda t: t.double(), torch.float64, "reference")
    names = ("x", "y", "dx", "dbranch", "dweight", "dbias")
    return _against(place, names, ours, truth)


def _soft_cross_entropy(place: Place) -> Errors:
    images, width, outputs = (3, 16, 70) if place.dry else (64, 256, 65536)
    rows, weight = place.random(4, images, width, seed=1), place.random(outputs, width, seed=2)
    teacher = place.random(2, images, outputs, seed=3, dtype=torch.float32)
    shrunk = 0.1 * weight

    def results(cast: Callable[[Tensor], Tensor], backend: str) -> list[Tensor]:
        leaves = [cast(t).detach().requires_grad_() for t in (rows, shrunk)]
        loss = soft_cross_entropy_of_rows(
            leaves[0],
            leaves[1],
            cast(teacher),
            temperature=1.0,
            target_temperature=0.5,
            backend=backend,
        )
        return [loss, *torch.autograd.grad(loss, leaves)]

    ours = results(lambda t: t, "triton")
    truth = results(Tensor.double, "reference")
    return _against(place, ("loss", "drows", "dweight"), ours, truth)


def _gelu_bias(place: Place) -> Errors:
    rows, width = (5, 48) if place.dry else (1970, 1536)
    h, grad = place.random(rows, width, seed=1), place.random(rows, width, seed=2)
    bias = place.random(width, seed=3, dtype=torch.float32)

    def results(cast: Callable[[Tensor], Tensor], backend: str) -> list[Tensor]:
        leaves = [cast(t).detach().requires_grad_() for t in (h, bias)]
        y = gelu(leaves[0], leaves[1], backend=backend)
        return [y, *torch.autograd.grad(y, leaves, cast(grad))]

    return _against(
        place,
        ("y", "dh", "dbias"),
        results(lambda t: t, "triton"),
        results(Tensor.double, "reference"),
    )


def _split_qkv(place: Place) -> Errors:
    images, tokens, heads, width = (2, 5, 2, 8) if place.dry else (10, 197, 12, 32)
    stacked = place.random(images, tokens, 3 * heads * width, seed=1)
    bias = place.random(3 * heads * width, seed=2, dtype=torch.float32)
    grads = [place.random(images, heads, tokens, width, seed=i) for i in (3, 4, 5)]

    def results(cast: Callable[[Tensor], Tensor], backend: str) -> list[Tensor]:
        leaves = [cast(t).detach().requires_grad_() for t in (stacked, bias)]
        parts = split_qkv(leaves[0], heads, leaves[1], backend=backend)
        return list(torch.autograd.grad(parts, leaves, [cast(grad) for grad in grads]))

    return _against(
        place,
        ("dqkv", "dbias"),
        results(lambda t: t, "triton"),
        results(Tensor.double, "reference"),
    )


def _fused_block(place: Place) -> Errors:
    rows, width = (5, 48) if place.dry else (1970, 384)
    x, dsum = (place.random(rows, width, seed=i, dtype=torch.float32) for i in (1, 2))
    branch, dy, h = (place.random(rows, width, seed=i) for i in (3, 4, 5))
    weight, bias = (place.random(width, seed=i, dtype=torch.float32) for i in (6, 7))
    parts = [place.random(2, 3, rows, 16, seed=i) for i in (8, 9, 10)]

    def results(
        cast: Callable[[Tensor], Tensor], narrow: torch.dtype, triton: bool
    ) -> list[Tensor]:
        stream, side, w, b = (cast(t) for t in (x, branch, weight, bias))
        total, y, mean, rstd = norm_forward(stream, side, w, b, 1e-6, narrow, triton)
        back = norm_backward(cast(dy), cast(dsum), stream, side, w, b, mean, rstd, narrow, triton)
        after = (
            *gelu_backward(cast(dy), cast(h), triton),
            *stack_qkv(*(cast(t) for t in parts), triton),
        )
        return [total, y, *back, *after]

    names = (
        "sum",
        "y",
        "dx",
        "dbranch",
        "y again",
        "norm sums",
        "gelu",
        "dh",
        "gelu sums",
        "dqkv",
        "dqkv sums",
    )
    return _against(
        place,
        names,
        results(lambda t: t, place.narrow, True),
        results(Tensor.double, torch.float64, False),
    )


def _against(
    place: Place, names: tuple[str, ...], ours: list[Tensor], truth: list[Tensor]
) -> Errors:
    limit = 2 * place.unit + 1e-5
    return {
        name: (relative_error(mine, exact), limit)
        for name, mine, exact in zip(names, ours, truth, strict=True)
    }


def _pictures(place: Place) -> tuple[Tensor, ViewColorParameters]:
    count, side = (2, 9) if place.dry else (48, 60)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(
        0, 256, (count, side, side - 2, 3), generator=generator, dtype=torch.uint8
    )
    neutral = ViewColorParameters.neutral(count)
    numbers = torch.rand(count, generator=generator)
    changed = neutral._replace(
        brightness=0.5 + numbers,
        contrast=1.5 - numbers,
        saturation=0.5 + numbers,
        hue=numbers - 0.5,
    )
    return images, changed._replace(
        blur_sigma=2 * numbers, solarize=numbers > 0.7, grayscale=numbers < 0.2
    )


def _view_color(place: Place) -> Errors:
    images, parameters = _pictures(place)
    made = view_color(images.to(place.device), parameters, backend="triton")
    return {
        "levels that differ": (
            float((made.cpu() != view_color(images, parameters, backend="torch")).sum()),
            0.0,
        )
    }


def _blur(place: Place) -> Errors:
    images, parameters = _pictures(place)
    planes = images.permute(0, 3, 1, 2).contiguous()
    made = gaussian_blur(planes.to(place.device), parameters.blur_sigma, backend="triton").cpu()
    plain = gaussian_blur(planes, parameters.blur_sigma, backend="torch")
    return {"levels that differ": (float((made != plain).sum()), 0.0)}


def _cut_views(place: Place) -> Errors:
    from fastmoco_kernels.cut_views.native import native_library

    if native_library() is None:
        raise Unavailable("the C part is not built here")
    images, parameters = _pictures(place)
    count, height, width = images.shape[:3]
    crops = torch.tensor([[1, 2, height - 3, width - 2]] * count, dtype=torch.int32)
    arrays = [image.numpy() for image in images]
    native, plain = (
        cut_views(arrays, crops, parameters, size=16, backend=backend)
        for backend in ("native", "torch")
    )
    return {"values that differ": (float((native != plain).sum()), 0.0)}


CHECKS: dict[tuple[str, str], Check] = {
    ("info_nce", "info_nce"): _info_nce,
    ("info_nce, both directions", "info_nce"): _symmetric,
    ("info_nce, with a queue", "info_nce"): _queue,
    **{
        (f"attention {backend} d={d}", "attention"): _attention(backend, d)
        for backend, d in (
            ("triton", 32),
            ("triton", 64),
            ("sdpa", 32),
            ("flash", 32),
            ("cudnn", 32),
            ("xformers", 32),
        )
    },
    ("ema", "ema"): _ema,
    ("adamw_ema", "adamw_ema"): _adamw,
    ("apex adamw", "adamw_ema"): apex_check("adamw"),
    ("apex lamb", "adamw_ema"): apex_check("lamb"),
    ("lars", "lars"): _lars,
    ("residual_norm", "residual_norm"): _residual_norm,
    ("soft_cross_entropy", "soft_cross_entropy"): _soft_cross_entropy,
    ("gelu_bias", "fused_block"): _gelu_bias,
    ("split_qkv", "fused_block"): _split_qkv,
    ("fused_block", "fused_block"): _fused_block,
    ("view_color", "view_color"): _view_color,
    ("blur", "blur"): _blur,
    ("cut_views", "cut_views"): _cut_views,
}
"""Checks by name and op."""
