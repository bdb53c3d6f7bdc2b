"""Benchmarks: `python -m benchmarks list | run CASE`. Not installed with the package."""

import fastmoco  # noqa: F401 (before torch: it sets how long OpenMP's threads spin)
