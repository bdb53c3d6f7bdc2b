"""Looks at a set of shards and reports: checks, figures and pictures. Only the command line imports
it."""
