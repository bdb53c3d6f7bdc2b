"""The command line: arguments to a call. No logic."""
