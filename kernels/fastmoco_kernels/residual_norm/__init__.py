"""Residual add and layer norm in one pass, written in the dtype of the next product."""
