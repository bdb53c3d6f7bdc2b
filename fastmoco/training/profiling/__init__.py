"""Where the time of a training step goes: by part, by operator, and what the host waits for."""
