"""The training step, and the work between steps: evaluation, saving, rollback and resume."""
