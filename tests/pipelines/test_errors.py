"""Messages that name a command."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastmoco_pipelines import errors


@pytest.fixture(autouse=True)
def without_memory() -> Iterator[None]:
    errors.install_command.cache_clear()
    yield
    errors.install_command.cache_clear()


@pytest.mark.parametrize(
    ("origin", "from_source"),
    [
        (None, False),  # from an index
        ({"url": "file:///a.whl", "archive_info": {}}, False),
        ({"url": "file:///fastmoco", "dir_info": {}}, True),
        ({"url": "file:///fastmoco", "dir_info": {"editable": True}}, True),
    ],
)
def test_an_extra_is_installed_as_fastmoco_was(
    origin: dict[str, object] | None,
    from_source: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Distribution:
        def read_text(self, name: str) -> str | None:
            assert name == "direct_url.json"
            return None if origin is None else json.dumps(origin)

    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: Distribution())
    assert errors._is_source_folder(tmp_path) is from_source
    monkeypatch.setattr(errors, "_is_source_folder", lambda root: from_source)
    source, name = "pip install '.[s3]' in fastmoco's source folder", "pip install 'fastmoco[s3]'"
    assert errors.install_command("s3") == (source if from_source else name)


def test_the_source_folder_is_known_without_metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    assert errors.install_command("s3").endswith("in fastmoco's source folder")
