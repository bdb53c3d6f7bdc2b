"""URL to bytes: the only room with sockets.

A store is one file, with a class of `Store`, and one row of `fastmoco_pipelines.text.STORES`. From
outside this package `register(scheme, store)` adds the row:

    from fastmoco_pipelines.stores import Store, register

    register("az", AzureStore())  # from now on az://container/train-*.tar is a pattern of shards
"""

from fastmoco_pipelines.stores.store import Body, Request, Store
from fastmoco_pipelines.stores.table import register

__all__ = ["Body", "Request", "Store", "register"]
