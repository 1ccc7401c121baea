"""The actors: the master that leads a job and the workers that follow it."""
