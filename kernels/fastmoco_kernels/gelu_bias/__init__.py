"""GELU, and in its backward the gradient of the bias of the linear layer before it."""
