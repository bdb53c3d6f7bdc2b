"""The folder of a run: its files, its identity, and its curves."""
