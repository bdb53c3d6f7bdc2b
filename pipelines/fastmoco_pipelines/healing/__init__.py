"""Which samples of a set are bad, and which ones take their places."""
