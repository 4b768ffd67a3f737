"""Costs of operators that move elements without computing on them."""

from __future__ import annotations

from analytic.cost import BOOL, INT64, ZERO, Cost, Size


def copy(elements: Size, item: int, *, weights: Size = 0) -> Cost:
    """Copy into a new contiguous tensor: ``clone``, ``contiguous``, ``reshape`` of a permuted tensor, ``cat``.

    Bytes: `elements` read and written.

    Parameters
    ----------
    elements
        Elements of the result.
    item
        Bytes per element.
    weights
        How many of the elements read are model parameters.
    """
    size = elements * item
    return Cost(bytes_read=size, bytes_written=size, weight_bytes=weights * item, activation_bytes=size)


#: Concatenation copies every operand once.
cat = copy


def cast(elements: Size, source_item: int, target_item: int, *, weights: Size = 0) -> Cost:
    """Conversion to another dtype; no work where the dtype stays the same.

    Bytes: ``elements * source_item`` read, ``elements * target_item`` written.

    Parameters
    ----------
    elements
        Elements converted.
    source_item, target_item
        Bytes per element before and after.
    weights
        How many of the elements are model parameters.
    """
    if source_item == target_item:
        return ZERO
    written = elements * target_item
    return Cost(
        bytes_read=elements * source_item,
        bytes_written=written,
        weight_bytes=weights * source_item,
        activation_bytes=written,
    )


def fill(elements: Size, item: int) -> Cost:
    """Constant or counting fill of a new tensor (``zeros``, ``arange``): `elements` written."""
    size = elements * item
    return Cost(bytes_written=size, activation_bytes=size)


def pad(source_elements: Size, target_elements: Size, item: int) -> Cost:
    """Constant padding: the source read, the larger target written."""
    written = target_elements * item
    return Cost(bytes_read=source_elements * item, bytes_written=written, activation_bytes=written)


def gather(rows: Size, width: Size, item: int, *, weights: Size = 0) -> Cost:
    """Rows picked by an int64 index: ``x[index]``.

    Bytes: `rows` indices and ``rows * width`` elements read, ``rows * width`` elements written.

    Parameters
    ----------
    rows
        Rows picked.
    width
        Elements per row.
    item
        Bytes per element.
    weights
        How many of the elements read are model parameters.
    """
    return Cost(bytes_read=rows * INT64) + copy(rows * width, item, weights=weights)


def embedding(rows: Size, width: Size, item: int) -> Cost:
    """Table lookup: a `gather` whose rows are parameters. Only the rows looked up are read."""
    return gather(rows, width, item, weights=rows * width)


def scatter(rows: Size, width: Size, item: int) -> Cost:
    """Rows put where an int64 index says: ``x[index] = rows``, ``scatter_``. Traffic as in `gather`."""
    return gather(rows, width, item)


def sort(elements: Size) -> Cost:
    """``argsort`` of int64 keys: keys read; sorted keys and their int64 indices written.

    Comparisons depend on the algorithm and are not counted as arithmetic.
    """
    size = elements * INT64
    return Cost(bytes_read=size, bytes_written=2 * size, activation_bytes=size)


def topk(rows: Size, width: Size, k: Size, item: int) -> Cost:
    """Largest `k` of each row: one comparison per element; k values and k int64 indices written per row."""
    written = rows * k * (item + INT64)
    return Cost(
        vector_flops=rows * width,
        bytes_read=rows * width * item,
        bytes_written=written,
        activation_bytes=written,
    )


def masked_scatter(positions: Size, selected: Size, width: Size, item: int) -> Cost:
    """``masked_scatter_`` with one mask entry per position, broadcast over `width`.

    Arithmetic: the running count of mask entries, 1 per element. Bytes: the mask and the source rows read, the
    selected rows written in place.

    Parameters
    ----------
    positions
        Rows of the target.
    selected
        Rows that the mask selects.
    width
        Elements per row.
    item
        Bytes per element.
    """
    moved = selected * width * item
    return Cost(
        vector_flops=positions * width,
        bytes_read=positions * BOOL + moved,
        bytes_written=moved,
        activation_bytes=moved,
    )
