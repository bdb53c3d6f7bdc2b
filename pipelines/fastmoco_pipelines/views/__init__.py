"""Bytes and draws to tensors: the only room that imports DALI."""
