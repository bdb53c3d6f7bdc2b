"""Trackers of a run: TensorBoard, Weights & Biases, MLflow, trackio, and sinks of a user's own.

`metrics.jsonl` is the record of a run. A tracker gets a copy, and can neither stop nor slow the run.
"""
