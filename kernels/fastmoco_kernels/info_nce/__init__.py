"""InfoNCE of normalised queries against normalised keys: see `op.py`."""
