"""Dynamic tracing: who called whom and when, what the device ran, and which call it belongs to."""
