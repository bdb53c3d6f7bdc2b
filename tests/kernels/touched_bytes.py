"""How many bytes a kernel really reads and writes, counted in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def touched_bytes(chunk: int) -> Iterator[dict[str, int]]:
    """Counts unmasked elements of all loads and stores of blocks of `chunk` elements; single numbers are left out."""
    from triton.runtime.interpreter import interpreter_builder

    counts = {"read": 0, "written": 0}
    builder = type(interpreter_builder)
    load, store = builder.create_masked_load, builder.create_masked_store

    def size(pointers, mask) -> int:
        whole = pointers.data.size == chunk
        return int(mask.data.sum()) * pointers.get_element_ty().primitive_bitwidth // 8 if whole else 0

    def counted_load(self, pointers, mask, *rest):
        counts["read"] += size(pointers, mask)
        return load(self, pointers, mask, *rest)

    def counted_store(self, pointers, value, mask, *rest):
        counts["written"] += size(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    builder.create_masked_load, builder.create_masked_store = counted_load, counted_store
    try:
        yield counts
    finally:
        builder.create_masked_load, builder.create_masked_store = load, store
