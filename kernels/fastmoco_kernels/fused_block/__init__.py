"""What a transformer block with a backward of its own needs besides products and attention, each in one pass over memory."""
