"""The learning benchmark: kNN of small encoders while they train, against images seen and against
CPU-seconds. `python -m benchmarks.learning` compares a run with the stored one.
"""
