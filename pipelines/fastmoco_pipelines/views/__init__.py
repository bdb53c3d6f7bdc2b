"""Bytes and draws to tensors: the only room that imports DALI, beside the child process of a check."""
