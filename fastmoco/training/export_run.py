"""Export an encoder: write it in the format of another package, read the file back, and compare the
features of images before the file gets its name."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastmoco
from fastmoco.checkpoint import CheckpointError
from fastmoco.config import Config
from fastmoco.models.encoder_file import Description
from fastmoco.models.weights.foreign import Normalised
from fastmoco.models.weights.judging import (
    Comparison,
    compare_features,
    features_of_export,
    require_reader,
)
from fastmoco.models.weights.writing import (
    Target,
    official_checkpoint,
    plain_encoder,
    refusal,
    write_encoder,
)
from fastmoco.training.encoder_source import EncoderSource, Which, load_source
from fastmoco_pipelines import ShardError, build_eval_loader
from fastmoco_pipelines.files.whole import folder_for, hash_file, whole_file, write_file
from fastmoco_pipelines.spec import IMAGENET_MEAN, IMAGENET_STD, EvalSpec

IMAGES = 32
"""Images whose features are compared."""
NAMES_ALONE: tuple[Target, ...] = ("moco-v3", "torchvision")
"""Formats of tensors and their names, without a description."""
REPORT = ".report.json"
"""What follows the name of an exported file in the name of its report."""


@dataclass(frozen=True, kw_only=True)
class Export:
    """What was written.

    Attributes:
        path: the file, or the folder of Hugging Face.
        report: its report, JSON.
        comparison: of features.
        images: where the images come from, as a clause.
        tensors: number of tensors of the encoder, or of all networks for moco-v3.
    """

    path: Path
    report: Path
    comparison: Comparison
    images: str
    tensors: int


def export_encoder(
    source: Path,
    to: Target,
    out: Path,
    *,
    which: Which | None = None,
    best: bool = False,
    heads: int | None = None,
    normalised: Normalised | None = None,
    shards: str | None = None,
    report: Callable[[str], None] = lambda text: None,
) -> Export:
    """Write the encoder of a run or of a file in another format.

    Args:
        source: as of `load_source`.
        to: the format.
        out: a new file, or for "hf" a new folder.
        which: the encoder; None: as of `load_source`. "moco-v3" contains both, and compares this
            one.
        best: as of `load_source`.
        heads: as of `load_source`.
        normalised: as of `load_source`.
        shards: images to compare features of; None: those that the run was trained on.
        report: called with each note about the source, in a sentence.

    Raises:
        RunError, CheckpointError: if there is no such encoder, the format cannot express it, `out`
            exists, or the features differ; nothing is written then.
        ModuleNotFoundError: naming the package that reads the format back.
    """
    if os.path.lexists(out):
        raise CheckpointError(f"{out} exists; choose another --out")
    require_reader(to)
    found = load_source(source, which=which, best=best, heads=heads, normalised=normalised)
    which = which or found.facts["encoder"]
    for note in found.notes:
        report(note)
    description = found.description
    assert description is not None  # noqa: S101 - a type: every source that is loaded has one
    if reason := refusal(to, description):
        raise CheckpointError(f"{source}: {reason}")
    if to == "moco-v3" and found.config is not None and found.config.objective.kind != "moco_v3":
        raise CheckpointError(
            f"{source}: --to moco-v3 needs a run of MoCo v3, this one is of "
            f"{found.config.objective.kind}; export the encoder alone: --to timm, torchvision or hf"
        )
    if to in NAMES_ALONE and (found.image.mean, found.image.std) != (IMAGENET_MEAN, IMAGENET_STD):
        report(
            f"--to {to} has no place for how images are normalised, and its readers take mean and "
            f"deviation of ImageNet: this encoder needs mean {found.image.mean} and deviation "
            f"{found.image.std}"
        )

    # Features of ours, of the plain encoder and in float32.
    images, origin = _images(found.config, found.image, shards, report)
    encoder = plain_encoder(found.encoder, description)
    with torch.no_grad():
        ours = encoder(images)

    # Write, read back, compare; only then the file gets its name.
    count = len(encoder.state_dict())
    official: dict[str, Any] = {}
    if to == "moco-v3":
        official = _official(found, description, source)
        count = len(official["state_dict"])
    with folder_for(out.absolute().parent), _whole(out, folder=to == "hf") as fresh:
        if to == "moco-v3":
            torch.save(official, fresh)
        else:
            write_encoder(to, fresh, encoder, description, found.header)
        theirs, reader = features_of_export(to, fresh, images, which=which, heads=description.heads)
        comparison = compare_features(ours, theirs, reader)
        if not comparison.good:
            raise CheckpointError(
                f"{out} was not written: its features by {reader} differ from ours by up to "
                f"{comparison.max_error:.3g}, where ours reach {comparison.max_feature:.3g} "
                f"(lowest cosine {comparison.lowest_cosine:.6f})"
            )
        digest = None if to == "hf" else hash_file(fresh)
    content = {
        "format": to,
        "fastmoco": fastmoco.__version__,
        "torch": str(torch.__version__),
        "sha256": digest,
        "tensors": count,
        "images": origin,
        "comparison": asdict(comparison),
        "source": found.facts,
    }
    path = out.with_name(out.name + REPORT)
    write_file(path, (json.dumps(content, indent=1, default=str) + "\n").encode())
    return Export(path=out, report=path, comparison=comparison, images=origin, tensors=count)


def _official(found: EncoderSource, description: Description, source: Path) -> dict[str, Any]:
    """All networks of a run or of an official checkpoint in the official format."""
    if not found.networks:
        raise CheckpointError(
            f"{source} has not the networks of MoCo v3; the official format has encoder, momentum "
            "encoder and predictor, so it needs a run or a checkpoint of moco-v3. Use --to timm, torchvision or hf"
        )
    facts = found.facts
    per_epoch = float(found.header.get("epochs_done", 0))
    return official_checkpoint(
        {
            name: tensor.detach().to(torch.float32 if tensor.dtype == torch.float64 else None)
            for name, tensor in found.networks.items()
        },
        description.family,
        arch=str(facts.get("arch", description.architecture)),
        epoch=int(facts.get("epoch", round(per_epoch))),
    )


def _images(
    config: Config | None,
    image: EvalSpec,
    shards: str | None,
    report: Callable[[str], None],
) -> tuple[Tensor, str]:
    """Images to compare features of, [B, 3, H, W], and where they come from.

    Without a set, or where that of the run cannot be read, they are random numbers.
    """
    wanted = shards
    if wanted is None and config is not None and not config.data.synthetic:
        wanted = config.data.shards
    if wanted:
        try:
            return _of_shards(wanted, config, image), f"{wanted}"
        except (ShardError, ValueError, OSError) as error:
            if shards is not None:
                raise
            report(f"the images of the run cannot be read ({error}); give others by --images")
    report("features are compared for random numbers in place of images; give some by --images")
    generator = torch.Generator().manual_seed(0)
    return torch.randn(IMAGES, 3, image.size, image.size, generator=generator), "random numbers"


def _of_shards(shards: str, config: Config | None, image: EvalSpec) -> Tensor:
    spec = (config or Config()).eval_loader_spec(
        shards, device="cpu", threads=1, limit=IMAGES, image=image
    )
    with closing(build_eval_loader(spec)) as loader:
        images = [batch.images.clone() for batch in loader]
    if not images:
        raise ValueError(f"{shards}: has no image that decodes")
    return torch.cat(images)[:IMAGES]


@contextmanager
def _whole(out: Path, *, folder: bool) -> Iterator[Path]:
    """A new name beside `out`, which becomes `out` when the block ends without an error."""
    if not folder:
        with whole_file(out) as fresh:
            yield fresh
        return
    fresh = out.with_name(f".{out.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield fresh
        os.rename(fresh, out)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
