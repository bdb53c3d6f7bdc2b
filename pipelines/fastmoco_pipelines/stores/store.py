"""What a store is: how the URLs of a scheme are opened and listed. One file for each kind of
server.

A store moves bytes. Retries, checks and files are the work of `transfer.py`, the same for all.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

from fastmoco_pipelines.stores.retries import Limits
from fastmoco_pipelines.text import redact


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A request for a file, or for its bytes from `start` to before `stop`."""

    url: str
    start: int = 0
    """First byte wanted; the answer may begin at 0 all the same."""
    stop: int | None = None
    """End of the bytes wanted; None: all to the end of the file."""
    validator: str = ""
    """Of the file whose bytes before `start` were received earlier; if it has changed, the answer
    begins at 0."""
    known: str = ""
    """Validator of an earlier copy; if the file is unchanged, the answer may be `unchanged`."""
    limits: Limits
    """Times and speeds."""
    deadline: float
    """Of `time.monotonic()`, by which the last byte has come."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Body:
    """The answer to one request."""

    start: int
    """Position in the file of the first byte that `chunks` yields."""
    total: int | None
    """Size of the whole file in bytes; None where the server does not report it."""
    validator: str
    """Identifies this state of the file in a later request, e.g. an ETag or a date; empty: there is
    none."""
    kind: str
    """Content type; of a page of a login portal for instance text/html."""
    chunks: Iterator[bytes]
    """The bytes; raises PassingError when they cease to come. They may also just end too early."""
    unchanged: bool = False
    """The file still is what `known` names; there are no chunks."""


class Store(ABC):
    """Reads the URLs of one scheme. Any thread may use it.

    Errors name the URL as `text.redact` shows it: without user, password and query.

    Attributes:
        user_in_url: a URL may hold a user and a password; else they belong in the environment.
        quotes_names: names of files are percent-encoded in a URL.
        lists: `find` and `exists` work; else the manifest of a folder names its shards.
    """

    user_in_url: bool = False
    quotes_names: bool = False
    lists: bool = False

    @abstractmethod
    def open(self, request: Request) -> AbstractContextManager[Body]:
        """Ask for a file.

        Raises:
            AbsentError: if there is none.
            PassingError: if another try may succeed.
            RemoteError: if not.
        """

    def find(self, url: str, limits: Limits) -> list[str]:
        """The URLs that a glob names, sorted.

        Raises:
            RemoteError: if the store cannot be asked.
        """
        raise NotImplementedError(f"{type(self).__name__} does not list {redact(url)}, of {limits}")

    def exists(self, url: str, limits: Limits) -> bool:
        """Whether there is an object or a folder of exactly this name. It is asked about names that
        hold `[`, `?` or a list in braces, which might as well be patterns.

        Raises:
            RemoteError: if the store cannot be asked.
        """
        del url, limits
        return False
