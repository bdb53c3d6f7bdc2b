"""Open files of weights of any origin. Nothing in a file is executed.

A `.pt` or `.pth` file is a pickle, which can run any code when it is unpickled. It is read as data
(`checkpoint.torch_file`): tensors and plain containers; a file that needs more is refused, never
read in another way.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from fastmoco.checkpoint import CheckpointError
from fastmoco.checkpoint.pickle_machine import UnknownNameError
from fastmoco.checkpoint.safetensors_file import read_safetensors
from fastmoco.checkpoint.torch_file import distinct_bytes, is_tensor_of_another_kind, read_torch
from fastmoco.models.weights.names import unwrapped
from fastmoco_pipelines.files.small import UnfitFileError, open_regular, read_json
from fastmoco_pipelines.files.whole import hash_file

FOLDER_FILES = ("model.safetensors", "pytorch_model.bin")
"""Weights in a folder of Hugging Face, the preferred first."""
SHARDED = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
WRAPPED_IN = ("state_dict", "model")
"""Keys under which a torch file has its tensors, beside others."""
PAIR = ("student", "teacher")
"""Keys under which a checkpoint of DINO or EsViT has those of two networks."""
CONFIG = "config.json"
PREPROCESSOR = "preprocessor_config.json"
MOST_JSON_BYTES = 10 * 2**20
MOST_SHARED = 2
"""How often a byte of a file may be part of a tensor, on average: tied weights share theirs."""


@dataclass(frozen=True, kw_only=True)
class RawWeights:
    """What a file of weights contains.

    Attributes:
        path: of the file; in a folder, of the file of the weights.
        tensors: by the names of the file, on the host.
        header: metadata of a safetensors file.
        container: entries of a torch file beside its tensors, numbers and texts only.
        wrapped_in: keys under which the tensors were: "state_dict", "model"; empty at the top.
        config: `config.json` beside the weights in a folder; empty without one.
        preprocessor: `preprocessor_config.json` in a folder; empty without one.
    """

    path: Path
    tensors: dict[str, Tensor]
    header: Mapping[str, str] = field(default_factory=dict)
    container: Mapping[str, Any] = field(default_factory=dict)
    wrapped_in: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    preprocessor: Mapping[str, Any] = field(default_factory=dict)

    def sha256(self) -> str:
        """SHA-256 (hex) of the file of the weights."""
        return hash_file(self.path)


def is_weights(path: Path) -> bool:
    """Whether a path is a file of weights, or a folder of Hugging Face, not of a run."""
    return path.is_file() or any((path / name).is_file() for name in (*FOLDER_FILES, *SHARDED))


def read_weights(path: Path) -> RawWeights:
    """Read a file of weights, or a folder of Hugging Face.

    Raises:
        CheckpointError: naming the file, what is wrong with it and the cure.
    """
    config: Mapping[str, Any] = {}
    preprocessor: Mapping[str, Any] = {}
    if path.is_dir():
        file = next((path / name for name in FOLDER_FILES if (path / name).is_file()), None)
        if file is None:
            raise CheckpointError(
                f"{path} has its weights in several files, which are not read: join them by "
                "model.save_pretrained(folder, max_shard_size='100GB') of transformers"
            )
        config, preprocessor = _json(path / CONFIG), _json(path / PREPROCESSOR)
    else:
        file = path
        if path.name in FOLDER_FILES:
            config, preprocessor = _json(path.parent / CONFIG), _json(path.parent / PREPROCESSOR)
    try:
        with open(open_regular(file), "rb") as opened:
            beginning = opened.read(16)
        raw = _read_safetensors(file) if _is_safetensors(beginning) else _read_torch(file)
    except UnfitFileError as error:
        raise CheckpointError(str(error)) from error
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror or error}") from error
    _require_plain(raw)
    return RawWeights(
        path=file,
        tensors=raw.tensors,
        header=raw.header,
        container=raw.container,
        wrapped_in=raw.wrapped_in,
        config=config,
        preprocessor=preprocessor,
    )


def _is_safetensors(beginning: bytes) -> bool:
    """A safetensors file begins with the length of a JSON object; a torch file with `PK`, or with
    a pickle of a number."""
    return beginning[8:9] == b"{"


def _read_safetensors(path: Path) -> RawWeights:
    try:
        header, tensors = read_safetensors(path)
    except UnfitFileError as error:
        raise CheckpointError(str(error)) from error
    except (ValueError, MemoryError) as error:
        raise CheckpointError(
            f"{path} cannot be read as safetensors: {str(error) or type(error).__name__}. It is "
            "damaged or incomplete: copy or download it again"
        ) from error
    return RawWeights(path=path, tensors=tensors, header=header)


def _read_torch(path: Path) -> RawWeights:
    try:
        content = read_torch(path)
    except UnknownNameError as error:
        raise CheckpointError(
            f"{path} is not read: it contains {error.name}. Only tensors, numbers and texts are "
            "read from a pickle, because anything else in it could run code. If the file is "
            "one of weights, save its tensors again where it was made: "
            "`safetensors.torch.save_file(model.state_dict(), 'weights.safetensors')`"
        ) from error
    except UnfitFileError as error:
        raise CheckpointError(str(error)) from error
    except (ValueError, RuntimeError, OverflowError, MemoryError) as error:
        raise CheckpointError(
            f"{path} cannot be read, neither as safetensors nor as a file of torch: "
            f"{str(error) or type(error).__name__}. It is damaged, incomplete or of another kind: "
            "copy or download it again"
        ) from error
    return _unpacked(path, content)


def _unpacked(path: Path, content: object) -> RawWeights:
    """The tensors of a file, which may be under `state_dict` or `model`, or under `student` and
    `teacher`: these words are then in front of their names."""
    container: dict[str, Any] = {}
    keys: list[str] = []
    while isinstance(content, Mapping) and len(keys) <= 2:
        wrapped = (key for key in WRAPPED_IN if isinstance(content.get(key), Mapping))
        key = next(wrapped, None)
        if key is None:
            break
        container |= _facts_of(content)
        container["keys"] = sorted(map(str, content))
        keys.append(key)
        content = content[key]
    if isinstance(content, Mapping) and any(_is_state(content.get(key)) for key in PAIR):
        container |= _facts_of(content)
        content = _of_both(path, content)
    if not isinstance(content, Mapping) or not _has_tensors(content):
        raise CheckpointError(
            f"{path} contains no weights: a dictionary of tensors by name, at the top, under "
            "state_dict or model, or under student and teacher. Save model.state_dict(), not the model"
        )
    unfit = [str(key) for key, value in content.items() if is_tensor_of_another_kind(value)]
    if unfit:
        raise CheckpointError(_no_plain(path, unfit[0], "sparse, quantised or without data"))
    tensors = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
    odd = [str(key) for key, value in content.items() if not isinstance(value, Tensor)]
    if odd:
        raise CheckpointError(f"{path}: {odd[:5]} in its state dict are no tensors")
    return RawWeights(path=path, tensors=tensors, container=container, wrapped_in=".".join(keys))


def _facts_of(content: Mapping[Any, Any]) -> dict[str, Any]:
    """Texts and numbers of a dictionary."""
    return {
        str(name): value.item() if isinstance(value, Tensor) else value
        for name, value in content.items()
        if isinstance(value, str | int | float) or _is_scalar(value)
    }


def _of_both(path: Path, content: Mapping[Any, Any]) -> dict[str, Any]:
    """The tensors of student and teacher, with these words in front of their names.

    Raises:
        CheckpointError: if one of the two is missing.
    """
    for key in PAIR:
        if not _is_state(content.get(key)):
            raise CheckpointError(
                f"{path} has no weights under {key!r}, and a checkpoint of DINO has them under "
                f"{' and '.join(PAIR)}: take the whole checkpoint"
            )
    return {
        f"{key}.{name}": tensor
        for key in PAIR
        for name, tensor in unwrapped(
            {str(name): tensor for name, tensor in content[key].items()}
        ).items()
    }


def _is_state(content: object) -> bool:
    """Whether this is a dictionary of tensors by name."""
    return isinstance(content, Mapping) and _has_tensors(content)


def _has_tensors(content: Mapping[Any, Any]) -> bool:
    """Whether a dictionary has a tensor with dimensions: a container has at most numbers."""
    return any(
        (isinstance(value, Tensor) and value.dim() > 0) or is_tensor_of_another_kind(value)
        for value in content.values()
    )


def _is_scalar(value: object) -> bool:
    return isinstance(value, Tensor) and value.dim() == 0


def _require_plain(raw: RawWeights) -> None:
    """Refuse tensors that are not what their shape says: a few bytes that claim to be a large
    tensor, and many tensors that share the bytes of one."""
    for name, tensor in raw.tensors.items():
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise CheckpointError(_no_plain(raw.path, name, f"of shape {tuple(tensor.shape)}"))
    claimed = sum(tensor.numel() * tensor.element_size() for tensor in raw.tensors.values())
    stored = distinct_bytes(raw.tensors)
    if claimed > MOST_SHARED * stored:
        raise CheckpointError(
            f"{raw.path}: its tensors have {claimed:,} bytes, and share {stored:,} of the file; "
            "save the weights again as a state dict"
        )


def _no_plain(path: Path, name: str, what: str) -> str:
    return (
        f"{path}: {name}, {what}, is no plain tensor with data of its own; save the weights again "
        "as a state dict"
    )


def _json(path: Path) -> Mapping[str, Any]:
    """A JSON object beside the weights; empty if the file is absent."""
    try:
        content = read_json(path, MOST_JSON_BYTES)
    except FileNotFoundError:
        return {}
    except UnfitFileError as error:
        raise CheckpointError(str(error)) from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is no JSON object")
    return content
