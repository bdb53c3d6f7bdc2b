"""The store of a URL, by its scheme, and how a further one is registered."""

from __future__ import annotations

import re
from contextlib import AbstractContextManager
from importlib import import_module
from typing import cast

from fastmoco_pipelines import text
from fastmoco_pipelines.stores.store import Body, Request, Store


def store_of(url: str) -> Store:
    """The store of a URL whose scheme is one of the table."""
    scheme = url.partition(":")[0].lower()
    found = text.STORES[scheme]
    if isinstance(found, str):
        found = text.STORES[scheme] = import_module(found).STORE
    return cast(Store, found)


def open_url(request: Request) -> AbstractContextManager[Body]:
    """One request, answered by the store of its URL; see `Store.open`."""
    return store_of(request.url).open(request)


def register(scheme: str, store: Store) -> None:
    """Have the URLs of a scheme read by a store from now on, in this process.

    Args:
        scheme: what is before `://`, e.g. "az".
        store: its `open` may be called by several threads at once.

    Raises:
        ValueError: for a scheme that is none, means local files, or has a store.
    """
    scheme = scheme.lower()
    if not re.fullmatch(r"[a-z][a-z0-9+.-]+", scheme) or scheme in ("file", "pipe"):
        raise ValueError(
            f"scheme={scheme!r}: cannot name a store: it needs two letters or more, not file or "
            "pipe"
        )
    if scheme in text.STORES:
        raise ValueError(f"scheme={scheme!r}: has a store already")
    text.STORES[scheme] = store
