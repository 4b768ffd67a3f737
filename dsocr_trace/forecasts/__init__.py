"""Predictions without a run: workloads, sweeps, and why a number is what it is."""
