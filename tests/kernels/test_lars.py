"""LARS against golden numbers, its equation in float64, itself, and every wrong call."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastmoco_kernels.lars.op import BACKENDS, lars_bytes, lars_step_
from fastmoco_kernels.tables import CHUNK

# a vector, a scalar, a matrix within one chunk, one over two chunks whose second is ragged, a
# convolution, an empty shard, a class token of three dimensions, a vector longer than a chunk, a
# matrix of whole chunks, which takes the wide loads
SHAPES = (
    (7,),
    (),
    (3, 5),
    (2, CHUNK // 2 + 300),
    (4, 3, 3, 3),
    (0, 6),
    (1, 1, 12),
    (CHUNK + 5,),
    (2, CHUNK),
)
NUMBERS = {"momentum": 0.9, "weight_decay": 1e-2, "trust_coefficient": 1e-3}
Lists = tuple[list[Tensor], list[list[Tensor]], list[Tensor]]


@pytest.fixture(scope="module")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _lists(device: torch.device, dtype: torch.dtype, steps: int = 3) -> Lists:
    """Parameters, gradients of each step, buffers; one parameter is zero, one gradient too."""
    generator = torch.Generator().manual_seed(0)

    def draw() -> list[Tensor]:
        drawn = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]
        return [tensor.to(device, dtype) for tensor in drawn]

    params, grads = draw(), [draw() for _ in range(steps)]
    params[2].zero_()
    grads[0][4].zero_()
    return params, grads, [torch.zeros_like(p) for p in params]


def _train(
    backend: str, device: torch.device, dtype: torch.dtype, **options: object
) -> list[Tensor]:
    params, steps, buffers = _lists(device, dtype)
    for lr, grads in zip((0.0, 2.5, 0.3), steps, strict=True):
        lars_step_(params, grads, buffers, lr=lr, backend=backend, **NUMBERS, **options)
    return params + buffers


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 2e-6)])
def test_golden_steps(golden, device, backend, dtype, tolerance):
    data = golden("lars")
    names = data["names"].tolist()
    params = [torch.from_numpy(data[f"init/{name}"]).to(device, dtype) for name in names]
    buffers = [torch.zeros_like(p) for p in params]
    numbers = {key: float(data[key]) for key in NUMBERS}
    key = "params_f64" if dtype == torch.float64 else "params_f32"
    for step, lr in enumerate(data["lr"].tolist()):
        grads = [torch.from_numpy(data[f"grads/{name}"][step]).to(device, dtype) for name in names]
        lars_step_(params, grads, buffers, lr=lr, backend=backend, **numbers)
        for name, param in zip(names, params, strict=True):
            expected = torch.from_numpy(data[f"{key}/{name}"][step]).double()
            assert (
                param.cpu().double() - expected
            ).abs().max() <= tolerance * expected.abs().max().clamp_min(1), name
    for name, buffer in zip(names, buffers, strict=True):
        expected = torch.from_numpy(data[f"buf_f64/{name}"])
        assert (
            buffer.cpu().double() - expected
        ).abs().max() <= tolerance * expected.abs().max().clamp_min(1), name


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_golden_steps_with_the_rate_in_the_buffer(golden, device, backend, dtype, tolerance):
    """SimCLR's; biases and norms are excluded by name."""
    data = golden("siblings/simclr")
    names = [key[len("lars/init/") :] for key in data if key.startswith("lars/init/")]
    params = [torch.from_numpy(data[f"lars/init/{name}"]).to(device, dtype) for name in names]
    buffers = [torch.zeros_like(p) for p in params]
    options = {key: float(data[f"lars/{key}"]) for key in NUMBERS}
    options["adapt"] = [not ("batch_normalization" in n or "bias" in n) for n in names]
    for step, lr in enumerate(data["lars/lr"].tolist()):
        grads = [torch.from_numpy(data[f"lars/grads/{n}"][step]).to(device, dtype) for n in names]
        lars_step_(params, grads, buffers, lr=lr, lr_in_buffer=True, backend=backend, **options)
        for name, param in zip(names, params, strict=True):
            expected = torch.from_numpy(data[f"lars/params/{name}"][step])
            gap = (param.cpu().double() - expected).abs().max()
            assert gap <= tolerance * expected.abs().max(), name


OTHERWISE = {"adapt": [True, True, False, True, False, True, False, True, True]}


@pytest.mark.parametrize("options", [{}, OTHERWISE, {**OTHERWISE, "lr_in_buffer": True}])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6)])
def test_ragged_sizes_match_float64(device, backend, dtype, tolerance, options):
    """Also where vectors and a scalar are adapted and matrices are not."""
    truth = _train("reference", torch.device("cpu"), torch.float64, **options)
    for shape, value, expected in zip(
        SHAPES * 2, _train(backend, device, dtype, **options), truth, strict=True
    ):
        assert value.shape == shape
        if value.numel():
            error = (value.cpu().double() - expected).norm() / expected.norm()
            assert error <= tolerance, shape


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_same_inputs_give_the_same_bits(device, backend):
    one, two = _train(backend, device, torch.float32), _train(backend, device, torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_step_does_not_depend_on_the_scale_of_the_gradient(device, backend):
    """What the ratio is for; without it the second parameter would move a thousand times as far."""
    params = [torch.ones(8, 300, device=device) for _ in range(2)]
    grads = [
        torch.randn(8, 300, generator=torch.Generator().manual_seed(1)).to(device) for _ in range(2)
    ]
    grads[1] = grads[0] * 1024
    lars_step_(params, grads, [torch.zeros_like(p) for p in params], lr=100.0, backend=backend)
    assert (params[0] - params[1]).abs().max() <= 1e-6
    assert (params[0] - 1).abs().max() > 1e-2


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_of_every_kind(device, backend):
    """channels_last as ResNets train, gradients laid out otherwise, a gradient that is a slice at
    an odd address."""
    generator = torch.Generator().manual_seed(2)
    plain = [torch.randn(6, 4, 3, 3, generator=generator), torch.randn(40, 70, generator=generator)]
    grads = [torch.randn(p.shape, generator=generator) for p in plain]
    strange = [
        plain[0].to(device).to(memory_format=torch.channels_last),
        plain[1].to(device).T.contiguous().T,
    ]
    room = torch.zeros(40 * 70 + 1, device=device)
    room[1:] = grads[1].reshape(-1)
    strange_grads = [grads[0].to(device), room[1:].view(40, 70)]
    buffers, strange_buffers = (
        [torch.zeros_like(p) for p in plain],
        [torch.zeros_like(p) for p in strange],
    )
    assert not strange[1].is_contiguous()
    for _ in range(2):
        lars_step_(plain, grads, buffers, lr=3.0, backend="reference", **NUMBERS)
        lars_step_(strange, strange_grads, strange_buffers, lr=3.0, backend=backend, **NUMBERS)
    for a, b in zip(plain + buffers, strange + strange_buffers, strict=True):
        torch.testing.assert_close(b.cpu(), a, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_tensor_with_gaps_is_trained_by_foreach_and_refused_by_triton(device, backend):
    base = torch.ones(4, 6, device=device)
    param, grad, buffer = (
        base[:, ::2],
        torch.ones(4, 3, device=device),
        torch.zeros(4, 3, device=device),
    )
    if backend == "triton":
        with pytest.raises(
            ValueError, match=r"parameter 0 has strides \(6, 2\), its buffer \(3, 1\)"
        ):
            lars_step_([param], [grad], [buffer], lr=1.0, backend=backend)
    else:
        lars_step_([param], [grad], [buffer], lr=100.0, backend="auto")
        assert torch.allclose(param, torch.full_like(param, 0.9))
        assert bool((base[:, 1::2] == 1).all())


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("bad", [0.0, 1.0])
@pytest.mark.parametrize("inside", [False, True])
def test_the_guard_keeps_everything_or_nothing(device, backend, bad, inside):
    params, steps, buffers = _lists(device, torch.float32, steps=1)
    before = [t.clone() for t in params + buffers]
    steps[0][3].fill_(float("nan") if bad else 1.0)
    guard = torch.tensor([bad], device=device)
    options = {"found_inf": guard, "lr_in_buffer": inside, "backend": backend}
    lars_step_(params, steps[0], buffers, lr=1.0, **options, **NUMBERS)
    same = [torch.equal(a, b) for a, b in zip(before, params + buffers, strict=True)]
    assert (
        all(same)
        if bad
        else not any(still for still, t in zip(same, before, strict=True) if t.numel())
    )


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_rate_in_a_tensor_is_the_same_rate(device, backend, dtype, inside):
    numbers, tensors = _lists(device, torch.float32, 1), _lists(device, torch.float32, 1)
    lars_step_(numbers[0], numbers[1][0], numbers[2], lr=0.25, lr_in_buffer=inside, backend=backend)
    lars_step_(
        tensors[0],
        tensors[1][0],
        tensors[2],
        lr=torch.tensor(0.25, dtype=dtype, device=device),
        lr_in_buffer=inside,
        backend=backend,
    )
    assert all(torch.equal(a, b) for a, b in zip(numbers[0], tensors[0], strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_narrow_gradients_are_widened_and_autocast_changes_nothing(device, backend):
    one, two = _lists(device, torch.float32, 1), _lists(device, torch.float32, 1)
    narrow = [g.half() for g in one[1][0]]
    lars_step_(one[0], narrow, one[2], lr=1.0, backend=backend, **NUMBERS)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        lars_step_(two[0], [g.float() for g in narrow], two[2], lr=1.0, backend=backend, **NUMBERS)
    assert all(torch.equal(a, b) for a, b in zip(one[0] + one[2], two[0] + two[2], strict=True))


def test_squares_of_shards_are_handed_out_for_reduction(device):
    """Two halves with their squares added take the whole's step; each by itself takes another."""
    whole, (grads,), _ = _lists(device, torch.float64, steps=1)
    index = 3
    rows = [0, 1]
    parts = [whole[index][row : row + 1].clone() for row in rows]
    squares = []
    for row in rows:  # only listen
        copies = [parts[row].clone()], [grads[index][row : row + 1]], [torch.zeros_like(parts[row])]
        lars_step_(*copies, lr=1.0, reduce_squares=lambda s: squares.append(s.clone()), **NUMBERS)
    total = torch.stack(squares).sum(0)
    local = [part.clone() for part in parts]
    for row in rows:
        grad, buffer = grads[index][row : row + 1], torch.zeros_like(parts[row])
        lars_step_(
            [parts[row]],
            [grad],
            [buffer],
            lr=1.0,
            reduce_squares=lambda s: s.copy_(total),
            **NUMBERS,
        )
        lars_step_([local[row]], [grad], [torch.zeros_like(buffer)], lr=1.0, **NUMBERS)
    lars_step_([whole[index]], [grads[index]], [torch.zeros_like(whole[index])], lr=1.0, **NUMBERS)
    assert (torch.cat(parts) - whole[index]).abs().max() <= 1e-15
    assert (torch.cat(local) - whole[index]).abs().max() > 1e-6


def test_bytes_are_those_of_the_tensors_each_pass_touches(monkeypatch, device):
    """Counted from what the two launches are given: each column read once, parameter and buffer
    written once."""
    from fastmoco_kernels.lars import launch

    columns: dict[str, list[list[Tensor]]] = {}
    table_of = launch.pointer_table

    def table(owner, lists, marks):
        columns[owner] = [[t for t, mark in zip(column, marks[0], strict=True) if mark is not None or len(lists) == 3]
                          for column in lists]  # fmt: skip
        return table_of(owner, lists, marks)

    monkeypatch.setattr(launch, "pointer_table", table)
    params, (grads,), buffers = _lists(device, torch.float32, steps=1)
    lars_step_(params, grads, buffers, lr=1.0, backend="triton")
    read = sum(t.nbytes for lists in columns.values() for column in lists for t in column)
    written = sum(
        t.nbytes
        for column in (columns["lars_update_"][0], columns["lars_update_"][2])
        for t in column
    )
    assert lars_bytes(params) == read + written


def test_nothing_to_do_is_fine():
    lars_step_([], [], [], lr=1.0)


ONE = torch.ones(2, 2)


@pytest.mark.parametrize(
    ("params", "grads", "buffers", "options", "text"),
    [
        ([ONE], [], [ONE], {}, "1 params but 0 grads"),
        ([ONE], [torch.ones(3)], [ONE], {}, r"grads\[0\] is \(3,\) but params\[0\] is \(2, 2\)"),
        ([ONE], [ONE], [torch.ones(4)], {}, r"momentum_buffers\[0\] is \(4,\) but params\[0\] is \(2, 2\)"),
        ([ONE.half()], [ONE], [ONE], {}, r"params\[0\] is torch.float16; small steps vanish in it"),
        ([ONE], [ONE.long()], [ONE], {}, r"grads\[0\] is torch.int64; it must be floating point"),
        ([ONE], [ONE], [ONE.double()], {}, r"params\[0\] is torch.float32, momentum_buffers\[0\] torch.float64"),
        ([ONE, ONE.double()], [ONE] * 2, [ONE, ONE.double()], {}, r"params\[1\] is torch.float64.*params\[0\] torch.float32"),
        ([ONE], [torch.ones(2, 2, device="meta")], [ONE], {}, r"grads\[0\] is on meta but params\[0\] is on cpu"),
        ([ONE], [ONE], [ONE], {"lr": -1.0}, r"lr=-1.0 is below 0"),
        ([ONE], [ONE], [ONE], {"lr": torch.ones(2)}, "lr has 2 elements; it needs 1"),
        ([ONE], [ONE], [ONE], {"momentum": 1.0}, r"momentum=1.0 is outside \[0, 1\)"),
        ([ONE], [ONE], [ONE], {"weight_decay": -0.1}, "weight_decay=-0.1"),
        ([ONE], [ONE], [ONE], {"trust_coefficient": 0.0}, "trust_coefficient=0.0"),
        ([ONE], [ONE], [ONE], {"found_inf": ONE}, "found_inf has 4 elements; it needs 1"),
        ([ONE], [ONE], [ONE], {"found_inf": torch.ones(1, device="meta")}, "found_inf is on meta, the parameters on cpu"),
        ([ONE], [ONE], [ONE], {"adapt": []}, "1 params but 0 flags in adapt"),
        ([ONE], [ONE], [ONE], {"backend": "apex"}, "backend='apex' is none of"),
        ([ONE], [ONE], [ONE], {"backend": "reference", "reduce_squares": print}, "takes whole tensors"),
    ],
)  # fmt: skip
def test_errors_name_both_numbers(params, grads, buffers, options, text):
    before = ONE.clone()
    with pytest.raises(ValueError, match=text):
        lars_step_(params, grads, buffers, **{"lr": 1.0, **options})
    assert torch.equal(before, ONE)
