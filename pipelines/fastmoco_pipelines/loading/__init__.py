"""Queues and threads between the shards and the trainer: batches of views, a few ahead."""
