"""s3:// and gs:// through fsspec, block by block, with the same bounds and the same answers as
HTTP.

fsspec and its file systems are imported when the first such URL is met. They take credentials from
the environment or the user's files; a URL holds none. All after the bucket is the key: `%20` is
three characters, and `?` and `#` are nothing special.
"""

from __future__ import annotations

import fnmatch
import glob
import importlib
import queue
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, TypeVar

from fastmoco_pipelines.errors import (
    AbsentError,
    AccessError,
    BusyError,
    PassingError,
    RemoteError,
    install_command,
)
from fastmoco_pipelines.stores.connections import POOL_CONNECTIONS
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
        """See `Store.find`. A folder or an object whose name is exactly the pattern is taken as it
        is."""
        scheme = url.partition("://")[0]
        files = file_system(scheme)
        where = redact(url)

        def entries(place: str) -> tuple[list[str], list[str]]:
            """Names of the folders and of the objects in a folder."""
            try:
                listed = bounded(
                    where, limits.respond_seconds, lambda: files.ls(place, detail=True)
                )
            except AbsentError:
                return [], []
            names: tuple[list[str], list[str]] = ([], [])
            for item in listed:
                name = item["name"].strip("/").removeprefix(f"{place.strip('/')}/")
                if name and "/" not in name:
                    names[item["type"] != "directory"].append(name)
            return names

        if "**" in url:
            found = bounded(where, limits.respond_seconds, lambda: files.glob(_path(url)))
            return sorted(f"{scheme}://{name.lstrip('/')}" for name in found)
        bucket, *folders, last = _path(url).split("/")
        places = [bucket]
        for folder in folders:
            if glob.has_magic(folder):
                places = [
                    f"{at}/{name}" for at in places for name in _fitting(entries(at)[0], folder)
                ]
            else:
                places = [f"{at}/{folder}" for at in places]
        return sorted(
            f"{scheme}://{at}/{name}" for at in places for name in _fitting(entries(at)[1], last)
        )

    def exists(self, url: str, limits: Limits) -> bool:
        """See `Store.exists`."""
        files = file_system(url.partition("://")[0])
        try:
            bounded(redact(url), limits.respond_seconds, lambda: files.info(_path(url)))
        except AbsentError:
            return False
        return True


STORE = ObjectStore()


@cache
def file_system(scheme: str) -> Any:
    """fsspec's file system of a scheme; one for the process.

    Raises:
        RemoteError: naming the package that is missing, and the extra that brings it.
    """
    scheme = scheme.lower()
    package = _PACKAGES[scheme]
    try:
        fsspec = importlib.import_module("fsspec")
        importlib.import_module(package)
    except ImportError as error:
        raise RemoteError(
            f"{scheme}://: needs the package {package} ({error}): {install_command(scheme)}"
        ) from None
    options = {}
    if scheme == "s3":
        # botocore has 10 connections by default, and further requests wait for one of them.
        theirs = fsspec.config.conf.get(scheme, {}).get("config_kwargs", {})
        options["config_kwargs"] = {"max_pool_connections": POOL_CONNECTIONS, **theirs}
    return fsspec.filesystem(scheme, use_listings_cache=False, **options)


def bounded(where: str, seconds: float, call: Callable[[], T]) -> T:
    """The result of a call that may hang: it is left to itself, in a daemon thread, when the time
    is over.

    Raises:
        AbsentError, PassingError, RemoteError: naming `where` and the cause.
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
    if error is not None:
        raise _explained(where, error) from None
    return result  # type: ignore[return-value]


_KEYS = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or ~/.aws/credentials"
_REGION = (
    "the bucket is in another region, or at another endpoint: set AWS_DEFAULT_REGION or "
    "AWS_ENDPOINT_URL"
)
_CLOCK = "the clock of this machine differs from the store's: set it (NTP)"
_BUSY = ("SlowDown", "Throttling", "ThrottlingException", "TooManyRequests", "503", "429")
_CODES: dict[str, tuple[type[RemoteError], str]] = {
    "RequestTimeTooSkewed": (RemoteError, _CLOCK),
    "RequestExpired": (RemoteError, _CLOCK),
    "ExpiredToken": (RemoteError, "the credentials have expired: log in again"),
    "ExpiredTokenException": (RemoteError, "the credentials have expired: log in again"),
    "InvalidToken": (RemoteError, "the session token is not valid: log in again"),
    "InvalidAccessKeyId": (RemoteError, f"the store does not know the access key: check {_KEYS}"),
    "SignatureDoesNotMatch": (RemoteError, "the secret key is wrong: check AWS_SECRET_ACCESS_KEY"),
    "InvalidObjectState": (RemoteError, "it is archived: restore it first"),
    "NoSuchBucket": (AbsentError, "there is no such bucket: check its name, and AWS_ENDPOINT_URL"),
    "PermanentRedirect": (RemoteError, _REGION),
    "AuthorizationHeaderMalformed": (RemoteError, _REGION),
    "IllegalLocationConstraintException": (RemoteError, _REGION),
    "301": (RemoteError, _REGION),
}
"""What S3 means by its codes, and the cure."""


def _explained(where: str, error: BaseException) -> RemoteError:
    """An error of a store's library by what it means; the library's own text may quote a signed
    request."""
    chain = list(_causes(error))
    kinds = {type(item).__name__ for item in chain}
    for item in chain:
        answer = getattr(item, "response", None)
        code = answer.get("Error", {}).get("Code") if isinstance(answer, dict) else None
        if code in _BUSY:
            return BusyError(f"{where}: the store fails: it asks for fewer requests ({code})")
        if code in _CODES:
            kind, text = _CODES[code]
            return kind(f"{where}: {text} ({code})")
    if isinstance(error, FileNotFoundError):
        literal = " (a key is taken as it is written: %20 is no space)" if "%" in where else ""
        return AbsentError(f"{where}: does not exist: check the name{literal}")
    if isinstance(error, PermissionError):
        return AccessError(
            f"{where}: access is refused: check the credentials in the environment, and for a "
            "bucket whose reader pays FSSPEC_S3_REQUESTER_PAYS=true"
        )
    if kinds & {"NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError"}:
        if where.startswith("gs://"):
            cure = "GOOGLE_APPLICATION_CREDENTIALS, or for a public bucket FSSPEC_GS_TOKEN=anon"
        else:
            cure = f"{_KEYS}, or for a public bucket FSSPEC_S3_ANON=true"
        return RemoteError(f"{where}: there are no credentials: give {cure}")
    refused = any(isinstance(item, ssl.SSLCertVerificationError) for item in chain)
    if refused or "SSLError" in kinds:
        return RemoteError(
            f"{where}: the certificate of its store is not valid: give the certificates of its "
            "authority as a PEM file in AWS_CA_BUNDLE (gs: SSL_CERT_FILE)"
        )
    if kinds & {"ProxyConnectionError", "ClientProxyConnectionError", "ClientHttpProxyError"}:
        return PassingError(f"{where}: the proxy of HTTPS_PROXY or HTTP_PROXY cannot be reached")
    if kinds & {"EndpointConnectionError", "ClientConnectorError", "ClientConnectorDNSError"}:
        return PassingError(
            f"{where}: its store cannot be reached: check AWS_ENDPOINT_URL and the network, and "
            "for a store that has no host name for each bucket `s3 = addressing_style = path` in "
            "~/.aws/config (docs/data.md)"
        )
    return PassingError(f"{where}: the store fails ({type(error).__name__})")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those that led to it."""
    for _ in range(10):
        if error is None:
            return
        yield error
        inner = getattr(error, "kwargs", {}).get("error")  # of botocore
        error = inner if isinstance(inner, BaseException) else error.__cause__ or error.__context__


def _fitting(names: list[str], pattern: str) -> list[str]:
    """The names that fit a glob; the name itself, where it is among them."""
    if pattern in names:
        return [pattern]
    return [name for name in names if fnmatch.fnmatchcase(name, pattern)]


def _path(url: str) -> str:
    return url.partition("://")[2]
