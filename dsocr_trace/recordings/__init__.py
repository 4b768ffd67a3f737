"""What other tools recorded, attributed to modules."""
