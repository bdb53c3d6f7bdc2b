"""Whole views on the CPU: crop, resize and colours in one call over a batch of decoded images, bit for bit as PIL."""
