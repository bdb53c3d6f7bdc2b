"""Files of features: each form read back by other programs, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from fastmoco.evaluation.embeddings import ImageNames
from fastmoco.evaluation.feature_files import (
    SUFFIXES,
    FeatureType,
    names_beside,
    require_target,
    write_features,
)
from fastmoco_pipelines.formats.index_json import path_from_json

COUNT = 6
ODD = "dog/Gr\udcfcn.jpg"
"""A path with a byte that is not UTF-8."""
NAMES = ImageNames(
    labels=torch.arange(COUNT) % 2,
    sample_ids=np.arange(0, 2 * COUNT, 2),  # bad images are left out
    paths=[*(f"cat/{number}.jpg" for number in range(COUNT - 1)), ODD],
    classes=("cat", "dog"),
    digest="a",
    step=7,
)


def read_npz(out: Path) -> dict[str, Any]:
    with np.load(out) as archive:
        found = {name: archive[name] for name in archive.files}
    return found | {"paths": found["paths"].tolist(), "classes": found["classes"].tolist()}


def read_npy(out: Path) -> dict[str, Any]:
    return {"features": np.load(out, mmap_mode="r"), **read_npz(names_beside(out))}


def read_safetensors(out: Path) -> dict[str, Any]:
    with safe_open(out, "np") as file:
        metadata = file.metadata()
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    paths = [path_from_json(path) for path in json.loads(metadata["paths"])]
    return found | {
        "paths": paths,
        "classes": json.loads(metadata["classes"]),
        "step": int(metadata["step"]),
    }


def read_parquet(out: Path) -> dict[str, Any]:
    parquet = pytest.importorskip("pyarrow.parquet")
    table = parquet.read_table(out)
    metadata = {key.decode(): json.loads(text) for key, text in table.schema.metadata.items()}
    flat = table["features"].combine_chunks()
    while hasattr(flat, "flatten") and hasattr(flat.type, "value_type"):
        flat = flat.flatten()
    *paths, odd = table["path"].to_pylist()
    return {
        "features": flat.to_numpy(zero_copy_only=False).reshape(metadata["shape"]),
        "labels": table["label"].to_numpy(),
        "samples": table["sample"].to_numpy(),
        "paths": [*paths, path_from_json(json.loads(odd))],
        "classes": metadata["classes"],
        "step": metadata["step"],
    }


READERS = {
    ".npz": read_npz,
    ".npy": read_npy,
    ".safetensors": read_safetensors,
    ".parquet": read_parquet,
}


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(("width", "dtype"), [((5,), "float32"), ((3, 2), "float16")])
def test_a_file_has_everything(
    tmp_path: Path, suffix: str, width: tuple[int, ...], dtype: FeatureType
) -> None:
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    features = torch.randn(COUNT, *width, generator=torch.Generator().manual_seed(0))
    shape = (COUNT, *width)
    out = tmp_path / "new" / f"x{suffix}"
    assert write_features(NAMES, shape, features.split(4), out, dtype=dtype) == out
    found = READERS[suffix](out)
    assert found["features"].dtype == np.dtype(dtype)
    assert np.array_equal(found["features"], features.numpy().astype(dtype))
    assert np.array_equal(found["labels"], NAMES.labels.numpy())
    assert np.array_equal(found["samples"], NAMES.sample_ids)
    assert found["paths"] == NAMES.paths
    assert found["classes"] == ["cat", "dog"]
    assert int(found["step"]) == 7

    # The same features give the same bytes, and no file is replaced.
    again = write_features(NAMES, shape, [features], tmp_path / f"y{suffix}", dtype=dtype)
    if suffix != ".parquet":  # blocks are its groups of rows
        assert again.read_bytes() == out.read_bytes()
    with pytest.raises(ValueError, match="exists; choose another file"):
        write_features(NAMES, shape, [features], out)
    assert sorted(path.name for path in out.parent.iterdir()) == sorted(
        {out.name, names_beside(out).name if suffix == ".npy" else out.name}
    )


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must end in \.npz, \.npy, \.safetensors or \.parquet"):
        require_target(tmp_path / "x.csv")
    (tmp_path / "x.names.npz").touch()
    with pytest.raises(ValueError, match=r"x\.names\.npz exists"):
        require_target(tmp_path / "x.npy")
