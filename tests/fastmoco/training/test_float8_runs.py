"""Float8 linears in a run: what it saves, what is planned, and every setting, device and encoder
that is refused."""

from __future__ import annotations

import functools
import importlib.util
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fastmoco.checkpoint import load_latest
from fastmoco.config import Config, ModelConfig
from fastmoco.config.serial import differences
from fastmoco.distributed.mesh import World
from fastmoco.errors import RunError
from fastmoco.models import ARCHITECTURES, VisionTransformer, float8, vit_micro, vit_nano
from fastmoco.models.float8 import flop_per_byte, require_gain, require_support, use_float8_
from fastmoco.objectives.build import build_objective
from fastmoco.optim.build import build_optimizer
from fastmoco.planning.costs import measure_costs
from fastmoco.recipes import quickstart_digits
from fastmoco.run.folder import RunFolder
from fastmoco.training import state as training_state
from fastmoco.training.load_run import load_run
from fastmoco.training.trainer import Trainer
from tests.command_line import main
from tests.float8_products import require_scales_of_rows

ROOT = Path(__file__).parents[3]
CPU = torch.device("cpu")
needs_torchao = pytest.mark.skipif(
    importlib.util.find_spec("torchao") is None, reason="torchao is not installed"
)


@pytest.fixture
def anywhere(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Config]:
    """A run in float8 on a CPU, with a small encoder, blocks traced but not generated."""
    monkeypatch.setattr(float8, "require_support", lambda device, precision, **_: None)
    monkeypatch.setattr(float8, "BALANCE", 0.0)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    recipe = quickstart_digits()
    model = replace(recipe.model, linears="float8", compile=True, hidden_dim=32, projection_dim=16)
    data = replace(recipe.data, synthetic=True)
    knn = replace(recipe.knn, every_epochs=0)
    optim = replace(recipe.optim, warmup_epochs=0)
    config = replace(
        recipe,
        model=model,
        data=data,
        knn=knn,
        optim=optim,
        precision="bf16",
        global_batch_size=16,
        device="cpu",
    )
    return lambda: config


@needs_torchao
def test_a_run_saves_what_a_native_model_reads(
    anywhere: Callable[[], Config], tmp_path: Path
) -> None:
    require_scales_of_rows()
    config = anywhere()
    trainer = Trainer.build(config, tmp_path / "run", World())
    try:
        trainer.run(max_steps=2)
        trainer._save(force=True)
        weights = {n: t.clone() for n, t in trainer.objective.state_dict().items()}
        for side in (trainer.objective.encoder, trainer.objective.momentum_encoder):
            assert type(side.get_submodule("blocks.0.mlp.fc1")).__module__.startswith("torchao")
    finally:
        trainer.close()
    objective, saved, checkpoint = load_run(tmp_path / "run")
    assert (saved.model.linears, checkpoint.step) == ("float8", 2)
    assert checkpoint.state["resolved"]["versions"]["torchao"]
    assert not any(type(m).__module__.startswith("torchao") for m in objective.modules())
    assert all(torch.equal(weights[n], t) for n, t in objective.state_dict().items())
    # and back again, with the optimizer's state
    ours = build_objective(config, CPU)
    latest = load_latest(RunFolder(tmp_path / "run").checkpoints)
    assert latest is not None
    training_state.restore(
        ours, build_optimizer(config, ours.named_parameters(), ours.averages()), latest
    )
    assert all(torch.equal(weights[n], t) for n, t in ours.state_dict().items())
    native = replace(config, model=replace(config.model, linears="native"))
    assert differences(config, native) == ["model.linears: 'float8' -> 'native'"]
    with pytest.raises(RunError, match=r"give --allow model\.linears if you mean it"):
        Trainer.build(native, tmp_path / "run", World())
    other = Trainer.build(native, tmp_path / "run", World(), allow=["model.linears"])
    other.close()
    assert all(torch.equal(weights[n], t) for n, t in other.objective.state_dict().items())


@needs_torchao
def test_the_planner_counts_the_float8_step(anywhere: Callable[[], Config]) -> None:
    config = anywhere()
    native = replace(config, model=replace(config.model, linears="native"))
    ours, usual = measure_costs(config, "bf16"), measure_costs(native, "bf16")
    assert (ours.step_flops, ours.parameters) == (usual.step_flops, usual.parameters)
    assert ours.graph.per_image == pytest.approx(usual.graph.per_image, rel=0.01)
    # more by the casts of one layer at a time: a hidden row of 4 E numbers, twice in float32, and
    # in float8
    token = 2 * 17 * 64
    assert 0 < ours.train.per_image - usual.train.per_image <= 4 * (4 + 4 + 1) * token
    assert ours.graph.fixed <= usual.graph.fixed  # a view of a weight is no memory
    full = measure_costs(config, "bf16", recompute="full")
    assert 0 < full.recompute_flops <= full.query_flops


# Refused


def on_meta(name: str) -> VisionTransformer:
    with torch.device("meta"):
        return ARCHITECTURES[name](image_size=224, patch_size=14 if name == "vit_huge" else 16)


# qkv, proj, fc1, fc2: inputs and outputs in widths
SHAPES = ((1, 3), (1, 1), (1, 4), (4, 1))


@pytest.mark.parametrize(
    ("name", "count", "pays"),
    [
        ("vit_small", 179, False),
        ("vit_base", 358, False),
        ("vit_large", 477, True),
        ("vit_huge", 597, True),
    ],
)
def test_encoders_below_the_balance_are_refused(name: str, count: int, pays: bool) -> None:
    module = on_meta(name)
    E = module.embed_dim
    flop = moved = 0.0
    for K, N in ((k * E, n * E) for k, n in SHAPES):
        # (numbers in, numbers out) a token of both forwards, the gradient of the inputs and that of
        # the weights
        for read, written in ((K, N), (K, N), (N, K), (K + N, 0)):
            flop += 2 * K * N
            moved += (2 + 1 + 1) * read + 2 * written
    assert flop_per_byte(module) == pytest.approx(flop / moved, rel=1e-9)
    assert round(flop_per_byte(module)) == count
    if pays:
        require_gain(module)
        return
    with pytest.raises(
        ValueError, match=rf"do {count} FLOP per byte.*below 367.*counted from shapes, not measured"
    ):
        require_gain(module)


def test_devices_and_precisions_without_float8_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ValueError, match=r"device 'cpu' has no fast float8 products.*use model\.linears native"
    ):
        require_support(CPU, "bf16")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    with pytest.raises(
        ValueError, match=r"NVIDIA A100 has CUDA capability 8\.0, and float8 products need 8\.9"
    ):
        require_support(torch.device("cuda", 0), "bf16")
    for capability in ((8, 9), (9, 0), (10, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        require_support(torch.device("cuda", 0), "bf16")
    for precision in ("fp32", "fp64"):
        with pytest.raises(ValueError, match=rf"requires precision bf16, got {precision}"):
            require_support(torch.device("cuda", 0), precision)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"checkpointing": "selective", "compile": True},
            "checkpointing='selective': with linears=float8 would recompute",
        ),
        ({"compile": False}, "compile=False: linears=float8 requires --model.compile"),
    ],
)
def test_settings_that_lose_are_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        ModelConfig(architecture="vit_large", linears="float8", **options)


@needs_torchao
def test_selective_checkpointing_would_compute_products_twice() -> None:
    """Why it is refused: autograd cannot stop inside of torchao's operation."""
    costs = {}
    for converted in (False, True):
        module = vit_micro()
        if converted:
            use_float8_(module, emulate=True)
        for how in ("none", "selective", "full"):
            module.recompute(how)
            with FlopCounterMode(display=False) as counter:
                with torch.autocast("cpu", torch.bfloat16):
                    features = module(torch.randn(4, 3, 32, 32))
                features.float().sum().backward()
            costs[converted, how] = counter.get_total_flops()
    assert costs[False, "selective"] < 1.02 * costs[False, "none"]
    assert costs[True, "selective"] > 1.2 * costs[True, "none"]


def exit_code(words: list[str]) -> object:
    try:
        return main(words)
    except SystemExit as refusal:
        return refusal.code


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (
            ["train", "quickstart_digits", "--data.synthetic", "--out", "OUT"],
            "device 'cpu' has no fast float8 products",
        ),
        (["plan", "vit_b16_e300_b4096"], "do 358 FLOP per byte"),
    ],
)
def test_commands_refuse_in_one_line(
    words: list[str], text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(tmp_path / "run") if word == "OUT" else word for word in words]
    assert exit_code([*words, "--model.linears", "float8"]) == 2
    assert text in capsys.readouterr().err


@pytest.fixture
def without_torchao(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    float8._torchao.cache_clear()
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.delitem(sys.modules, "torchao.float8", raising=False)
    yield
    float8._torchao.cache_clear()


@pytest.mark.usefixtures("without_torchao")
def test_without_torchao_the_extra_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ModuleNotFoundError, match=r"needs torchao: pip install '\.\[float8\]'"):
        use_float8_(vit_nano())
    words = ["plan", "vit_b16_e300_b4096", "--model.architecture", "vit_large"]
    assert exit_code([*words, "--model.linears", "float8"]) == 2
    assert "needs torchao: pip install '.[float8]'" in capsys.readouterr().err


@needs_torchao
@pytest.mark.slow
def test_torchao_comes_only_where_it_is_asked_for_and_says_nothing() -> None:
    script = (
        "import sys, fastmoco.training.trainer, fastmoco.cli.main\n"
        "from fastmoco.models import vit_nano\n"
        "from fastmoco.models.float8 import use_float8_\n"
        "assert 'torchao' not in sys.modules\n"
        "assert len(use_float8_(vit_nano())) == 4\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
