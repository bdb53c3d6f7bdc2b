"""How a training step fits into memory: its costs, the chunks, and what is free."""
