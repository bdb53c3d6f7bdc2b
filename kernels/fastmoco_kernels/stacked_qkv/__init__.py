"""q, k, v of a stacked projection; the backward stacks and sums their gradients in one pass."""
