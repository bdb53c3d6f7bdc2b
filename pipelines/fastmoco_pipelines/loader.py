"""The training loader: shards in, two augmented views of every image out, a few batches ahead of the trainer.

One thread reads bytes and draws the augmentations of the next steps while another runs DALI on step s and the trainer
computes; bounded queues lie between. Everything is a function of (spec, step), so the step is the loader's whole
state: a loader started at any step, on any number of ranks, delivers what an uninterrupted one would have.
"""

from __future__ import annotations

import atexit
import queue
import threading
import time
import weakref
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

from fastmoco_pipelines.batch import BatchStream, TwoViewBatch
from fastmoco_pipelines.culprit import raise_bad_image
from fastmoco_pipelines.draws import ViewDraws, draw_views
from fastmoco_pipelines.order import local_batch_size, rank_slice
from fastmoco_pipelines.shards import ShardSet
from fastmoco_pipelines.spec import LoaderSpec, require

if TYPE_CHECKING:
    from fastmoco_pipelines.dali import ViewPipeline

_POLL_SECONDS = 0.2
_EXIT_SECONDS = 5.0


def build_loader(
    spec: LoaderSpec, *, rank: int = 0, world_size: int = 1, device_id: int | None = None, start_step: int = 0
) -> Loader:
    """Open the shards, build the DALI graph and begin to produce batches.

    Args:
        spec: what to deliver.
        rank: this process, 0 to world_size - 1.
        world_size: processes that share each global batch equally.
        device_id: index of this process's GPU; needed for, and only for, ``spec.device="gpu"``.
        start_step: the step of the first batch: 0, or where a resumed run goes on.

    Raises:
        ValueError: for a batch that the ranks cannot share or that is larger than the set, or a pattern without shards.
        ShardError: if an index is missing, broken or stale.
    """
    from fastmoco_pipelines.dali import ViewPipeline  # needs DALI, which whoever only reads shards may lack

    require((device_id is not None) == (spec.device == "gpu"), "device_id", device_id, f"does not fit {spec.device=}")
    local = local_batch_size(spec.global_batch_size, world_size)
    shards = ShardSet.open(spec.shards)
    try:
        _slice(spec, len(shards), rank, world_size, start_step)  # says now what is wrong with the numbers
        pipeline = ViewPipeline(
            spec.view1, spec.view2, batch_size=local, threads=spec.threads, device=spec.device, device_id=device_id
        )
    except BaseException:
        shards.close()
        raise
    return Loader(_Source(spec, shards, pipeline, rank, world_size, device_id), start_step)


class Loader(BatchStream):
    """Endless batches of one rank, in the order of the steps, made ahead by two threads. Build it with ``build_loader``.

    Iterating raises ShardError or BadImageError, naming tar and member, where the data is damaged.
    """

    def __init__(self, source: _Source, start_step: int) -> None:
        super().__init__(
            source.spec,
            sample_count=len(source.shards),
            digest=source.shards.digest,
            world_size=source.world_size,
            start_step=start_step,
        )
        self._failure: BaseException | None = None
        self._shards = source.shards
        self._results: _Results = queue.Queue(maxsize=source.spec.prefetch)
        stop = threading.Event()
        # The threads know nothing of this object, so that a forgotten loader is collected and they end with it. They
        # are daemons: a read that hangs must not keep the interpreter from exiting.
        read: _Readings = queue.Queue(maxsize=1)
        self._reader = threading.Thread(
            target=_read, args=(source, start_step, read, stop), name="fastmoco-read", daemon=True
        )
        self._producer = threading.Thread(
            target=_produce, args=(source, read, self._results, stop), name="fastmoco-loader", daemon=True
        )
        # The garbage collector may call this in any thread, one of these two included, and while that holds a queue's
        # lock: so it waits for nothing and touches no queue.
        self._stop = weakref.finalize(self, stop.set)
        self._reader.start()
        self._producer.start()

    def next(self) -> TwoViewBatch:
        """The batch of the next step.

        Raises:
            ShardError, BadImageError: if the data is damaged; again on every later call.
            RuntimeError: after ``close``.
        """
        if self._failure is not None:
            raise self._failure
        start = time.perf_counter()
        while True:
            if not self._stop.alive:
                raise RuntimeError("the loader is closed")
            try:
                result = self._results.get(timeout=_POLL_SECONDS)
                break
            except queue.Empty:
                if not self._producer.is_alive() and self._results.empty():
                    raise RuntimeError(f"the loader's thread ended before step {self._step}") from None
        self.wait_seconds = time.perf_counter() - start
        if isinstance(result, BaseException):
            self._failure = result
            raise result
        self._step = result.step + 1
        return result

    def close(self) -> None:
        """Stop the threads and close the files. Batches already handed out stay valid."""
        self._stop()
        self._producer.join()
        self._reader.join()
        self._shards.close()
        while not self._results.empty():  # nobody will ask for them, and they may lie on the GPU
            self._results.get_nowait()


@dataclass(frozen=True, slots=True)
class _Prepared:
    """What DALI needs for one step."""

    step: int
    sample_ids: NDArray[np.int64]
    encoded: list[NDArray[np.uint8]]
    draws1: ViewDraws
    draws2: ViewDraws


_Readings = queue.Queue[_Prepared | BaseException]
_Results = queue.Queue[TwoViewBatch | BaseException]
_Item = TypeVar("_Item")


@dataclass(frozen=True, slots=True)
class _Source:
    """One rank's share of the data; ``prepare`` runs in the reading thread, ``render`` in the producing one."""

    spec: LoaderSpec
    shards: ShardSet
    pipeline: ViewPipeline
    rank: int
    world_size: int
    device_id: int | None

    def prepare(self, step: int) -> _Prepared:
        """Bytes and draws of one step."""
        epoch, ids = self._slice(step)
        self.shards.will_need(self._slice(step + 1)[1])
        encoded = self.shards.read(ids)
        sizes, seed = self.shards.sizes[ids], self.spec.seed
        draws1 = draw_views(self.spec.view1, seed=seed, epoch=epoch, sample_ids=ids, sizes=sizes, view=1)
        draws2 = draw_views(self.spec.view2, seed=seed, epoch=epoch, sample_ids=ids, sizes=sizes, view=2)
        return _Prepared(step, ids.copy(), encoded, draws1, draws2)

    def render(self, prepared: _Prepared) -> TwoViewBatch:
        """Decode and augment."""
        from fastmoco_pipelines.dali import DecodeError

        try:
            view1, view2 = self.pipeline.run(prepared.encoded, prepared.draws1, prepared.draws2)
        except DecodeError as error:
            raise_bad_image(
                error,
                shards=self.shards,
                sample_ids=prepared.sample_ids,
                encoded=prepared.encoded,
                device=self.spec.device,
                device_id=self.device_id,
            )
        return TwoViewBatch(view1=view1, view2=view2, sample_ids=prepared.sample_ids, step=prepared.step)

    def _slice(self, step: int) -> tuple[int, NDArray[np.int64]]:
        return _slice(self.spec, len(self.shards), self.rank, self.world_size, step)


def _slice(spec: LoaderSpec, samples: int, rank: int, world_size: int, step: int) -> tuple[int, NDArray[np.int64]]:
    size = spec.global_batch_size
    return rank_slice(step, seed=spec.seed, count=samples, global_batch_size=size, rank=rank, world_size=world_size)


def _read(source: _Source, start_step: int, read: _Readings, stop: threading.Event) -> None:
    """The reading thread: the bytes and draws of every step until told to stop."""
    try:
        for step in count(start_step):
            if not _put(read, source.prepare(step), stop):
                return
    except BaseException as error:  # whatever it is, the trainer must hear of it instead of waiting for ever
        _put(read, error, stop)


def _produce(source: _Source, read: _Readings, results: _Results, stop: threading.Event) -> None:
    """The producing thread: batches until told to stop; an error goes to the trainer in a batch's place."""
    thread = threading.current_thread()

    def end() -> None:
        stop.set()
        thread.join(_EXIT_SECONDS)

    try:
        import nvidia.dali  # noqa: F401  # registers its exit handler now, so that it runs after the one below

        atexit.register(end)  # the interpreter must not take DALI down while it works here
        while not stop.is_set():
            try:
                prepared = read.get(timeout=_POLL_SECONDS)
            except queue.Empty:
                continue
            if isinstance(prepared, BaseException):
                raise prepared
            _put(results, source.render(prepared), stop)
    except BaseException as error:  # as above
        _put(results, error, stop)
    finally:
        atexit.unregister(end)


def _put(results: queue.Queue[_Item], item: _Item, stop: threading.Event) -> bool:
    """Whether there was room before the end."""
    while not stop.is_set():
        try:
            results.put(item, timeout=_POLL_SECONDS)
            return True
        except queue.Full:
            continue
    return False
