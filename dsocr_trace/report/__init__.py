"""What a person sees of a run: rows first, then their rendering."""
