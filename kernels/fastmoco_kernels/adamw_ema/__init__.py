"""AdamW, the moving average and both compute copies in one sweep: see `op.py`."""
