"""The notebook of the documentation: its cells run, one after the other, in a process of their own."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).resolve().parent.parent / "docs" / "notebooks" / "first_steps.ipynb"


def cells(kind: str) -> list[str]:
    """The texts of all cells of a kind."""
    notebook = json.loads(NOTEBOOK.read_text())
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == kind]


def test_the_notebook_is_stored_without_outputs() -> None:
    notebook = json.loads(NOTEBOOK.read_text())
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert len(code) >= 6
    assert not [cell for cell in code if cell["outputs"] or cell["execution_count"] is not None]
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])


def test_its_cells_run_and_show_what_they_promise(tmp_path: Path) -> None:
    pytest.importorskip("webdataset", reason="webdataset is not installed")
    script = tmp_path / "cells.py"
    script.write_text("\n\n".join(cells("code")))
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "views (256, 3, 8, 8) torch.float32" in done.stdout

    # Training teaches something: the loss falls below that of an encoder that knows nothing.
    losses = re.search(
        r"loss ([\d.]+) -> ([\d.]+), kNN accuracy ([\d.]+)% -> ([\d.]+)%", done.stdout
    )
    assert losses is not None, done.stdout
    first, last, before, after = map(float, losses.groups())
    assert last < first - 0.3
    assert after > before + 10

    # The fused loss is the one that is written out.
    fused = re.search(r"info_nce_loss ([\d.]+), written out ([\d.]+)", done.stdout)
    assert fused is not None
    assert float(fused[1]) == pytest.approx(float(fused[2]), rel=1e-5)
    assert list(tmp_path.iterdir()) == [script]


def test_its_text_names_files_that_exist() -> None:
    named = re.findall(r"`(docs/[\w.]+)`", "\n".join(cells("markdown")))
    assert named
    root = NOTEBOOK.parents[2]
    assert not [name for name in named if not (root / name).exists()]
