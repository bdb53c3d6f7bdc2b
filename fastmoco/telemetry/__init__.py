"""Telemetry of a run: its speed, its health, slow ranks, and the output of all figures."""
