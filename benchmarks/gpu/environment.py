"""The first stage: card, driver, versions, commit, compiler, optional
modules; builds the C code.
"""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import os
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path

from benchmarks.gpu.lines import emit
from benchmarks.measure import machine
from benchmarks.outcome import FAILED, OK

ROOT = Path(__file__).resolve().parents[2]
NATIVE = ROOT / "kernels" / "fastmoco_kernels" / "cut_views"
OPTIONAL = {
    "xformers": "xformers",
    "nvidia.dali": "nvidia-dali-cuda130",
    "webdataset": "webdataset",
    "tyro": "tyro",
    "torchao": "torchao",
    "flash_attn": "flash-attn",
    "PIL": "pillow",
    "sklearn": "scikit-learn",
    "pytest": "pytest",
}
"""Optional modules of the stages, and their distributions."""


def main() -> int:
    """Print one line; returns 0, or 1 if a compiler failed to build the C code."""
    native, fault = build_native(NATIVE)
    # Triton builds a launcher for each kernel: it needs the compiler and Python's headers.
    emit(
        "environment",
        FAILED if fault else OK,
        machine=machine(),
        modules={module: _version(module, name) for module, name in OPTIONAL.items()},
        compiler=shlex.join(compiler()) or "none",
        python_headers=Path(sysconfig.get_paths()["include"], "Python.h").exists(),
        native=native,
        cores=len(os.sched_getaffinity(0)),
    )
    return int(fault)


def compiler() -> list[str]:
    """The C compiler that setup.py would use, or another one of this machine; empty without one."""
    wanted = (os.environ.get("CC"), sysconfig.get_config_var("CC"), "cc", "gcc", "clang")
    for words in (shlex.split(name) for name in wanted if name):
        if words and shutil.which(words[0]):
            return words
    return []


def build_native(folder: Path, *, out: Path | None = None) -> tuple[str, bool]:
    """Build the C part of `cut_views` unless it exists, with the flags of setup.py.

    Args:
        folder: of the op; its sources are in `native`.
        out: the library to write; default the path that the op loads.

    Returns:
        A description of the result, and whether it is a failure. A missing compiler is none,
        because plain torch computes the same.
    """
    library = out or folder / "_native.abi3.so"
    if library.exists() or (out is None and list(folder.glob("_native*.so"))):
        return "was there", False
    words = compiler()
    if not words:
        return "no compiler: plain torch cuts the views", False
    sources = sorted(str(path) for path in (folder / "native").glob("*.c"))
    command = [
        *words,
        "-shared",
        "-fPIC",
        *build_flags(),
        "-fvisibility=hidden",
        *sources,
        "-lm",
        "-o",
        str(library),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        return f"{words[0]} failed: {done.stderr[-300:]}", True
    return f"built with {words[0]}", False


def build_flags() -> list[str]:
    """`FLAGS` of setup.py, read without running it, because it needs
    setuptools, which a bare Python 3.12 lacks.
    """
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "FLAGS":
            return [str(flag) for flag in ast.literal_eval(node.value)]
    raise ValueError("setup.py: has no FLAGS, which the C part is built with")


def _version(module: str, distribution: str) -> str | None:
    try:
        if importlib.util.find_spec(module) is None:
            return None
    except ModuleNotFoundError:  # of its parent package
        return None
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "there"


if __name__ == "__main__":
    raise SystemExit(main())
