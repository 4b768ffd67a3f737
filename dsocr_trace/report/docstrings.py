"""What docstrings say: summary, prose, and the entries of their sections (NumPy's form)."""

from __future__ import annotations

import inspect
import re
from typing import Final

import attrs

_SECTION: Final = re.compile(r"^(\w+)\n-{3,}\n", re.MULTILINE)


@attrs.frozen
class Docstring:
    """One docstring, taken apart.

    Attributes
    ----------
    summary
        First paragraph.
    prose
        Paragraphs behind it, up to the first section.
    sections
        Text of each section by its title.
    """

    summary: str
    prose: str
    sections: dict[str, str]

    @property
    def entries(self) -> dict[str, str]:
        """Meanings by name, from the sections Parameters and Attributes."""
        return _entries(self.sections.get("Parameters", "")) | _entries(self.sections.get("Attributes", ""))


def docstring(documented: object) -> Docstring:
    """Take the docstring of a class, function or operator apart; empty where there is none."""
    text = inspect.cleandoc(getattr(documented, "__doc__", None) or "")
    prose, *sections = _SECTION.split(text)
    summary, _, rest = prose.partition("\n\n")
    titled = dict(zip(sections[::2], (body.strip() for body in sections[1::2]), strict=True))
    return Docstring(summary.strip(), rest.strip(), titled)


def _entries(section: str) -> dict[str, str]:
    entries: dict[str, str] = {}
    for entry in filter(None, re.split(r"\n(?=\S)", section)):
        names, _, meaning = entry.partition("\n")
        text = " ".join(inspect.cleandoc(meaning).split())
        entries |= dict.fromkeys(names.split(", "), text)
    return entries
