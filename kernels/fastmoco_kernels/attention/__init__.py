"""Multi-head self-attention, and the choice of who computes it: see `op.py`."""
