"""Ahead-of-time compilation for GPUs that are not here: `machine_code.py`, and one file of configurations an op."""
