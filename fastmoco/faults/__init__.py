"""Processes that fail, hang or are told to stop. Nothing here knows a number of the training."""
