"""The schemes of URLs that are read, each with its store: the one table in which a new store is a
row.

It is on the ground floor because messages must hide the secrets of every scheme, also where no
store is ever used. The rows name modules, which are imported with the first URL (`stores.table`).
"""

from __future__ import annotations

import re

STORES: dict[str, object] = {
    "http": "fastmoco_pipelines.stores.http",
    "https": "fastmoco_pipelines.stores.http",
    "s3": "fastmoco_pipelines.stores.object_store",
    "gs": "fastmoco_pipelines.stores.object_store",
}
"""Scheme, in lower case -> a `stores.store.Store`, or the name of the module whose `STORE` is
one."""

SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]+):")
"""The scheme at the beginning of a URL, two letters at least: `C:` is a drive."""
