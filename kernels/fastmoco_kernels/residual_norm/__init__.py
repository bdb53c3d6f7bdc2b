"""Residual add and layer norm in one pass, written in the dtype that the next product computes in."""
