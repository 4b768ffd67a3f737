"""Tables of the documentation that say what each column holds, made from the Arrow schemas."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import pyarrow as pa

if TYPE_CHECKING:
    from collections.abc import Iterator

#: Endings of the names of real columns, and words in those of whole ones, to their units.
_RATES: Final = {"_flops_per_s": "FLOP/s", "_bytes_per_s": "bytes/s"}
_WORDS: Final = {"flops": "FLOP", "bytes": "bytes", "ns": "ns", "px": "px"}
_RATIO: Final = "ratio"


def column_table(schema: pa.Schema) -> str:
    """Name, type, unit and meaning of each column, as a Markdown table.

    Parameters
    ----------
    schema
        Of columns made by `hooks.tables.column`.
    """
    return "\n".join(["| column | type | unit | meaning |", "|---|---|---|---|", *_rows(schema)])


def unit(field: pa.Field) -> str:
    """What the column counts in, by its name; empty for counts, ids and names."""
    if pa.types.is_floating(field.type):
        return next((found for ending, found in _RATES.items() if field.name.endswith(ending)), _RATIO)
    return next((found for word, found in _WORDS.items() if word in field.name.split("_")), "")


def meaning(field: pa.Field) -> str:
    """What the column holds, as its schema says; empty where it says nothing."""
    found: bytes = (field.metadata or {}).get(b"description", b"")
    return found.decode()


def _rows(schema: pa.Schema) -> Iterator[str]:
    for field in schema:
        yield f"| `{field.name}` | {field.type} | {unit(field)} | {meaning(field)} |"
