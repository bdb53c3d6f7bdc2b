"""Gaussian blur with a standard deviation per image, bit for bit as Pillow computes it."""
