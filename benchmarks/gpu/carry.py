"""Fetch the wheels that a bare GPU machine lacks into `.gpu/`: `python -m benchmarks.gpu.carry`, on
a machine with a network.

Wheels of CPython 3.12 on Linux x86-64, without dependencies, because torch and NumPy are installed.
DALI's wheels are too large, and apex is in no index: a slim `dali.tar.xz` and an `apex.tar.xz` in
the same folder are unpacked in the same way. `--pictures /usr/share/wallpapers` makes the archive
of photographs (`pictures.py`), and nothing else; `--tree` packs the committed tree with the script
that runs it (`tree.py`, `away.sh`), and nothing else.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu import pictures, tree

WHEELS = (
    "xformers==0.0.35",
    "tyro",
    *("docstring-parser", "shtab", "typeguard"),
    "webdataset",
    "braceexpand",
)
"""xformers, the parser of the command line and webdataset, with those of their imports that an
image with torch and its usual companions lacks."""
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
LIMIT_MIB = 63
"""Largest size of the folder, with the tree: a little below what machines were found to take."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Download, or make the archive of photographs; returns 1 if a download failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "wheels", nargs="*", default=WHEELS, help="requirements, instead of the usual ones"
    )
    parser.add_argument("--python", default="3.12")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parents[2] / ".gpu")
    parser.add_argument("--pictures", type=Path, help="a folder of photographs, see pictures.py")
    parser.add_argument("--tree", action="store_true", help="pack the commit of this checkout")
    given = parser.parse_args(arguments)
    given.out.mkdir(exist_ok=True)
    if given.tree:
        print(f"commit {tree.make(given.out)}")
        return _sizes(given.out)
    if given.pictures:
        out = given.out / pictures.NAME
        names = pictures.make(given.pictures, out)
        print(f"{out.stat().st_size / 2**20:6.2f} MiB  {out.name}: {', '.join(names)}")
        return 0
    failed = []
    for wheel in given.wheels:
        command = download_command(wheel, given.python, given.out)
        if subprocess.run(command, check=False).returncode != 0:
            failed.append(wheel)
    if failed:
        print(f"could not be had: {', '.join(failed)}", file=sys.stderr)
    return _sizes(given.out) or int(bool(failed))


def _sizes(out: Path) -> int:
    """Print the sizes of the files; returns 0."""
    files = sorted(file for file in out.iterdir() if file.is_file())
    size = sum(file.stat().st_size for file in files) / 2**20
    for file in files:
        print(f"{file.stat().st_size / 2**20:6.2f} MiB  {file.name}")
    print(f"{size:6.2f} MiB in {out}" + (f", more than {LIMIT_MIB}" if size > LIMIT_MIB else ""))
    return 0


def download_command(wheel: str, python: str, out: Path) -> list[str]:
    """pip's command for one wheel, without dependencies."""
    words = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
    ]
    words += ["--only-binary=:all:", "--implementation", "cp", "--python-version", python]
    for platform in PLATFORMS:
        words += ["--platform", platform]
    return [*words, "--dest", str(out), wheel]


if __name__ == "__main__":
    raise SystemExit(main())
