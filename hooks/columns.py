"""Small steps between Arrow's columns, which know null, and numpy's arrays, which do not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
import pyarrow as pa

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Ints = NDArray[np.int64]

#: Row number where there is none.
NONE: Final = -1
#: Texts are taken in pieces of this many rows: one piece holds at most 2 GiB.
_PIECE_ROWS: Final = 1 << 18


def ints(column: pa.ChunkedArray, absent: int = NONE) -> Ints:
    """Integers of a column, with `absent` for null."""
    values: Ints = column.fill_null(absent).to_numpy()
    return values


def take_ints(values: Ints, rows: Ints) -> pa.Array:
    """Values by row number, null for `NONE`."""
    return pa.array(np.append(values, NONE)[rows], mask=rows == NONE)


def take_texts(texts: pa.Array | pa.ChunkedArray, rows: Ints) -> pa.ChunkedArray:
    """Texts by row number, null for `NONE`; the result may be larger than Arrow's limit for one array."""
    if isinstance(texts, pa.ChunkedArray):
        texts, numbers = encode_texts(texts)
        rows = np.append(numbers, NONE)[rows]
    numbered = pa.array(rows, mask=rows == NONE)
    pieces = [texts.take(numbered[first : first + _PIECE_ROWS]) for first in range(0, len(rows), _PIECE_ROWS)]
    return pa.chunked_array(pieces, pa.string())


def encode_texts(texts: pa.ChunkedArray) -> tuple[pa.Array, Ints]:
    """Distinct texts, and for each row which of them it is; a null counts as `NONE`."""
    encoded = texts.dictionary_encode().unify_dictionaries()
    if not encoded.num_chunks:
        return pa.array([], pa.string()), np.empty(0, np.int64)
    return encoded.chunk(0).dictionary, np.concatenate(
        [ints(chunk.indices.cast(pa.int64())) for chunk in encoded.chunks]
    )
