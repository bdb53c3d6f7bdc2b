"""Layer-wise adaptive rate scaling of a set of tensors, and its optimizer: see `op.py`."""
