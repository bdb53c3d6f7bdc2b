"""Exponential moving average of a set of tensors: see `op.py`."""
