"""Features of an exported file by a loader that shares nothing with the writer, and their distance
from ours.

Hugging Face folders are read by transformers, ONNX by onnxruntime, a program by torch.export. The
formats that are names alone are read by `foreign` and built from the file.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastmoco.checkpoint import CheckpointError
from fastmoco.models.weights.building import load_foreign
from fastmoco.models.weights.foreign import Which, find_encoder
from fastmoco.models.weights.reading import read_weights
from fastmoco.models.weights.writing import Target

TOLERANCE = 1e-5
"""Largest error of a feature in float32, over the largest feature where that is above 1."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The features of an exported file beside ours.

    Attributes:
        reader: what computed those of the file.
        images: number of images.
        lowest_cosine: between the two features of an image, the lowest of all.
        max_error: largest difference of an element.
        max_feature: largest element of ours.
    """

    reader: str
    images: int
    lowest_cosine: float
    max_error: float
    max_feature: float

    @property
    def good(self) -> bool:
        """Whether they agree to rounding."""
        return self.max_error <= TOLERANCE * max(1.0, self.max_feature)


def compare_features(ours: Tensor, theirs: Tensor, reader: str) -> Comparison:
    """Compare [B, E] features of the same images."""
    if ours.shape != theirs.shape or not bool(torch.isfinite(theirs).all()):
        return Comparison(
            reader=reader,
            images=len(ours),
            lowest_cosine=float("nan"),
            max_error=float("inf"),
            max_feature=float(ours.abs().max()),
        )
    a, b = ours.double(), theirs.double()
    cosine = torch.nn.functional.cosine_similarity(a, b, dim=1)
    return Comparison(
        reader=reader,
        images=len(ours),
        lowest_cosine=float(cosine.min()),
        max_error=float((a - b).abs().max()),
        max_feature=float(a.abs().max()),
    )


def features_of_export(
    to: Target, path: Path, images: Tensor, *, which: Which, heads: int | None
) -> tuple[Tensor, str]:
    """Features of images by an exported file, and what computed them.

    Args:
        to: the format.
        path: of the file or folder.
        images: [B, 3, H, W] float32.
        which: the encoder, for a file of both.
        heads: attention heads, for formats that do not contain them.

    Raises:
        CheckpointError: if a reader of the file would take another number of heads.
    """
    if to == "hf":
        return _by_transformers(path, images)
    if to == "onnx":
        return _by_onnxruntime(path, images)
    if to == "torch-export":
        with path.open("rb") as file:  # torch warns about a path that does not end in .pt2
            program = torch.export.load(file)
        return _in_parts(program.module(), images), f"torch.export of torch {torch.__version__}"
    which_one = which if to == "moco-v3" else None
    read_as = find_encoder(read_weights(path), which_one).heads
    if read_as not in (None, heads):
        raise CheckpointError(
            f"--to {to} has no place for the number of attention heads: whoever reads the file takes "
            f"{read_as}, and this encoder has {heads}; timm, hf and safetensors state the number"
        )
    loaded = load_foreign(path, which_one, heads=heads)
    return _in_parts(loaded.encoder, images), f"fastmoco, as {loaded.weights.format}"


def require_reader(to: Target) -> None:
    """Import the package that reads a format back, before anything is written.

    Raises:
        ModuleNotFoundError: if it is not installed.
    """
    if to == "hf":
        import transformers  # noqa: F401
    elif to == "onnx":
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401


def _by_transformers(path: Path, images: Tensor) -> tuple[Tensor, str]:
    import transformers

    transformers.utils.logging.disable_progress_bar()
    config = transformers.AutoConfig.from_pretrained(path)
    if config.model_type == "vit":
        # Its pooler is a layer that MoCo v3 has not: it would start at random.
        vit: Any = transformers.ViTModel.from_pretrained(path, add_pooling_layer=False)
        features = _in_parts(lambda x: vit.eval()(x).last_hidden_state[:, 0], images)
    else:
        resnet: Any = transformers.ResNetModel.from_pretrained(path)
        features = _in_parts(lambda x: resnet.eval()(x).pooler_output.flatten(1), images)
    return features, f"transformers {transformers.__version__}"


def _by_onnxruntime(path: Path, images: Tensor) -> tuple[Tensor, str]:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    features = _in_parts(
        lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0]), images
    )
    return features, f"onnxruntime {onnxruntime.__version__}"


def _in_parts(encode: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """Features of one image alone and of the others together: two sizes of a batch."""
    with torch.no_grad():
        parts = [encode(part) for part in (images[:1], images[1:]) if len(part)]
    return torch.cat(parts)
