"""Sums over rows without atomics, shared by the ops that leave partial sums."""
