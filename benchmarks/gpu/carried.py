"""Unpack wheels, the slim DALI and apex of `.gpu/` into a folder on the path of later stages."""

from __future__ import annotations

import hashlib
import shutil
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

from benchmarks.gpu import tree
from benchmarks.gpu.caches import ARCHIVE

DONE = ".unpacked"


def unpack(source: Path) -> tuple[Path | None, list[str]]:
    """Unpack all carried files, once for the same files.

    Args:
        source: folder with `*.whl` and `*.tar.xz`.

    Returns:
        The folder for `PYTHONPATH`, None if nothing is carried or it is compiled for another
        Python; and the names of unpacked and failed files.
    """
    found = sorted([*source.glob("*.whl"), *source.glob("*.tar.xz")])
    files = [file for file in found if file.name not in (ARCHIVE, tree.NAME)]
    if not files:
        return None, []
    key = hashlib.sha256(
        "".join(f"{file.name} {file.stat().st_size}" for file in files).encode()
    ).hexdigest()[:12]
    site = Path(tempfile.gettempdir()) / f"fastmoco-carried-{key}"
    if not (site / DONE).exists():
        site.mkdir(parents=True, exist_ok=True)
        faults = []
        for file in files:
            try:
                _unpack_one(file, site)
            except (OSError, zipfile.BadZipFile, tarfile.TarError, EOFError) as error:
                faults.append(f"{file.name} FAILED: {error}")
        (site / DONE).write_text("\n".join(faults))
    tag = f".cpython-{sys.version_info.major}{sys.version_info.minor}-"
    for module in site.rglob("*.cpython-*.so"):
        if tag not in module.name:  # it would hide a module of this Python that works
            return None, [f"not used: {module.name} is of another Python"]
    faults = [line for line in (site / DONE).read_text().splitlines() if line]
    broken = {fault.split()[0] for fault in faults}
    return site, [*(file.name for file in files if file.name not in broken), *faults]


def _unpack_one(file: Path, site: Path) -> None:
    if file.suffix == ".whl":
        with zipfile.ZipFile(file) as wheel:
            wheel.extractall(site)  # noqa: S202 - wheels that this project's own `carry` has fetched
        for data in site.glob("*.data"):  # files of a wheel for site-packages
            for part in ("purelib", "platlib"):
                if (data / part).exists():
                    shutil.copytree(data / part, site, dirs_exist_ok=True)
            shutil.rmtree(data)
        return
    with tarfile.open(file, "r:xz") as archive:
        archive.extractall(site, filter="data")
