"""One module per case, with NAME, a docstring, and run(options), which returns a JSON result."""
