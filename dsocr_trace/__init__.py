"""The face of dsocr-trace."""
