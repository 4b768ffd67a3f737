"""``python -m dsocr_trace``, for where the command is not on the path."""

from dsocr_trace.cli import main

main()
