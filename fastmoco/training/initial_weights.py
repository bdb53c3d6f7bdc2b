"""`model.init`: the encoders of a run start from the weights of a file or of another run.

They are read once, when a run begins: a run that continues has its own. Every rank reads them and
fills its whole networks before these are sharded, and the ranks compare what they have read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastmoco.checkpoint import CheckpointError, find_checkpoint
from fastmoco.checkpoint.folder import MARKER, STATE
from fastmoco.config import Config
from fastmoco.config.serial import from_json
from fastmoco.distributed.agree import any_rank, of_first_rank
from fastmoco.distributed.mesh import World
from fastmoco.errors import RunError
from fastmoco.models.blocks import Block
from fastmoco.models.encoder import trunk_of
from fastmoco.models.encoder_file import CONFIG_VALUES, describe_run
from fastmoco.models.vit import VisionTransformer
from fastmoco.models.weights.fitting import Fit, fit_encoder
from fastmoco.models.weights.foreign import EncoderWeights, find_encoder
from fastmoco.models.weights.names import OF_DINO
from fastmoco.models.weights.reading import is_weights, read_weights
from fastmoco.objectives.interface import Objective
from fastmoco_pipelines.files.whole import at_home, hash_file

INITIAL = "initial_weights"
"""Where `config.json` of a run names them."""
_UNSEEN = {"pooling": "--model.pooling", "norm_eps": "--model.norm-eps"}
"""Keys of the header that say what tensors do not, beside heads and images -> their options."""
NETWORKS = ("encoder", "momentum_encoder")
"""The networks of an objective that start from the weights."""


@dataclass(frozen=True, kw_only=True)
class InitialWeights:
    """What the encoders of a run started from.

    Attributes:
        path: as given.
        weights: of the file or run.
        sha256: of the file; of a run that of the list of its checkpoint's files.
        fit: how they fill an encoder.
        filled: the networks that they filled.
        warnings: how the run uses them in another way than they were trained, in sentences.
    """

    path: str
    weights: EncoderWeights
    sha256: str
    fit: Fit
    filled: tuple[str, ...]
    warnings: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """For `config.json`."""
        return {
            "path": self.path,
            "file": self.weights.source,
            "sha256": self.sha256,
            "format": self.weights.format,
            "encoder": self.weights.which,
            "filled": list(self.filled),
            "tensors": self.fit.counts(),
        }

    def lines(self) -> list[str]:
        """For the log."""
        names = " and ".join(name.replace("_", " ") for name in self.filled)
        verb = "start" if len(self.filled) > 1 else "starts"
        which = f", {self.weights.which} encoder" if self.weights.format == OF_DINO else ""
        first = (
            f"{names} {verb} from {self.weights.source} ({self.weights.format}{which}, SHA-256 "
            f"{self.sha256[:16]}):"
        )
        warned = [f"warning: {text}" for text in self.warnings]
        return [first, *self.fit.lines(), *self.weights.notes, *self.fit.notes, *warned]


def start_from(config: Config, objective: Objective, world: World) -> InitialWeights | None:
    """Fill the encoders of an objective with the weights of `model.init`. All ranks call it.

    Args:
        config: of the run.
        objective: newly built, not sharded.
        world: this process among its peers.

    Returns:
        What was filled; None without `model.init`.

    Raises:
        RunError, CheckpointError: naming the file, what did not fit and the cure; nothing is filled
            then.
    """
    if not config.model.init:
        return None
    found: InitialWeights | None = None
    error: RunError | None = None
    try:
        found = _read(config, objective)
    except RunError as raised:
        error = raised
    if any_rank(error is not None, world.device):
        raise error or _elsewhere(config)
    assert found is not None  # noqa: S101 - a type: else the error above is raised

    # A node may have another file of this name.
    own = int(found.sha256[:15], 16)
    if any_rank(own != of_first_rank(own, world.device), world.device):
        raise RunError(
            f"model.init={config.model.init!r} is not the same file on all ranks; give every node "
            "the same one"
        )
    for name in found.filled:
        _fill(getattr(objective, name), found.fit.tensors)
    return found


def _elsewhere(config: Config) -> RunError:
    error = RunError(f"model.init={config.model.init!r}: another rank could not read it")
    error.repeats = True
    return error


def _read(config: Config, objective: Objective) -> InitialWeights:
    """Read the weights and find the place of each, with errors that name the field."""
    given = config.model.init
    try:
        path = Path(at_home(given))
        if is_weights(path):
            raw = read_weights(path)
            weights, digest = find_encoder(raw), raw.sha256()
        else:
            weights, digest = _of_run(path)
        fit = fit_encoder(
            _encoder(objective).state_dict(),
            weights,
            positions=config.model.positions,
            heads=_heads(_encoder(objective)),
        )
    except (OSError, ValueError) as error:
        raise CheckpointError(f"model.init={given!r} cannot be read: {error}") from error
    except RunError as error:
        raise type(error)(f"model.init={given!r}: {error}") from error
    filled = tuple(name for name in NETWORKS if name in objective.networks())
    return InitialWeights(
        path=given,
        weights=weights,
        sha256=digest,
        fit=fit,
        filled=filled,
        warnings=_used_otherwise(config, weights),
    )


def _used_otherwise(config: Config, weights: EncoderWeights) -> tuple[str, ...]:
    """What no tensor shows, and the run has otherwise than the weights say."""
    own = describe_run(config)
    ours, theirs = own.to_metadata(), weights.facts.get("header", {})
    found = []
    for key, option in _UNSEEN.items():
        if key in ours and theirs.get(key, ours[key]) != ours[key]:
            value = CONFIG_VALUES.get(theirs[key], theirs[key])
            found.append(
                f"these weights are of a run with model.{key}={value}, and give other features with "
                f"{getattr(config.model, key)}; {option} {value} keeps theirs"
            )
    image = weights.image
    if (image.mean, image.std) != (own.image.mean, own.image.std):
        found.append(
            f"these weights are of images normalised by mean {_numbers(image.mean)} and deviation "
            f"{_numbers(image.std)}, those of this run by {_numbers(own.image.mean)} and "
            f"{_numbers(own.image.std)}: give theirs to --data.view1.mean, --data.view1.std and the "
            "other views"
        )
    return tuple(found)


def _numbers(values: tuple[float, ...]) -> str:
    return " ".join(f"{value:g}" for value in values)


def _encoder(objective: Objective) -> nn.Module:
    encoder = objective.encoder
    assert isinstance(encoder, nn.Module)  # noqa: S101 - a type: every objective has an encoder
    return encoder


def _heads(encoder: nn.Module) -> int | None:
    """Attention heads; None for a ResNet."""
    if not isinstance(encoder, VisionTransformer):
        return None
    block = encoder.blocks[0]
    assert isinstance(block, Block)  # noqa: S101 - a type: all blocks are of this class
    return block.attn.num_heads


def _of_run(path: Path) -> tuple[EncoderWeights, str]:
    """The encoder that a run evaluates, of its newest checkpoint, and the hash of its list of
    files."""
    if not path.exists():
        raise CheckpointError(
            "there is no such file or folder; give a file of weights or the folder of a run"
        )
    checkpoint = find_checkpoint(path)
    if "config" not in checkpoint.state:
        raise CheckpointError(f"{checkpoint.path} has no config: it is no checkpoint of a run")
    config = from_json(checkpoint.state["config"], file=checkpoint.path / STATE)
    description = describe_run(config)
    beginning = f"model.{config.objective.evaluated}."
    tensors = {
        name.removeprefix(beginning): tensor
        for name, tensor in checkpoint.tensors.items()
        if name.startswith(beginning)
    }
    weights = EncoderWeights(
        source=str(checkpoint.path),
        format=f"run of fastmoco, {config.objective.kind}",
        family=description.family,
        trunk=trunk_of(tensors),
        beside={name: "projector" for name in tensors if name.startswith("head.")},
        heads=description.heads,
        image=description.image,
        facts={"header": description.to_metadata()},
        notes=tuple(f"passed over {p.name}: {reason}" for p, reason in checkpoint.skipped),
    )
    return weights, hash_file(checkpoint.path / MARKER)


def _fill(network: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy tensors into a network, in its dtype and on its device."""
    places = network.state_dict()
    with torch.no_grad():
        for name, tensor in tensors.items():
            places[name].copy_(tensor)
