"""One module a case; each offers NAME, a docstring, and run(options) -> one JSON-able result."""
