"""Settings of all tests."""

from __future__ import annotations

from hypothesis import settings

# The same examples on every machine, however slow it is.
settings.register_profile("repeatable", derandomize=True, deadline=None, database=None, max_examples=40)
settings.load_profile("repeatable")
