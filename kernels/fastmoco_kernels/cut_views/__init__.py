"""Whole views on the CPU: crop, resize and colors of a batch, bit for bit as PIL."""
