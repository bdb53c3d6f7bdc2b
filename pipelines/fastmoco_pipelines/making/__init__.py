"""Writes shards and indexes. Only the command line imports it."""
