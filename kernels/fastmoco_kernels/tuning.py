"""Tile sizes of kernels: measured once per shape and GPU, kept on disk, and shown.

A choice may change the order in which a kernel adds, and with it the last bits of a result. So a
choice is made once and kept: in `$XDG_CACHE_HOME/fastmoco` (`~/.cache/fastmoco`), one file per GPU
model, Triton version and torch version. Under `torch.use_deterministic_algorithms`, while a CUDA
graph is captured, and in the interpreter nothing is measured: the default of the shape is taken.
"""

from __future__ import annotations

import json
import logging
import os
import re
import stat
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch

from fastmoco_kernels.backends import interpreting

Tile = TypeVar("Tile", bound=tuple[int, ...])
_log = logging.getLogger(__name__)
_chosen: dict[tuple[str, str], tuple[int, ...]] = {}
_read: set[Path] = set()
_MOST_BYTES = 16 << 20
"""Of a cache file: hundreds of thousands of choices."""
_settled: dict[tuple[str, tuple[int | str, ...], torch.device], tuple[int, ...]] = {}
"""Choices by call, found without building the key's text and the file's path."""
_times: dict[str, dict[tuple[int, ...], float]] = {}


def tuned(
    op: str,
    shape: Sequence[int | str],
    candidates: Sequence[Tile],
    default: Tile,
    run: Callable[[Tile], object],
    device: torch.device,
) -> Tile:
    """The tile for one shape on one device.

    Args:
        op: name of the kernel, part of the key.
        shape: everything the best tile depends on.
        candidates: tiles that are correct for the shape; `default` is one of them.
        default: taken where nothing may be measured.
        run: launches the kernel once with a tile, into scratch outputs.
        device: where it runs.

    Returns:
        The fastest candidate by the median of repeated launches, or the default.
    """
    if (
        device.type != "cuda"
        or len(candidates) < 2
        or torch.are_deterministic_algorithms_enabled()
        or interpreting()
    ):
        return default

    # Settled in this process?
    call = (op, tuple(shape), device)
    settled = _settled.get(call)
    if settled is not None and settled in candidates:
        return settled  # type: ignore[return-value]  # it is one of the candidates

    # Known from an earlier process?
    path = _cache_file(device)
    key = (path.stem, f"{op}({', '.join(map(str, shape))})")
    _load(path)
    known = _chosen.get(key)
    for candidate in candidates:
        if known == tuple(candidate):
            _settled[call] = candidate
            return candidate

    # Measure; during a graph capture the default is taken and nothing is kept.
    if torch.cuda.is_current_stream_capturing():
        return default
    best = _fastest(key[1], candidates, default, run)
    _chosen[key] = tuple(best)
    _settled[call] = best
    _store(path)
    return best


def choices() -> dict[str, dict[str, list[int]]]:
    """Every choice of this process and of the files it read: tiles by GPU and by `op(shape)`."""
    shown: dict[str, dict[str, list[int]]] = {}
    for (gpu, key), tile in sorted(_chosen.items()):
        shown.setdefault(gpu, {})[key] = list(tile)
    return shown


def measured() -> dict[str, dict[str, float]]:
    """Milliseconds of every candidate that this process has measured, by `op(shape)` and tile."""
    return {
        key: {str(tuple(tile)): round(ms, 4) for tile, ms in times.items()}
        for key, times in _times.items()
    }


def _fastest(
    key: str, candidates: Sequence[Tile], default: Tile, run: Callable[[Tile], object]
) -> Tile:
    """Time every candidate; one that does not compile or launch is skipped and logged."""
    from triton.testing import do_bench

    times: dict[Tile, float] = {}
    for tile in candidates:
        try:
            times[tile] = do_bench(
                lambda tile=tile: run(tile), warmup=5, rep=20, return_mode="median"
            )
        except Exception as error:  # tile too large; Triton's classes differ between versions
            _log.info(
                "%s: tile %s does not run here: %s", key, tuple(tile), str(error).splitlines()[0]
            )
    if not times:
        return default  # its launch raises the error
    _times[key] = {tuple(tile): ms for tile, ms in times.items()}
    best = min(times, key=times.__getitem__)
    _log.info(
        "%s: tile %s, %.3f ms (default %s: %.3f ms)",
        key,
        tuple(best),
        times[best],
        tuple(default),
        times.get(default, float("nan")),
    )
    return best


def _cache_file(device: torch.device) -> Path:
    import triton

    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    gpu = torch.cuda.get_device_name(device)
    name = f"{gpu} triton {triton.__version__} torch {torch.__version__}"
    return root / "fastmoco" / f"{re.sub(r'[^A-Za-z0-9.]+', '-', name)}.json"


def _load(path: Path) -> None:
    """Read a cache file once. If it cannot be read, every choice is measured again."""
    if path in _read:
        return
    _read.add(path)
    try:
        found = json.loads(_content(path))
    except (OSError, ValueError, RecursionError):
        return
    for key, tile in found.items() if isinstance(found, dict) else ():
        if isinstance(tile, list) and all(type(x) is int and 0 < x < 1 << 31 for x in tile):
            _chosen.setdefault((path.stem, key), tuple(tile))


def _content(path: Path) -> bytes:
    """The bytes of a cache file.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is no regular file, or larger than any that is written here.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ValueError(f"{path}: is no regular file")
        with open(descriptor, "rb", closefd=False) as file:
            content = file.read(_MOST_BYTES + 1)
    finally:
        os.close(descriptor)
    if len(content) > _MOST_BYTES:
        raise ValueError(f"{path}: is larger than {_MOST_BYTES} bytes")
    return content


def _store(path: Path) -> None:
    """Write all choices of one GPU; a reader sees the old file or the new one.

    On a full or read-only disk a warning is logged and the run continues.
    """
    _read.discard(path)
    _load(path)  # keep what other processes have chosen since
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(choices().get(path.stem, {}), indent=1)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            file.write(text)
        os.replace(file.name, path)
    except OSError as error:
        _log.warning(
            "tuning: %s is not written (%s); tiles are measured again next time", path, error
        )
