"""Errors of the tracer and the profilers."""

from __future__ import annotations

from typing import ClassVar


class TraceError(RuntimeError):
    """The trace cannot be taken or cannot be trusted; the message says why and what helps."""

    exit_code: ClassVar[int] = 1


class NothingRecordedError(TraceError):
    """A file that another tool wrote is sound and holds nothing to attribute."""
