"""The maths: one process, no network."""
