"""What all commands share: errors become one line and an exit code."""

from __future__ import annotations

import contextlib
import sys
import traceback
from typing import TYPE_CHECKING, Final, NoReturn

import click

from analytic.errors import DsocrTraceError
from dsocr_trace.interrupt import noticed

if TYPE_CHECKING:
    from collections.abc import Iterator

#: Exit code of a check that found a difference.
DIFFERENT: Final = 3

debug_option = click.option("--debug", is_flag=True, help="Show the traceback of an error.")


@contextlib.contextmanager
def reported(*, debug: bool) -> Iterator[None]:
    """End with one line and the right exit code on every error that the user can do something about."""
    from hooks.errors import TraceError  # noqa: PLC0415

    try:
        with noticed():
            yield
    except (DsocrTraceError, TraceError) as error:
        if debug:
            traceback.print_exc()
        _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        _fail("interrupted; nothing was written", 1)


def _fail(message: str, exit_code: int) -> NoReturn:
    click.echo(f"dsocr-trace: {message}", err=True)
    sys.exit(exit_code)
