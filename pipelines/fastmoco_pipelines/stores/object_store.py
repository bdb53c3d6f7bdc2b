"""s3:// and gs:// through fsspec, block by block, with the same bounds and the same answers as
HTTP.

fsspec and its file systems are imported when the first such URL is met. They take credentials from
the environment or the user's files; a URL holds none.
"""

from __future__ import annotations

import importlib
import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, TypeVar

from fastmoco_pipelines.errors import AbsentError, AccessError, PassingError, RemoteError
from fastmoco_pipelines.stores.retries import Limits
from fastmoco_pipelines.stores.store import Body, Request, Store
from fastmoco_pipelines.text import redact

BLOCK_BYTES = 8 << 20
_PACKAGES = {"s3": "s3fs", "gs": "gcsfs"}
T = TypeVar("T")


class ObjectStore(Store):
    """s3 and gs, through fsspec."""

    lists = True

    @contextmanager
    def open(self, request: Request) -> Iterator[Body]:
        """See `Store.open`. The deadline is kept by the caller, between two chunks."""
        url = request.url
        start = request.start
        stop = request.stop
        files = file_system(url.partition("://")[0])
        where = redact(url)
        seconds = request.limits.respond_seconds
        info = bounded(where, seconds, lambda: files.info(_path(url)))
        total = info.get("size")
        if info.get("type") == "directory" or not isinstance(total, int):
            raise AbsentError(f"{where}: is not an object of the store: check the name")
        now = next(
            (
                str(info[name])
                for name in ("ETag", "etag", "generation", "LastModified")
                if info.get(name)
            ),
            "",
        )
        if request.known and request.known == now:
            yield Body(
                start=0, total=total, validator=now, kind="object", chunks=iter(()), unchanged=True
            )
            return
        begins = start if stop is not None or request.validator == now else 0

        def block(low: int, high: int) -> bytes:
            data: bytes = files.cat_file(_path(url), start=low, end=high)
            return data

        def chunks() -> Iterator[bytes]:
            end = total if stop is None else min(stop, total)
            for low in range(begins, end, BLOCK_BYTES):
                high = min(low + BLOCK_BYTES, end)
                yield bounded(where, seconds, partial(block, low, high))

        yield Body(start=begins, total=total, validator=now, kind="object", chunks=chunks())

    def find(self, url: str, limits: Limits) -> list[str]:
        """See `Store.find`."""
        scheme = url.partition("://")[0]
        files = file_system(scheme)
        found = bounded(redact(url), limits.respond_seconds, lambda: files.glob(_path(url)))
        return sorted(f"{scheme}://{name.lstrip('/')}" for name in found)


STORE = ObjectStore()


@cache
def file_system(scheme: str) -> Any:
    """fsspec's file system of a scheme; one for the process.

    Raises:
        RemoteError: naming the package that is missing, and the extra that brings it.
    """
    package = _PACKAGES[scheme]
    try:
        fsspec = importlib.import_module("fsspec")
        importlib.import_module(package)
    except ImportError as error:
        raise RemoteError(
            f"{scheme}://: needs the package {package} ({error}): pip install '.[{scheme}]' in "
            "fastmoco's source folder"
        ) from None
    return fsspec.filesystem(scheme, use_listings_cache=False)


def bounded(where: str, seconds: float, call: Callable[[], T]) -> T:
    """The result of a call that may hang: it is left to itself, in a daemon thread, when the time
    is over.

    Raises:
        AbsentError, PassingError: naming `where` and the cause.
    """
    results: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue()

    def run() -> None:
        try:
            results.put((call(), None))
        except BaseException as error:  # the caller must hear of it, whatever it is
            results.put((None, error))

    threading.Thread(target=run, name="fastmoco-store", daemon=True).start()
    try:
        result, error = results.get(timeout=seconds)
    except queue.Empty:
        raise PassingError(f"{where}: no answer in {seconds:g} s") from None
    if isinstance(error, FileNotFoundError):
        raise AbsentError(f"{where}: does not exist: check the name") from None
    if isinstance(error, PermissionError):
        raise AccessError(
            f"{where}: access is refused: check the credentials in the environment"
        ) from None
    if error is not None:
        # The libraries' own texts may quote signed requests.
        raise PassingError(f"{where}: the store fails ({type(error).__name__})") from None
    return result  # type: ignore[return-value]


def _path(url: str) -> str:
    return url.partition("://")[2]
