"""A run: its pipeline, its tables, its files."""
