"""The training step and what happens between steps: data, update, evaluation, saving, resume."""
