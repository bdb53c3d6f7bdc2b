"""What works on this machine, and the cure for what does not (`fastmoco doctor`). This process imports
neither torch nor any optional library: each is tried by a process of its own, which may crash or hang."""
