"""The map of the folder names every file, and the public names are there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import fastmoco_pipelines

ROOT = Path(fastmoco_pipelines.__file__).parent


def test_readme_names_every_file_and_no_other():
    named = re.findall(
        r"^\| `([\w/]+\.py)` \|", (ROOT.parent / "README.md").read_text(), flags=re.MULTILINE
    )
    assert sorted(named) == sorted(
        str(path.relative_to(ROOT))
        for path in ROOT.rglob("*.py")
        if path.name != "__init__.py" or path.parent == ROOT
    )


def test_public_names_are_importable():
    assert all(hasattr(fastmoco_pipelines, name) for name in fastmoco_pipelines.__all__)
    assert dir(fastmoco_pipelines) == sorted(fastmoco_pipelines.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = fastmoco_pipelines.nothing


def test_a_spec_needs_neither_torch_nor_dali():
    code = (
        "import sys; from fastmoco_pipelines import ViewSpec; import fastmoco_pipelines.spec, fastmoco_pipelines.loading.memory;"
        "assert not {'torch', 'nvidia.dali', 'webdataset', 'sklearn'} & set(sys.modules), sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
