"""What a step must not do once it is warm: wait for the device, compile again, take more memory.

The whole loop runs, `Trainer.run`; a step is watched from the fetch of its batch to the fetch of
the next one. On a CPU the calls that would wait are counted, and tensors are; the other objectives
are in profiling/test_kept_costs.py.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastmoco.config import Config
from fastmoco.evaluation.embed import embed
from fastmoco.training.profiling.counting import StepCounter
from fastmoco.training.profiling.profile import memory
from fastmoco.training.trainer import Trainer
from fastmoco_pipelines import Batch, EvalBatch
from tests.step_runs import images_of, running, short_run


@pytest.fixture(autouse=True)
def as_in_a_run(nan_poisoned_memory: None) -> Iterator[None]:
    """Without deterministic algorithms, which choose other kernels and fill memory; and no graph
    from another test."""
    torch.use_deterministic_algorithms(False)
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def quick_run(device: str, **options: Any) -> Config:
    """A short run; on a CPU of a quarter of the images, in chunks of a quarter of theirs."""
    config = short_run(device, precision="bf16", **options)
    if device == "cuda":
        return config
    assert isinstance(config.batch.chunk, int)
    batch = replace(config.batch, chunk=config.batch.chunk // 4)
    size = config.global_batch_size // 4
    return replace(config, global_batch_size=size, epochs=config.epochs / 4, batch=batch)


def at_each_fetch(trainer: Trainer, look: Callable[[int], None]) -> None:
    """Call ``look`` with the number of the step whose batch has just been fetched, from 0."""
    fetch = trainer.loader.next

    def next_batch() -> Batch:
        batch = fetch()
        look(batch.step)
        return batch

    trainer.loader.next = next_batch  # type: ignore[method-assign]


# Steps 5 to 10, none of which is logged. Both optimizers; whole and in chunks, the last one
# smaller; eager and compiled.
@pytest.mark.parametrize(
    ("device", "chunk", "compiled", "backend"),
    [
        ("cpu", 20, False, "torch"),  # there fastmoco's sweep reads its numbers on the host
        pytest.param("cuda", "none", False, "fastmoco", marks=pytest.mark.gpu),
        pytest.param("cuda", "none", False, "torch", marks=pytest.mark.gpu),
        pytest.param("cuda", 20, False, "fastmoco", marks=pytest.mark.gpu),
        pytest.param("cuda", "none", True, "fastmoco", marks=pytest.mark.gpu),
        pytest.param("cuda", 20, True, "fastmoco", marks=pytest.mark.gpu),
    ],
)
def test_between_log_steps_the_loop_never_waits_for_the_device(
    device: str, chunk: Any, compiled: bool, backend: Any, tmp_path: Path
) -> None:
    config = quick_run(device, chunk=chunk, kept=1, compile=compiled)
    config = replace(config, optim=replace(config.optim, fused_backend=backend, clip_norm=1.0))
    watched = []
    counter = StepCounter()

    def look(step: int) -> None:
        if 4 <= step < 10:
            watched.append(step)
        if device == "cpu" and step == 4:
            counter.__enter__()
        if device == "cpu" and step == 10:
            counter.__exit__()
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("error" if 4 <= step < 10 else "default")
            if step == 5:  # the watch sees something
                with pytest.raises(RuntimeError, match="synchronizing CUDA operation"):
                    torch.ones(1, device="cuda").item()

    with running(config, tmp_path, device) as trainer:
        at_each_fetch(trainer, look)
        try:
            assert trainer.run() == 0
        finally:
            if device == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    assert watched == [4, 5, 6, 7, 8, 9]
    assert not counter.waits
    assert bool(counter.operators) == (device == "cpu")


# Every second step is logged, which empties what the recorder keeps on the device between log
# steps.
@pytest.mark.parametrize(
    ("device", "chunk", "compiled"),
    [
        ("cpu", 20, False),
        pytest.param("cuda", "none", False, marks=pytest.mark.gpu),
        pytest.param("cuda", 20, False, marks=pytest.mark.gpu),
        pytest.param("cuda", 20, True, marks=pytest.mark.gpu),
    ],
)
def test_from_the_tenth_step_on_memory_stays_as_it_is(
    device: str, chunk: Any, compiled: bool, tmp_path: Path
) -> None:
    config = quick_run(device, chunk=chunk, kept=1, compile=compiled, steps=16)
    config = replace(config, log_every_steps=2)
    held: list[tuple[int, int]] = []

    def look(step: int) -> None:
        if step >= 10 and step % 2 == 0:
            # What was asked for: what was given depends on which free block was there.
            names = ("requested", "reserved") if device == "cuda" else ("tensor", "tensor")
            found = memory(torch.device(device, 0) if device == "cuda" else torch.device(device))
            held.append((found[f"{names[0]}_bytes"], found[f"{names[1]}_bytes"]))

    with running(config, tmp_path, device) as trainer:
        at_each_fetch(trainer, look)
        assert trainer.run() == 0
    assert len(held) == 3
    assert [asked for asked, _ in held] == [held[0][0]] * 3, held
    assert [reserved for _, reserved in held] == [held[0][1]] * 3, held
    assert held[0][0] > 2**16


def symbolic_shapes(monkeypatch: pytest.MonkeyPatch, device: str) -> list[bool]:
    """A list that grows with each graph that torch.compile makes: whether a size in it is a symbol.

    On a CPU the graph then runs as it is: what is compiled again and when is decided before.
    """
    module = importlib.import_module("torch._inductor.compile_fx")
    compile_fx, graphs = module.compile_fx, []

    def note(graph: torch.fx.GraphModule, inputs: Any, *arguments: Any, **options: Any) -> Any:
        graphs.append(any(isinstance(value, torch.SymInt) for value in inputs))
        return (
            graph.forward if device == "cpu" else compile_fx(graph, inputs, *arguments, **options)
        )

    monkeypatch.setattr(module, "compile_fx", note)
    return graphs


# Whole, and in chunks of which the last is smaller: 20, 20 and 8 images.
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("chunk", ["none", 20])
def test_after_an_evaluation_and_two_steps_nothing_is_compiled_again(
    device: str, chunk: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """kNN before the first step sees batches of two sizes; training graphs must not turn dynamic by
    it."""
    graphs = symbolic_shapes(monkeypatch, device)
    config = short_run(device, precision="bf16", chunk=chunk, kept=1, compile=True)
    with running(config, tmp_path, device) as trainer:
        measure(trainer, device)
        evaluated = len(graphs)
        for step in range(2):  # one is logged, one is not
            trainer.step(images_of(config, step, device))
        assert len(graphs) > evaluated
        assert not any(graphs)
        compiled = len(graphs)
        with torch.compiler.set_stance("fail_on_recompile"):
            for step in range(2, 5):
                trainer.step(images_of(config, step, device))
                measure(trainer, device)
        assert len(graphs) == compiled


def measure(trainer: Trainer, device: str) -> None:
    """The features of 39 images in batches of 16, as kNN takes them: the last batch has 7."""

    def batches() -> Iterator[EvalBatch]:
        for rows in (16, 16, 7):
            images = images_of(trainer.config, 0, device, rows=rows).views[0]
            yield EvalBatch(
                images=images, labels=np.zeros(rows, np.int64), sample_ids=np.arange(rows)
            )

    def encode(images: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device, dtype=torch.bfloat16):
            features: torch.Tensor = trainer.objective.encoder(images)
        return features

    encoder = trainer.objective.encoder
    encoder.eval()
    features, _ = embed(encode, batches())
    encoder.train()
    assert features.shape == (39, encoder.embed_dim)
