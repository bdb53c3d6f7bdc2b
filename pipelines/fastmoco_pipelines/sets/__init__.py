"""From a pattern to samples under one number, and to their checked bytes."""
