"""Compiled code and chosen tiles, from one call of `make gpu` to the next on another machine.

A borrowed machine is bare each time, and compiling takes longer than measuring. So the caches of
torch.compile and Triton, and the tiles that were measured, are in one folder. It is packed into
the results, and unpacked from `.gpu/caches.tar.xz` if that was carried.
"""

from __future__ import annotations

import tarfile
import tempfile
from pathlib import Path

ARCHIVE = "caches.tar.xz"
FOLDERS = {
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "TRITON_CACHE_DIR": "triton",
    "XDG_CACHE_HOME": "tiles",
}
"""Variables of the environment, and their folders. The last one has the tiles."""


def take_caches(carried: Path) -> dict[str, str]:
    """The environment that names the caches; unpacks the carried ones if there are none here yet.

    Args:
        carried: folder that may contain the archive.
    """
    folder, archive = _folder(), carried / ARCHIVE
    if archive.exists() and not folder.exists():
        folder.mkdir(parents=True)
        try:
            with tarfile.open(archive, "r:xz") as carried_caches:
                carried_caches.extractall(folder, filter="data")
        except (OSError, tarfile.TarError, EOFError) as error:
            print(f"{archive.name} FAILED: {error}")
    for name in FOLDERS.values():
        (folder / name).mkdir(parents=True, exist_ok=True)
    return {variable: str(folder / name) for variable, name in FOLDERS.items()}


def keep_caches(out: Path) -> str:
    """Pack the caches into a folder of results; returns a line that says so."""
    archive = out / ARCHIVE
    try:
        with tarfile.open(archive, "w:xz", preset=1) as packed:
            packed.add(_folder(), ".")
    except OSError as error:
        return f"caches: not kept: {error}"
    return f"caches: {archive.stat().st_size / 2**20:.1f} MiB in {archive.name}"


def _folder() -> Path:
    return Path(tempfile.gettempdir()) / "fastmoco-caches"
