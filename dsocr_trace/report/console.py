"""How results look on a terminal and in a pipe."""

from __future__ import annotations

from typing import Final

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

_PIPED_WIDTH: Final = 100


def result_console() -> Console:
    """Console for results: as wide as the terminal, and of one width elsewhere."""
    return Console(highlight=False, width=None if Console().is_terminal else _PIPED_WIDTH)


def plain_table(title: str, *columns: str) -> Table:
    """Table without a frame."""
    return Table(*columns, title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
