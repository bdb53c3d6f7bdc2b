"""The encoder of an evaluation: its identity, and what may not contradict it."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from unittest import mock

import pytest
import torch
from safetensors.torch import save_file

from fastmoco.checkpoint import CheckpointError
from fastmoco.distributed.mesh import World
from fastmoco.errors import RunError
from fastmoco.models.encoder_file import describe_run
from fastmoco.models.vit import vit_nano
from fastmoco.recipes import quickstart_digits
from fastmoco.training.embed_run import feature_key
from fastmoco.training.encoder_source import load_source
from fastmoco.training.source_model import model_config, prepare


def weights(path: Path, *, own: bool) -> Path:
    """A file of a ViT of 4 heads, with our header or without a word."""
    torch.manual_seed(0)
    description = describe_run(quickstart_digits())
    state = {
        name: value
        for name, value in description.build().state_dict().items()
        if not name.startswith("head.")
    }
    save_file(state, path, metadata=description.to_metadata() if own else None)
    return path


def test_features_by_another_number_of_heads_have_another_key(tmp_path: Path) -> None:
    path = weights(tmp_path / "w.safetensors", own=False)
    keys = [feature_key(load_source(path, heads=heads), "fp32", World()) for heads in (2, 4, 4)]
    assert keys[0] != keys[1] == keys[2]
    assert keys[0]["encoder"] == keys[1]["encoder"]


def test_what_else_the_process_has_imported_is_not_in_the_key(tmp_path: Path) -> None:
    source = load_source(weights(tmp_path / "w.safetensors", own=True))
    with mock.patch.dict(sys.modules):
        sys.modules.pop("torchao", None)
        before = feature_key(source, "fp32", World())
        sys.modules["torchao"] = ModuleType("torchao")
        assert feature_key(source, "fp32", World()) == before


def test_heads_that_the_source_contradicts_are_refused(tmp_path: Path) -> None:
    path = weights(tmp_path / "w.safetensors", own=True)
    assert load_source(path, heads=4).facts["sha256"] == load_source(path).facts["sha256"]
    with pytest.raises(CheckpointError, match="has 4 attention heads; leave out --heads 2"):
        load_source(path, heads=2)


@pytest.mark.parametrize("own", [True, False])
def test_a_run_does_not_go_on_from_a_file_that_has_changed(tmp_path: Path, own: bool) -> None:
    path = weights(tmp_path / "w.safetensors", own=own)
    source = load_source(path, heads=4)
    config = replace(quickstart_digits(), model=model_config(source))
    prepare(source, config, tmp_path / "run")
    moved = {**source.facts, "source": "elsewhere"}
    prepare(replace(source, facts=moved), config, tmp_path / "run")
    encoder = vit_nano()
    header = describe_run(quickstart_digits()).to_metadata() if own else None
    save_file(encoder.state_dict(), path, metadata=header)
    with pytest.raises(RunError, match=r"began with another encoder \(sha256 "):
        prepare(load_source(path, heads=4), config, tmp_path / "run")


def test_the_folder_of_another_run_stays_as_it_is(tmp_path: Path) -> None:
    source = load_source(weights(tmp_path / "encoder.safetensors", own=True))
    config = replace(quickstart_digits(), model=model_config(source))
    before = (tmp_path / "encoder.safetensors").read_bytes()
    with pytest.raises(RunError, match=r"of another run: it has encoder.safetensors; choose"):
        prepare(source, config, tmp_path)
    assert (tmp_path / "encoder.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["encoder.safetensors"]


@pytest.mark.parametrize(
    ("content", "rule"),
    [
        (b"[1]", "holds no JSON object"),
        (b'{"a": 1', "not JSON"),
        (b"\xff", "not UTF-8"),
        (b"[" * 200_000, "nested deeper|not JSON"),
        ("/dev/zero", "is a symbolic link"),
        ("absent", "is a symbolic link"),
        (None, "is a named pipe"),
    ],
)
def test_facts_that_are_none_are_refused_by_name(
    tmp_path: Path, content: bytes | str | None, rule: str
) -> None:
    source = load_source(weights(tmp_path / "w.safetensors", own=True))
    config = replace(quickstart_digits(), model=model_config(source))
    out = tmp_path / "run"
    out.mkdir()
    if content is None:
        os.mkfifo(out / "source.json")
    elif isinstance(content, str):
        (out / "source.json").symlink_to(content)
    else:
        (out / "source.json").write_bytes(content)
    with pytest.raises(RunError, match=rf"source.json.*({rule}).*; choose another --out"):
        prepare(source, config, out)
    assert [path.name for path in out.iterdir()] == ["source.json"]
    assert not (out / "absent").exists()
