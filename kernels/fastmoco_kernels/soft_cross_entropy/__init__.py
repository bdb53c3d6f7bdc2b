"""Soft-target cross-entropy over a wide head, as in DINO and SwAV: see `op.py`."""
