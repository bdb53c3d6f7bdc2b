"""Benchmarks: `python -m benchmarks list | run CASE`. Not installed with the package."""
