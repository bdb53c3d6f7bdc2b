"""Features of sets by the encoder of a run, with the names of their files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from fastmoco.config import Config
from fastmoco.distributed.mesh import World
from fastmoco.errors import RunError
from fastmoco.evaluation.embed import embed_part, encoder_function, eval_mode
from fastmoco.evaluation.embeddings import Embeddings
from fastmoco.evaluation.rows import MemoryRows
from fastmoco.models.precision import choose_precision
from fastmoco.training import setup
from fastmoco.training.load_run import load_run
from fastmoco_pipelines import ShardSet, build_eval_loader
from fastmoco_pipelines.spec import EvalLoaderSpec


def embed_run(
    run: Path,
    sets: Sequence[tuple[str, int]],
    world: World,
    *,
    best: bool = False,
    locate: Callable[[str, Config], str] = lambda pattern, config: pattern,
    report: Callable[[str], None] = lambda text: None,
) -> list[Embeddings]:
    """Features of some sets by the encoder of a checkpoint of a run.

    Args:
        run: folder of the run, or of one checkpoint.
        sets: for each its pattern and its largest number of images, spread over it; 0: all.
        world: this process, the only one.
        best: the checkpoint with the highest kNN accuracy, in place of the newest.
        locate: returns the shards of a pattern, which may be a folder of images.
        report: called with each image or checkpoint that is left out, in a sentence.

    Raises:
        RunError, CheckpointError: as of `load_run`; or if there are several processes.
        ShardError, ValueError: if a set cannot be opened, or has no image that decodes.
    """
    if world.world_size > 1:
        raise RunError("this command runs in one process: start it without torchrun or srun")
    objective, saved, checkpoint = load_run(run, world.device, best=best)
    for path, reason in checkpoint.skipped:
        report(f"passed over {path.name}: {reason}")
    config = replace(saved, device="auto")
    threads = setup.share_cores(config)
    encoder = objective.encoder
    with eval_mode(encoder):
        return [
            _embed(
                encoder,
                config,
                locate(pattern, config),
                limit,
                world,
                threads,
                checkpoint.step,
                report,
            )
            for pattern, limit in sets
        ]


def _embed(
    encoder: nn.Module,
    config: Config,
    pattern: str,
    limit: int,
    world: World,
    threads: int,
    step: int,
    report: Callable[[str], None],
) -> Embeddings:
    data = config.data
    device = setup.data_device(config, world)
    spec = EvalLoaderSpec(
        shards=pattern,
        image=config.eval_spec(),
        batch_size=256,
        device=device,
        threads=data.threads or threads,
        limit=limit or None,
        max_bad_share=data.max_bad_share,
        cache_dir=data.cache_dir,
        cache_size_gb=data.cache_size_gb,
    )
    with closing(ShardSet.open(pattern, cache=data)) as shards:
        loader = build_eval_loader(
            spec, device_id=world.device.index if device == "gpu" else None, shards=shards
        )
        loader.report = report
        encode = encoder_function(
            encoder, world.device, choose_precision(config.precision, world.device)
        )
        found = embed_part(encode, loader)
        assert isinstance(found.rows, MemoryRows)
        assert found.sample_ids is not None
        if not len(found.rows):
            raise ValueError(f"{pattern}: has no image that decodes")
        sample_ids = found.sample_ids.numpy()
        return Embeddings(
            features=found.rows.tensor.to(torch.float32),
            labels=found.labels,
            sample_ids=sample_ids,
            paths=shards.paths_of(sample_ids),
            classes=shards.classes,
            digest=shards.digest,
            step=step,
            pattern=pattern,
        )
