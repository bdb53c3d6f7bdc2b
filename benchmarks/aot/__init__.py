"""Ahead-of-time compilation without a GPU: `machine_code.py`, and the configurations of each op."""
