"""The training loader: shards in, augmented views of every image out, a few batches ahead.

One thread reads bytes and draws the augmentations of the next steps while another runs DALI on step
s and the trainer computes; bounded queues are in between. Everything is a function of (spec, step),
so the step is the loader's whole state: a loader started at any step, on any number of ranks,
delivers what an uninterrupted one would have. That also holds for the samples that stand in for bad
ones (healing/).
"""

from __future__ import annotations

import queue
import threading
import time
import weakref
from pathlib import Path
from typing import TYPE_CHECKING

from fastmoco_pipelines.errors import LoaderTimeoutError
from fastmoco_pipelines.healing.bad_samples import BadSamples
from fastmoco_pipelines.healing.culprit import Suspects
from fastmoco_pipelines.healing.healer import Healer
from fastmoco_pipelines.loading.arenas import give_back_memory, share_arenas
from fastmoco_pipelines.loading.batch import Batch, BatchStream
from fastmoco_pipelines.loading.source import Source
from fastmoco_pipelines.loading.stages import StageClock, StageFigures
from fastmoco_pipelines.loading.threads import POLL_SECONDS, BatchPlaces, make_batches, read_steps
from fastmoco_pipelines.sampling.order import ORDER_VERSION, local_batch_size
from fastmoco_pipelines.sampling.stand_ins import Plan
from fastmoco_pipelines.sets.shard_set import ShardSet
from fastmoco_pipelines.spec import LoaderSpec, require

if TYPE_CHECKING:
    from fastmoco_pipelines.loading.threads import Readings, Results

_CLOSE_SECONDS = (
    30.0  # A batch that is being made may take this long; a read that hangs never ends.
)
_REPORT_SECONDS = 20.0


def build_loader(
    spec: LoaderSpec,
    *,
    rank: int = 0,
    world_size: int = 1,
    device_id: int | None = None,
    start_step: int = 0,
    quarantine_list: Path | None = None,
    pin_memory: bool = False,
    count_making: bool | None = None,
    begin: bool = True,
    order_version: int = ORDER_VERSION,
) -> Loader:
    """Open the shards, build the DALI graph and begin to produce batches.

    Args:
        spec: what to deliver.
        rank: this process, 0 to world_size - 1.
        world_size: processes that share each global batch equally.
        device_id: index of this process's GPU; needed for, and only for, `spec.device="gpu"`.
        start_step: the step of the first batch: 0, or that of a resumed run.
        quarantine_list: the run's own list of bad samples, read and added to; all ranks may share
            it. None: none is kept.
        pin_memory: whether batches made on the CPU are in pinned memory, which a GPU copies from
            while it computes.
        count_making: whether the batch that is being made is one of those ahead of the trainer;
            None: on a GPU it is.
        begin: False waits for `Loader.begin`, or the first `next`, before any memory is taken for
            batches.
        order_version: of the order of the samples; a resumed run gives the one it began with
            (`BatchStream.state_dict`, version 1 where that holds none).

    Raises:
        ValueError: for a batch that the ranks cannot share or that is larger than the set, a
            pattern without shards, an unknown version of the order, or a GPU without DALI.
        DecoderBrokenError: if DALI crashes, hangs or errs on this GPU.
        ShardError: if an index is missing, broken or stale, more samples are bad than
            `spec.max_bad_share` allows, or labels are asked for that the set has not.
    """
    from fastmoco_pipelines.views import self_test
    from fastmoco_pipelines.views.dali import ViewPipeline
    from fastmoco_pipelines.views.runtime import require_dali

    if spec.device == "gpu":
        require_dali("data.device", spec.device, "decode on the CPU: --data.device cpu")
    require(
        (device_id is not None) == (spec.device == "gpu"),
        "device_id",
        device_id,
        f"does not fit {spec.device=}",
    )
    local = local_batch_size(spec.global_batch_size, world_size)
    share_arenas()  # before the first of many threads starts
    if spec.device == "gpu":
        self_test.require_working_decoder(spec.device, device_id)
    shards = ShardSet.open(spec.shards, cache=spec, max_transfers=spec.max_transfers)
    try:
        if spec.classes:
            shards.require_labels(spec.shards, spec.classes)
        plan = Plan(
            seed=spec.seed,
            windows=shards.windows(spec.shuffle_window, spec),
            global_batch_size=spec.global_batch_size,
            rank=rank,
            world_size=world_size,
            order_version=order_version,
        )
        plan.places(start_step)  # refuses wrong numbers now
        bad = BadSamples(shards, max_bad_share=spec.max_bad_share, run_list=quarantine_list)
        suspects = Suspects(
            device=spec.device,
            device_id=device_id,
            threads=spec.threads,
            decode_bytes=spec.decode_bytes,
        )
        stop = threading.Event()
        pipeline = ViewPipeline(
            spec.views,
            batch_size=local,
            sub_batch=spec.images_per_run(local),
            threads=spec.threads,
            device=spec.device,
            device_id=device_id,
            view_dtype=spec.view_dtype,
            decode_bytes=spec.decode_bytes,
            seconds_per_image=spec.seconds_per_image,
        )
    except BaseException:
        shards.close()
        raise
    healer = Healer(shards, bad, suspects, stop)
    pinned = pin_memory and spec.device == "cpu"
    bounded = spec.device == "gpu" if count_making is None else count_making
    places = BatchPlaces(spec.batches_ahead) if bounded else None
    clock = StageClock(spec.batches_ahead)
    loader = Loader(
        Source(spec, shards, plan, pipeline, healer, clock, stop, pinned, places), start_step
    )
    if begin:
        loader.begin()
    return loader


class Loader(BatchStream):
    """Endless batches of one rank, in the order of the steps, made ahead by two threads. Build it
    with `build_loader`.

    A bad sample's place goes to another one. Iterating raises ShardError where too many are bad, or
    nothing comes at all.
    """

    def __init__(self, source: Source, start_step: int) -> None:
        super().__init__(
            source.spec,
            sample_count=len(source.shards),
            digest=source.shards.digest,
            world_size=source.plan.world_size,
            start_step=start_step,
            windows=source.plan.windows,
            order_version=source.plan.order_version,
        )
        self._clock = source.clock
        self._bad = source.healer.bad
        self._failure: BaseException | None = None
        self._shards = source.shards
        self._places = source.places
        self._results: Results = queue.Queue(maxsize=source.spec.batches_ahead)
        stop = source.stop
        # The threads do not reference this object, so that an unreferenced loader is collected and
        # they end with it. They are daemons: a read that hangs must not keep the interpreter from
        # exiting.
        read: Readings = queue.Queue(maxsize=1)
        self._reader = threading.Thread(
            target=read_steps,
            args=(source, start_step, read, stop),
            name="fastmoco-read",
            daemon=True,
        )
        self._producer = threading.Thread(
            target=make_batches,
            args=(source, read, self._results, stop),
            name="fastmoco-loader",
            daemon=True,
        )
        # The garbage collector may call this in any thread, one of these two included, and while
        # that holds a queue's lock: so it waits for nothing and touches no queue.
        self._stop = weakref.finalize(self, stop.set)
        self._begun = False

    def begin(self) -> None:
        """Start to make batches; a second call does nothing."""
        if not self._begun:
            self._begun = True
            self._reader.start()
            self._producer.start()

    def next(self) -> Batch:
        """The batch of the next step.

        Raises:
            ShardError: if too much of the data is damaged, or nothing came for `timeout_s`; again
                on every later call.
            RuntimeError: after `close`.
        """
        if self._failure is not None:
            raise self._failure
        if not self._stop.alive:
            raise RuntimeError("the loader is closed")
        self.begin()

        # Wait for the batch, and report a long wait.
        start = time.perf_counter()
        queued = self._results.qsize()
        tell_at = _REPORT_SECONDS
        while True:
            if not self._stop.alive:
                raise RuntimeError("the loader is closed")
            try:
                result = self._results.get(timeout=POLL_SECONDS)
                break
            except queue.Empty:
                if not self._producer.is_alive() and self._results.empty():
                    raise RuntimeError(
                        f"the loader's thread ended before step {self._step}"
                    ) from None
                waited = time.perf_counter() - start
                if waited >= min(tell_at, self.spec.timeout_s):
                    tell_at *= 2
                    self._tell_of_waiting(waited)

        self.wait_seconds = time.perf_counter() - start
        self._clock.waited(self.wait_seconds, queued)
        for text in self._bad.news():
            self.report(text)
        if isinstance(result, BaseException):
            self._failure = result
            raise result
        if self._places is not None:
            self._places.give(result.views[0].device)
        self._step = result.step + 1
        return result

    def _tell_of_waiting(self, waited: float) -> None:
        """Report what the loader is doing, or give up."""
        doing = self._clock.doing(self._shards.reading)
        if waited < self.spec.timeout_s:
            self.report(f"waiting for the data of step {self._step} for {waited:.0f} s: {doing}")
            return
        self._failure = LoaderTimeoutError(
            f"no data for step {self._step} within {waited:.0f} s: {doing}. Check the disk or the "
            "server; the same command resumes from the last checkpoint. If storage is only slow, "
            "raise --data.timeout-s."
        )
        raise self._failure

    def has_digest(self, saved: str) -> bool:
        """Whether a digest that a run has saved is the one of this set; in version 1, too, which
        reads all records."""
        return saved == self.digest or saved == self._shards.digest_1

    def figures(self) -> StageFigures:
        """Where the time has gone since the loader was built, and how many samples are left out."""
        self._bad.read_run_list()
        return self._clock.figures(len(self._bad))

    @property
    def resting(self) -> bool:
        """Whether the queue is full and no thread works: what a measurement waits for."""
        return self._results.full() and not self._clock.busy

    def close(self) -> None:
        """Stop the threads and close the files. Batches that were delivered stay valid.

        A thread that hangs in a read is left running with its files: it is a daemon.
        """
        self._stop()
        self._shards.cancel()  # the reading thread may be waiting for a server
        until = time.monotonic() + (
            POLL_SECONDS if isinstance(self._failure, LoaderTimeoutError) else _CLOSE_SECONDS
        )
        for thread in (self._producer, self._reader) if self._begun else ():
            thread.join(max(POLL_SECONDS, until - time.monotonic()))
        if not (self._producer.is_alive() or self._reader.is_alive()):
            self._shards.close()
        while not self._results.empty():  # They are no longer needed, and may be on the GPU.
            self._results.get_nowait()
        give_back_memory()
