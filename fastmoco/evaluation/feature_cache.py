"""Features of a set on disk, in parts that survive a kill.

A set is divided into parts of some batches each, by its number of images alone. Every part is a
file, written whole or not at all, so a command that was killed continues with the parts that are
missing. Batches never cross a part, and so features do not depend on the number of processes that
made them, or on how often these were interrupted.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from fastmoco.config.run import EVAL_BATCH
from fastmoco.distributed import agree
from fastmoco.errors import RunError
from fastmoco.evaluation.embed import LabelledRows
from fastmoco.evaluation.knn import Progress
from fastmoco.evaluation.rows import MemoryRows, Rows, new_rows
from fastmoco_pipelines.files.small import linked_to, open_regular, read_small
from fastmoco_pipelines.files.whole import lock_path, remove, try_lock, write_file, write_json
from fastmoco_pipelines.loading.batch import EvalBatch

BATCH = EVAL_BATCH
"""Images of a batch; a part has whole batches, but for the last one of a set."""
MOST_BATCHES = 16
"""Of a part."""
PART_BYTES = 64 * 2**20
"""Size of a part that is aimed at; a single batch may be larger."""
FEW_PARTS = 64
"""Parts of a set that has at least as many batches: an interrupt loses little, and processes get
equal shares."""
WAIT_S = 3600.0
"""For `start_world`: how much later than the first process the last one may have its share."""
_LOCK, _USERS = "lock", "users"
"""Files of a cache: the first is locked by the command that computes, the second by all that read."""
_OWN_NAME = re.compile(r"(?:classifiers-)?[0-9a-f]{16}(?:\.[0-9a-f]{8}\.removed)?")
"""Of what `make_room` may remove; with the end, of what it was removing when it was killed."""
_HASH_BYTES = hashlib.sha256().digest_size


def no_progress(done: int, total: int) -> None:
    """Shows nothing."""


@dataclass(frozen=True, slots=True)
class FeaturePart:
    """The images of a part that decode, in the order of the set.

    Attributes:
        features: [n, ...] float32 on the CPU; [0] without images.
        labels: [n] int64; -1 where an image has none.
        sample_ids: [n] int64: numbers in the set.
    """

    features: Tensor
    labels: Tensor
    sample_ids: Tensor

    def __len__(self) -> int:
        return len(self.labels)


class FeatureCache:
    """The parts of one set's features by one encoder.

    Args:
        folder: for this and other caches; created if absent. All processes must see it.
        key: everything that the features depend on, as JSON: the encoder (`encoder_digest`), the
            digest of the set, the transform of the images, the precision. Another key has other
            parts.
        sample_ids: [n] int64, rising: the numbers in the set of the images that are asked for.
        row_bytes: of the feature of an image.

    Attributes:
        path: folder of the parts.
        parts: their number.
    """

    def __init__(
        self,
        folder: Path,
        key: Mapping[str, Any],
        *,
        sample_ids: NDArray[np.int64],
        row_bytes: int,
    ) -> None:
        batches = -(-len(sample_ids) // BATCH)
        room = max(1, PART_BYTES // max(1, BATCH * row_bytes))
        self._part_images = BATCH * min(max(1, batches // FEW_PARTS), MOST_BATCHES, room)
        self._most_bytes = 2 * max(PART_BYTES, BATCH * (row_bytes + 16))
        self._sample_ids = sample_ids
        asked = hashlib.sha256(np.ascontiguousarray(sample_ids).data).hexdigest()
        self._key = {**key, "sample_ids": asked, "part_images": self._part_images}
        text = json.dumps(self._key, sort_keys=True).encode()
        self.path = Path(folder) / hashlib.sha256(text).hexdigest()[:16]
        self.parts = -(-len(sample_ids) // self._part_images)
        self._lock: int | None = None
        self._used: int | None = None

    def sample_ids(self, number: int) -> NDArray[np.int64]:
        """The images of a part, bad ones too."""
        return self._sample_ids[number * self._part_images : (number + 1) * self._part_images]

    def acquire(self) -> None:
        """Create the folder, and keep other commands out until `release` or `remove`. Until `close`,
        `make_room` leaves it alone. For one process of a command.

        Raises:
            RunError: if another command holds it.
            UnfitFileError: if its folder or its lock is a link that leads elsewhere, or no file.
            OSError: if the folder cannot be written.
        """
        for folder in (self.path.parent, self.path):
            linked_to(folder)  # refuses a link of another user
        self.path.mkdir(parents=True, exist_ok=True)
        lock = self.path / _LOCK
        os.close(open_regular(lock, os.O_RDWR | os.O_CREAT, follow=False))
        self._lock = lock_path(str(lock))
        if self._lock is None:
            raise RunError(
                f"{self.path}: another command computes these features now; wait for it, or end it"
            )
        if self._used is None:
            self._used = open_regular(self.path / _USERS, os.O_RDWR | os.O_CREAT, follow=False)
            try_lock(self._used, fcntl.LOCK_SH)
        for left in self.path.glob(".*.tmp"):
            remove(str(left))
        write_json(self.path / "key.json", self._key)

    def release(self) -> None:
        """Let another command continue; the parts stay."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def close(self) -> None:
        """Let other commands compute the parts, and `make_room` remove them: they are read no more."""
        self.release()
        if self._used is not None:
            os.close(self._used)
            self._used = None

    def remove(self) -> None:
        """Remove all parts, and the folder of caches if it is empty then."""
        shutil.rmtree(self.path, ignore_errors=True)
        self.close()
        with suppress(OSError):  # it holds another cache
            self.path.parent.rmdir()

    def finished(self, numbers: Iterable[int] | None = None) -> list[int]:
        """Those parts (default: all) that are there and have the content that was written; damaged
        ones are removed."""
        found = []
        for number in range(self.parts) if numbers is None else numbers:
            try:
                self._part(number)
            except FileNotFoundError:
                continue
            except (OSError, ValueError):
                self._file(number).unlink(missing_ok=True)  # a folder remains, and is an error
            else:
                found.append(number)
        return found

    def write(self, number: int, part: FeaturePart) -> None:
        """Store a part, whole or not at all.

        Raises:
            OSError: if it cannot be written.
        """
        tensors = {
            "features": part.features.contiguous(),
            "labels": part.labels,
            "samples": part.sample_ids,
        }
        content = save(tensors)
        write_file(self._file(number), hashlib.sha256(content).digest() + content)

    def read(self, number: int) -> FeaturePart:
        """A part that is finished.

        Raises:
            RunError: if it is not there, or damaged.
        """
        try:
            return self._part(number)
        except (OSError, ValueError) as error:
            raise RunError(
                f"{self._file(number)}: features cannot be read ({error}); repeat the command. "
                "Processes on several machines need a folder that all of them see"
            ) from error

    def read_all(self, numbers: Iterable[int] | None = None) -> Iterator[FeaturePart]:
        """Those parts (default: all) that have images, in order, one in memory at a time."""
        for number in range(self.parts) if numbers is None else numbers:
            part = self.read(number)
            if len(part):
                yield part

    def labels(self, numbers: Iterable[int] | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Labels and sample ids of those parts (default: all), in order."""
        for part in self.read_all(numbers):
            yield part.labels.clone(), part.sample_ids.clone()

    def rows(
        self,
        numbers: Sequence[int] | None = None,
        *,
        memory_bytes: int | None = None,
        folder: Path | None = None,
    ) -> LabelledRows:
        """The features [n, E] of some parts (default: all) as one table, for `knn`.

        Args:
            numbers: of the parts, rising.
            memory_bytes: largest size of the features in memory; None: any.
            folder: of a temporary file for larger ones; None: that of `TMPDIR`.

        Returns:
            Without images, rows of width 0. Close the rows.
        """
        wanted = range(self.parts) if numbers is None else numbers
        capacity = sum(len(self.sample_ids(number)) for number in wanted)
        table: Rows | None = None
        labels, sample_ids = [torch.empty(0, dtype=torch.int64)], []
        for part in self.read_all(wanted):
            if table is None:
                table = new_rows(
                    part.features.shape[1],
                    torch.float32,
                    capacity=capacity,
                    memory_bytes=memory_bytes,
                    folder=folder,
                )
            table.append(part.features)
            labels.append(part.labels)
            sample_ids.append(part.sample_ids)
        if table is None:
            table = MemoryRows(torch.empty(0, 0))
        return LabelledRows(table, torch.cat(labels), torch.cat([labels[0], *sample_ids]))

    def _file(self, number: int) -> Path:
        return self.path / f"part-{number:06d}.features"

    def _part(self, number: int) -> FeaturePart:
        """A part. Its safetensors follow their hash in the file.

        Raises:
            OSError: if there is no such file, or it cannot be read.
            ValueError: if it is damaged, or no regular file of such a size.
        """
        content = read_small(self._file(number), self._most_bytes, follow=False)
        if hashlib.sha256(memoryview(content)[_HASH_BYTES:]).digest() != content[:_HASH_BYTES]:
            raise ValueError("damaged")
        try:
            found = load(content[_HASH_BYTES:])
            part = FeaturePart(found["features"], found["labels"], found["samples"])
        except (KeyError, SafetensorError) as error:
            raise ValueError(f"damaged: {error}") from error
        _require_alike(part)
        return part


def _require_alike(part: FeaturePart) -> None:
    """Refuse a part whose tensors do not belong together.

    Raises:
        ValueError: naming their shapes and types.
    """
    columns = (part.labels, part.sample_ids)
    whole = all(column.dtype == torch.int64 and column.ndim == 1 for column in columns)
    rows = {len(tensor) if tensor.ndim else -1 for tensor in (part.features, *columns)}
    if not whole or part.features.dtype != torch.float32 or len(rows) != 1:
        shapes = [f"{tensor.dtype} {tuple(tensor.shape)}" for tensor in (part.features, *columns)]
        raise ValueError(f"features, labels and samples are {', '.join(shapes)}")


def make_room(folder: Path) -> tuple[int, int]:
    """Remove caches in a folder, those used longest ago first, until they take no more space than is
    free beside them; likewise classifiers of `eval linear` that were not trained to the end. Nothing
    is removed that a process uses, that has another name than theirs, or that holds a folder.

    Free is what the file system has, whatever the quota of the user. Some file systems count removed
    bytes as free only seconds later: they count at once here, or all caches would go.

    Returns:
        The number of those removed, and their bytes.
    """
    found: list[tuple[float, int, Path]] = []
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if _OWN_NAME.fullmatch(entry.name):
                with suppress(OSError):
                    found.append((*_use(Path(entry.path)), Path(entry.path)))
    total = sum(size for _, size, _ in found)
    count = removed = before = 0
    with suppress(OSError):
        before = shutil.disk_usage(folder).free
    for used, size, path in sorted(found):
        with suppress(OSError):
            if total - removed <= max(shutil.disk_usage(folder).free, before + removed):
                break
            if _removed(path, used):
                count, removed = count + 1, removed + size
    return count, removed


def _use(path: Path) -> tuple[float, int]:
    """When a cache, or a file, was last used, in seconds since 1970, and its bytes.

    Raises:
        OSError: if it is a link, or neither; a cache holds no folder.
    """
    about = path.lstat()
    if stat.S_ISREG(about.st_mode):
        return about.st_mtime, about.st_size
    if not stat.S_ISDIR(about.st_mode):
        raise NotADirectoryError(path)
    files = [file.lstat() for file in path.iterdir()]
    if any(stat.S_ISDIR(file.st_mode) for file in files):
        raise IsADirectoryError(path)
    return max([about.st_mtime, *(f.st_mtime for f in files)]), sum(f.st_size for f in files)


def _removed(path: Path, used: float) -> bool:
    """Remove a cache, or a file, unless it is used or was used since; whether it has gone."""
    if not path.is_dir():
        if _use(path)[0] != used:
            return False
        path.unlink()
        return True
    locks: list[int] = []
    try:
        for name in (_LOCK, _USERS):
            if (path / name).exists():
                if (lock := lock_path(str(path / name))) is None:
                    return False
                locks.append(lock)
        if _use(path)[0] != used:
            return False
        # Another command may begin it anew meanwhile.
        if path.suffix != ".removed":
            path = path.rename(path.with_name(f"{path.name}.{secrets.token_hex(4)}.removed"))
        shutil.rmtree(path)
    finally:
        for lock in locks:
            os.close(lock)
    return True


def share_of(count: int, rank: int, ranks: int) -> range:
    """A process's share of so many parts: contiguous, in the order of the ranks."""
    return range(rank * count // ranks, (rank + 1) * count // ranks)


def embed_missing(
    cache: FeatureCache,
    encode: Callable[[Tensor], Tensor],
    batches_of: Callable[[NDArray[np.int64]], Iterable[EvalBatch]],
    *,
    rank: int = 0,
    ranks: int = 1,
    device: torch.device | None = None,
    progress: Progress = no_progress,
) -> None:
    """Compute the parts of a cache that are missing; with several processes, each a share of them.

    Args:
        cache: acquired, by the first process.
        encode: images [B, 3, H, W] -> features [B, ...]; its module must be in eval mode.
        batches_of: returns the images of some sample ids, in order, in batches of `BATCH` ids, as
            `build_eval_loader` with `sample_ids` does: images that do not decode are left out of
            their batch.
        rank: of this process.
        ranks: their number.
        device: on which the processes communicate.
        progress: called with the images of this process's share that are done, and all of them.

    Distributed: collective; returns when all parts are there. Every process verifies a share.
    """
    place = device if device is not None else torch.device("cpu")
    done = torch.zeros(cache.parts, dtype=torch.int64, device=place)
    done[cache.finished(range(rank, cache.parts, ranks))] = 1
    if ranks > 1:
        agree.total(done)
    missing = [number for number, is_done in enumerate(done.tolist()) if not is_done]
    share = [missing[at] for at in share_of(len(missing), rank, ranks)]
    mine = [*share, *(set(share_of(cache.parts, rank, ranks)) - set(missing))]
    _compute(cache, encode, batches_of, share, len(mine) - len(share), progress)
    if ranks > 1:
        agree.any_rank(False, place)


def _compute(
    cache: FeatureCache,
    encode: Callable[[Tensor], Tensor],
    batches_of: Callable[[NDArray[np.int64]], Iterable[EvalBatch]],
    numbers: Sequence[int],
    before: int,
    progress: Progress,
) -> None:
    """Compute and write some parts, each as soon as the next one begins."""
    if not numbers:
        return
    asked = [cache.sample_ids(number) for number in numbers]
    sizes = [len(part) for part in asked]
    last = np.array([part[-1] for part in asked])
    before *= sizes[0]  # of parts that were there
    total = before + sum(sizes)
    pending: list[FeaturePart] = []
    written = 0

    def write_until(end: int) -> None:
        """Write the parts before one. A part without a batch has no image that decodes."""
        nonlocal written
        while written < end:
            cache.write(numbers[written], _joined(pending))
            pending.clear()
            written += 1

    progress(before, total)
    with torch.no_grad():
        for batch in batches_of(np.concatenate(asked)):
            write_until(int(np.searchsorted(last, batch.sample_ids[0])))
            features = encode(batch.images)
            if len(features) != len(batch.images):
                raise ValueError(
                    f"encode returned {tuple(features.shape)} for {len(batch.images)} images: "
                    "needs one row per image"
                )
            pending.append(
                FeaturePart(
                    features.detach().to("cpu", torch.float32),
                    torch.from_numpy(batch.labels).to(torch.int64),
                    torch.from_numpy(batch.sample_ids),
                )
            )
            done = sum(sizes[:written]) + sum(map(len, pending))
            progress(before + done, total)
    write_until(len(numbers))
    progress(total, total)


def _joined(found: Sequence[FeaturePart]) -> FeaturePart:
    """Batches as one part."""
    if not found:
        none = torch.empty(0, dtype=torch.int64)
        return FeaturePart(torch.empty(0), none, none.clone())
    return FeaturePart(
        torch.cat([part.features for part in found]),
        torch.cat([part.labels for part in found]),
        torch.cat([part.sample_ids for part in found]),
    )


def encoder_digest(encoder: nn.Module) -> str:
    """Identity of the weights and buffers of an encoder: SHA-256 (hex) of their names, shapes and
    bytes. Settings that are in no tensor, such as the number of heads, belong into a key too."""
    digest = hashlib.sha256()
    for name, tensor in sorted(encoder.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        values = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(values.view(torch.uint8).numpy().data)
    return digest.hexdigest()
