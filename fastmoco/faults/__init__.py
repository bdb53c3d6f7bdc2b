"""Handling of processes that fail, hang or are asked to stop.

Nothing here reads a loss, a gradient or a weight.
"""
