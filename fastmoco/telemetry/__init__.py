"""Telemetry of a run: speed (`metrics`, `stragglers`), health (`stability`), output (`sinks`,
`console`)."""
