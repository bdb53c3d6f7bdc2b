"""q, k and v out of one stacked projection, and in the backward their gradients stacked and summed in one pass."""
