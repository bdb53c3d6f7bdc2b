"""How many bytes a kernel really reads and writes, counted in Triton's interpreter; or how many its
tensors hold."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor


@contextmanager
def touched_bytes(chunk: int) -> Iterator[dict[str, int]]:
    """Counts unmasked elements of all loads and stores of blocks of `chunk` elements; single
    numbers are left out."""
    from triton.runtime.interpreter import interpreter_builder

    counts = {"read": 0, "written": 0}
    builder = type(interpreter_builder)
    load, store = builder.create_masked_load, builder.create_masked_store

    def size(pointers, mask) -> int:
        whole = pointers.data.size == chunk
        return (
            int(mask.data.sum()) * pointers.get_element_ty().primitive_bitwidth // 8 if whole else 0
        )

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


class CountedKernel:
    """A kernel that adds up the bytes of every tensor that one launch is given, each once."""

    def __init__(self, kernel, touched: list[int]) -> None:
        self.kernel, self.touched = kernel, touched

    def __getitem__(self, grid):
        def launched(*arguments, **options):
            self.touched.append(
                sum({t.data_ptr(): t.nbytes for t in arguments if isinstance(t, Tensor)}.values())
            )
            return self.kernel[grid](*arguments, **options)

        return launched
