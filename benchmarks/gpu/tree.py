"""The committed tree as one small archive, and the script that runs it on another machine.

Where a machine takes a limited amount of files, the repository is larger than what its code needs
there: half of it is golden data, images and results.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NAME = "tree.tar.xz"
SCRIPT = "run.sh"
NATIVE = Path("kernels/fastmoco_kernels/cut_views/_native.abi3.so")
LEFT_OUT = ("docs/images", "benchmarks/results", "tests/golden/siblings*")
KEPT = ("tests/golden/siblings/simclr.npz",)
"""Of what is left out: read by a test of the kernels."""


def make(out: Path) -> str:
    """Pack the commit of this checkout, and the built C part if there is one.

    Args:
        out: folder for the archive, the C part and the script.

    Returns:
        The commit.

    Raises:
        ValueError: if tracked files differ from the commit.
    """
    changed = _git("status", "--porcelain", "--untracked-files=no").strip()
    if changed:
        raise ValueError(f"carry --tree: commit these first, or put them back:\n{changed}")
    commit = _git("rev-parse", "--short", "HEAD").strip()
    names = _git("ls-files", "--", ".", *(f":(exclude){name}" for name in LEFT_OUT)).split("\n")
    names += _git("ls-files", "--", *KEPT).split("\n")
    packed = out / NAME
    command = ["tar", "-C", str(ROOT), "-cJf", str(packed), *filter(None, names)]
    subprocess.run(command, check=True)
    if (ROOT / NATIVE).exists():
        shutil.copyfile(ROOT / NATIVE, out / NATIVE.name)
    text = (Path(__file__).parent / "away.sh").read_text()
    (out / SCRIPT).write_text(text.replace("@COMMIT@", commit))
    return commit


def _git(*words: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True
    )
    return done.stdout
