"""Multi-head self-attention and the choice of its backend: see `op.py`."""
