"""The memory-bound passes of a transformer block with its own backward, one kernel each."""
