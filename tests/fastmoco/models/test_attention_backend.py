"""The attention backend from the config to the blocks: it changes no number, is checked at the
start, and is told."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastmoco.checkpoint import save_checkpoint
from fastmoco.config import AttentionBackend, Config, ModelConfig
from fastmoco.config.serial import from_json, to_json
from fastmoco.distributed.mesh import World
from fastmoco.models.vit import ARCHITECTURES, VisionTransformer
from fastmoco.objectives.build import attention_choice, build_objective
from fastmoco.optim.build import build_optimizer
from fastmoco.recipes import get_recipe
from fastmoco.run.folder import RunFolder
from fastmoco.training import state as training_state
from fastmoco.training.load_run import load_run
from fastmoco.training.trainer import Trainer
from fastmoco_kernels.attention.choice import BACKENDS

CPU = torch.device("cpu")


def test_the_config_knows_every_backend():
    assert set(AttentionBackend.__args__) == {"auto", *BACKENDS}
    with pytest.raises(ValueError, match="attention='flash9': must be one of"):
        ModelConfig(attention="flash9")


def test_a_config_from_before_there_was_a_choice_loads():
    data = to_json(Config())
    del data["model"]["attention"]
    assert from_json(json.loads(json.dumps(data))) == Config()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_backend_reaches_every_block(name):
    with torch.device("meta"):
        encoder = ARCHITECTURES[name](attention="explicit")
    assert {block.attn.backend for block in encoder.blocks} == {"explicit"}


@pytest.mark.parametrize("plain", [False, True])
def test_a_vit_trains_the_same_on_the_short_kernels(plain):
    """Two heads of 32, 17 tokens; the plain path runs the last block through them too.

    Whole tensors against float64: the class token starts at 1e-6, so the norm behind it magnifies
    the rounding of single elements a thousandfold on any backend.
    """
    truth = _loss_and_gradients("explicit", torch.float64, plain)
    assert len(truth) > 10
    for backend in ("explicit", "triton"):
        for name, found in _loss_and_gradients(backend, torch.float32, plain).items():
            assert (found.double() - truth[name]).norm() <= 3e-6 * truth[name].norm(), (
                backend,
                name,
            )


def _loss_and_gradients(backend: str, dtype: torch.dtype, plain: bool) -> dict[str, torch.Tensor]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    torch.manual_seed(0)
    depth = 1 if plain else 2
    encoder = VisionTransformer(
        image_size=8, patch_size=2, embed_dim=64, num_heads=2, depth=depth, attention=backend
    ).to(device, dtype)
    feature = (encoder.encode_plain if plain else encoder.encode)(encoder.patch_tokens(images))
    loss = feature.square().mean() + feature[0, 0]
    loss.backward()
    return {"loss": loss.detach()} | {
        n: p.grad for n, p in encoder.named_parameters() if p.grad is not None
    }


def _objective(config: Config):
    return build_objective(config, CPU)


@pytest.mark.parametrize(
    ("precision", "backend"), [("bf16", "explicit"), ("fp32", "sdpa"), ("fp64", "sdpa")]
)
def test_the_choice_follows_precision(precision, backend):
    config = get_recipe("quickstart_digits")
    assert attention_choice(config, _objective(config).encoder, precision, CPU).backend == backend


def test_a_backend_that_cannot_run_stops_the_run_before_it_starts():
    config = get_recipe("quickstart_digits")
    config = replace(config, model=replace(config.model, attention="cudnn"))
    with pytest.raises(ValueError, match="backend='cudnn' on cpu; it needs a CUDA device"):
        attention_choice(config, _objective(config).encoder, "fp32", CPU)


def test_a_run_says_who_computes_attention_and_writes_it_down(tmp_path: Path, capsys):
    config = get_recipe("quickstart_digits")
    config = replace(
        config,
        precision="bf16",
        device="cpu",
        data=replace(config.data, synthetic=True),
        knn=replace(config.knn, every_epochs=0),
    )
    trainer = Trainer.build(config, tmp_path, World())
    trainer.close()
    assert "attention: explicit (bf16 on a CPU" in " ".join(capsys.readouterr().out.split())
    resolved = json.loads((tmp_path / "config.json").read_text())["resolved"]
    assert resolved["attention"]["backend"] == "explicit"
    assert "bf16 on a CPU" in resolved["attention"]["reason"]


def test_a_run_of_another_machines_backend_loads_here(tmp_path: Path):
    """Trained with cuDNN, looked at on a CPU."""
    config = get_recipe("quickstart_digits")
    run = replace(config, model=replace(config.model, attention="cudnn"))
    objective = _objective(config)
    tensors = training_state.collect(
        objective, build_optimizer(config, objective.named_parameters(), objective.averages())
    )
    save_checkpoint(
        RunFolder(tmp_path).checkpoints,
        step=1,
        tensors=tensors,
        state={"config": to_json(run)},
        keep=1,
    )
    loaded, found, _ = load_run(tmp_path)
    assert found.model.attention == "cudnn"
    size = config.model.image_size
    assert loaded.encoder(torch.zeros(2, 3, size, size)).isfinite().all()
