"""The machine: what it is, what it can do, how fast it is."""
