"""The time model: calibrated curves of the operators, and the clocks of host and device."""
