"""Parts of the documentation that say how a command is called, made from click's own words."""

from __future__ import annotations

import inspect
import re
from typing import TYPE_CHECKING, Final

import click

if TYPE_CHECKING:
    from collections.abc import Iterator

_PROGRAM: Final = "dsocr-trace"
#: What click writes behind a help text: the default, whether it is required, the range.
_EXTRA: Final = re.compile(r"  \[(.+?)\](?=  \[|$)")


def command_reference(name: str, command: click.Command) -> str:
    """What the command does, its usage and its options, in Markdown.

    Parameters
    ----------
    name
        As it is called.
    command
        What click knows of it.
    """
    context = click.Context(command, info_name=f"{_PROGRAM} {name}", max_content_width=100)
    usage = " ".join(context.get_usage().removeprefix("Usage: ").split())
    lines = ["| option | default, limits | meaning |", "|---|---|---|", *_rows(command, context)]
    return "\n".join([inspect.cleandoc(command.help or ""), "", "```text", usage, "```", "", *lines])


def _rows(command: click.Command, context: click.Context) -> Iterator[str]:
    # Arguments are named by the usage and the text above.
    for option in (parameter for parameter in command.params if isinstance(parameter, click.Option)):
        names, text = option.get_help_record(context) or ("", "")
        extras = [extra.removeprefix("default: ") for extra in _EXTRA.findall(text)]
        cells = (f"<code>{names}</code>", "; ".join(extras), _EXTRA.sub("", text))
        yield f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |"
