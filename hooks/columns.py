"""Small steps between Arrow's columns, which know null, and numpy's arrays, which do not.

Memory that is touched for the first time costs more than what is done with it, so what is needed on the way is kept
small: texts are held once each, and long columns are worked through in pieces.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, TypeVar

import numpy as np
import pyarrow as pa

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    Ints = NDArray[np.int64]

#: Type of texts that repeat: each is held once, a row holds its number. A kernel's name has hundreds of characters.
CODED: Final = pa.dictionary(pa.int32(), pa.string())
#: Row number where there is none.
NONE: Final = -1
#: A piece of a column of integers takes half a megabyte, which the caches of a processor hold.
_PIECE_ROWS: Final = 1 << 16

_Column = TypeVar("_Column", pa.Array, pa.ChunkedArray)


def ints(column: pa.ChunkedArray, absent: int = NONE) -> Ints:
    """Integers of a column, with `absent` for null."""
    values: Ints = (column.fill_null(absent) if column.null_count else column).to_numpy()
    return values


def take_rows(column: _Column, rows: Ints) -> _Column:
    """Values by row number, null for `NONE`."""
    return column.take(pa.array(rows, mask=rows == NONE))


def each_distinct(
    look_up: Callable[[list[Any]], Sequence[Any]], column: pa.ChunkedArray, kind: pa.DataType = CODED
) -> pa.ChunkedArray:
    """What `look_up` gives for the distinct values of a column, row by row; null for null."""
    chunks = column.dictionary_encode().unify_dictionaries().chunks
    found = pa.array(look_up(chunks[0].dictionary.to_pylist()) if chunks else [], kind)
    return pa.chunked_array([found.take(chunk.indices) for chunk in chunks], kind)


def is_text(column: pa.ChunkedArray, text: str) -> pa.ChunkedArray:
    """Where a column of texts holds this one; null for null."""
    return each_distinct(lambda distinct: [one == text for one in distinct], column, pa.bool_())


def plain(table: pa.Table) -> pa.Table:
    """The table with its texts written out, as pandas should have them: it makes categories of coded ones."""
    fields = [field.with_type(pa.string()) if field.type == CODED else field for field in table.schema]
    return table.cast(pa.schema(fields))


def pieces(*columns: Ints) -> Iterator[tuple[Ints, ...]]:
    """The columns, a piece of each at a time."""
    for first in range(0, len(columns[0]), _PIECE_ROWS):
        yield tuple(column[first : first + _PIECE_ROWS] for column in columns)


def in_pieces(compute: Callable[..., Ints], *columns: Ints) -> Ints:
    """What `compute` gives for the columns, computed a piece at a time."""
    result = np.empty(len(columns[0]), np.int64)
    for target, *sources in pieces(result, *columns):
        target[:] = compute(*sources)
    return result
