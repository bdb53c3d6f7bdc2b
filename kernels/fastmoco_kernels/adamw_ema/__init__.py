"""AdamW and the moving average in one sweep: see `op.py`."""
