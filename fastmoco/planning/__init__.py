"""Plan how a training step fits into memory: its costs, its chunks, and the free memory."""
