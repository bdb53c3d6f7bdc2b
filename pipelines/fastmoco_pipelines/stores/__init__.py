"""URL to bytes: the only room with sockets."""
