"""The HTTP server: a front without torch, and rank 0 in a process of its own behind it."""
