"""Errors that reach the user as one line and an exit code."""

from __future__ import annotations

from typing import ClassVar


class DsocrTraceError(Exception):
    """The job failed; the message states the fact, the choices and what fixes it."""

    exit_code: ClassVar[int] = 1


class InputError(DsocrTraceError):
    """What the user gave cannot be used: wrong usage or bad input."""

    exit_code: ClassVar[int] = 2
