"""Sums over rows without atomics, shared by the ops that write partial sums."""
