"""Files of features for other programs: .safetensors, .npz, .npy and .parquet, written block by
block, so that a set's features need not fit into memory."""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastmoco.evaluation.embeddings import ImageNames
from fastmoco_pipelines.files.whole import whole_file
from fastmoco_pipelines.formats.index_json import path_to_json

SUFFIXES = (".npz", ".npy", ".safetensors", ".parquet")
MOST_METADATA = 90_000_000
"""Bytes; safetensors reads no header of more than 100 million."""

FeatureType = Literal["float32", "float16"]


def names_beside(out: Path) -> Path:
    """The file with labels, samples and paths that belongs to a `.npy`, which holds one array."""
    return out.with_suffix(".names.npz")


def require_target(out: Path) -> None:
    """Refuse a file of a form that `write_features` does not know, or that exists.

    Raises:
        ValueError: naming the file and the cure.
        ModuleNotFoundError: without pyarrow, for `.parquet`.
    """
    if out.suffix not in SUFFIXES:
        forms = f"{', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"
        raise ValueError(f"out={str(out)!r}: must end in {forms}")
    for path in (out, names_beside(out))[: 2 if out.suffix == ".npy" else 1]:
        if path.exists():
            raise ValueError(f"out={str(out)!r}: {path.name} exists; choose another file")
    if out.suffix == ".parquet":
        import pyarrow.parquet  # noqa: F401 - refused before anything is computed


def write_features(
    images: ImageNames,
    shape: tuple[int, ...],
    blocks: Iterable[Tensor],
    out: Path,
    *,
    dtype: FeatureType = "float32",
) -> Path:
    """Write features and names into one file, whole or not at all.

    `.npz` has the arrays `features`, `labels`, `samples`, `paths`, `classes` (both of text, which
    `numpy.load` reads without pickle) and `step`. `.npy` has the features alone, which
    `numpy.load(..., mmap_mode="r")` maps; `names_beside` it has the others. `.safetensors` has the
    first three as tensors; its metadata is `step`, and `paths` and `classes` as JSON. `.parquet`
    has a row for each image, with the columns `path`, `label`, `sample` and `features`, and `step`,
    `shape` and `classes` in the metadata of its schema.

    Bytes of a path that are not UTF-8 are surrogates in an array, as in Python's names of files,
    and an object {"bytes": BASE64} in JSON; a column of Parquet has this object as text.

    Args:
        images: names of the n images.
        shape: [n, ...] of the features.
        blocks: the features, some rows at a time, in order.
        out: a new file; its ending is the form.
        dtype: of the features in the file.

    Raises:
        ValueError: as of `require_target`; or if a set has too many names for `.safetensors`.
        OSError: if the file cannot be written.
    """
    require_target(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    target = torch.float16 if dtype == "float16" else torch.float32
    arrays = (np.ascontiguousarray(block.to(target).numpy()) for block in blocks)
    writers = {
        ".npz": _write_npz,
        ".npy": _write_npy,
        ".safetensors": _write_safetensors,
        ".parquet": _write_parquet,
    }
    if out.suffix == ".npy":  # first: where the features are, the names are too
        with whole_file(names_beside(out)) as fresh, zipfile.ZipFile(fresh, "w") as archive:
            _write_arrays(archive, _names(images))
    with whole_file(out) as fresh:
        writers[out.suffix](images, shape, np.dtype(dtype), arrays, fresh)
    return out


Blocks = Iterator[NDArray[Any]]


def _names(images: ImageNames) -> dict[str, NDArray[Any]]:
    """Everything but the features, as arrays."""
    return {
        "labels": images.labels.numpy(),
        "samples": images.sample_ids,
        "paths": np.array(images.paths, dtype=np.str_),
        "classes": np.array(images.classes, dtype=np.str_),
        "step": np.array(images.step, dtype=np.int64),
    }


def _write_npz(
    images: ImageNames, shape: tuple[int, ...], dtype: np.dtype[Any], blocks: Blocks, out: Path
) -> None:
    with zipfile.ZipFile(out, "w") as archive:
        with archive.open("features.npy", "w", force_zip64=True) as file:
            _write_array(file, shape, dtype, blocks)
        _write_arrays(archive, _names(images))


def _write_arrays(archive: zipfile.ZipFile, arrays: dict[str, NDArray[Any]]) -> None:
    for name, array in arrays.items():
        with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
            np.lib.format.write_array(file, array, allow_pickle=False)


def _write_npy(
    images: ImageNames, shape: tuple[int, ...], dtype: np.dtype[Any], blocks: Blocks, out: Path
) -> None:
    with open(out, "xb") as file:
        _write_array(file, shape, dtype, blocks)


def _write_array(
    file: IO[bytes], shape: tuple[int, ...], dtype: np.dtype[Any], blocks: Blocks
) -> None:
    """An array in the format of numpy."""
    header = {"descr": dtype.str, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    for block in blocks:
        file.write(block.data.cast("B"))


def _write_safetensors(
    images: ImageNames, shape: tuple[int, ...], dtype: np.dtype[Any], blocks: Blocks, out: Path
) -> None:
    """The format of safetensors: the length of a JSON header, the header, and the tensors."""
    paths = json.dumps([path_to_json(path) for path in images.paths])
    if len(paths) > MOST_METADATA:
        raise ValueError(
            f"out={str(out)!r}: the names of {len(images)} files do not fit into the header of "
            "safetensors: choose a file that ends in .npz, .npy or .parquet"
        )
    metadata = {
        "step": str(images.step),
        "paths": paths,
        "classes": json.dumps([path_to_json(name) for name in images.classes]),
    }
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    kinds = {"float32": "F32", "float16": "F16"}
    for name, kind, size, dims in (
        ("labels", "I64", 8, (len(images),)),
        ("samples", "I64", 8, (len(images),)),
        ("features", kinds[dtype.name], dtype.itemsize, shape),
    ):
        offsets = [end, end + size * math.prod(dims)]
        header[name] = {"dtype": kind, "shape": list(dims), "data_offsets": offsets}
        end = offsets[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(out, "xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.write(images.labels.numpy().data.cast("B"))
        file.write(images.sample_ids.data.cast("B"))
        for block in blocks:
            file.write(block.data.cast("B"))


def _write_parquet(
    images: ImageNames, shape: tuple[int, ...], dtype: np.dtype[Any], blocks: Blocks, out: Path
) -> None:
    """One group of rows for each block."""
    import pyarrow
    from pyarrow import parquet

    feature = pyarrow.from_numpy_dtype(dtype)
    for width in reversed(shape[1:]):
        feature = pyarrow.list_(feature, width)
    metadata = {
        "step": str(images.step),
        "shape": json.dumps(shape),
        "classes": json.dumps([path_to_json(name) for name in images.classes]),
    }
    columns = [("path", pyarrow.string()), ("label", pyarrow.int64()), ("sample", pyarrow.int64())]
    schema = pyarrow.schema([*columns, ("features", feature)], metadata=metadata)
    first = 0
    with parquet.ParquetWriter(out, schema) as writer:
        for block in blocks:
            part = slice(first, first + len(block))
            first += len(block)
            values = pyarrow.array(block.reshape(-1))
            for width in reversed(shape[1:]):
                values = pyarrow.FixedSizeListArray.from_arrays(values, width)
            rows = [
                pyarrow.array([_text(path) for path in images.paths[part]], pyarrow.string()),
                pyarrow.array(images.labels.numpy()[part]),
                pyarrow.array(images.sample_ids[part]),
                values,
            ]
            writer.write_table(pyarrow.Table.from_arrays(rows, schema=schema))


def _text(path: str) -> str:
    """A path as text that is UTF-8."""
    found = path_to_json(path)
    return found if isinstance(found, str) else json.dumps(found)
