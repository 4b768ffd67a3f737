"""Pieces of Markdown that the reference pages are made of."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence


def page(*blocks: str) -> str:
    """Blocks, without the empty ones, as paragraphs of a page."""
    return "\n\n".join(block for block in blocks if block) + "\n"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, right: int = 0) -> str:
    """Table whose last `right` columns are numbers."""
    rule = ["---"] * (len(head) - right) + ["---:"] * right
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *rows))


def count(number: int) -> str:
    """Whole number with its thousands apart."""
    return f"{number:,}"


def linked(text: str, names: Collection[str], own: str = "") -> str:
    """Text of a docstring, with the names of other operators as links to their pages, which stand beside this one."""

    def link(match: re.Match[str]) -> str:
        name = match[1]
        return f"[`{name}`]({name}.md)" if name in names and name != own else match[0]

    return re.sub(r"(?<!`)`(\w+)`(?!`)", link, text)
