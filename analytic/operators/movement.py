"""Costs of operators that move elements without computing on them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from analytic.cost import BOOL, INT64, NOTHING, ZERO, Cost, Dtype, Size
from analytic.operators.base import Operator

if TYPE_CHECKING:
    from analytic.operators.base import Steps


def _moved(elements: Size, dtype: Dtype, weights: Size = 0) -> Cost:
    traffic = dtype.traffic(elements)
    return Cost(read=traffic, written=traffic, weight_bytes=weights * dtype.bytes, activation_bytes=traffic.total)


@Operator
def copy(elements: Size, dtype: Dtype, *, weights: Size = 0) -> Cost:
    """Copy into a new contiguous tensor: ``clone``, ``contiguous``, ``reshape`` of a permuted tensor.

    Bytes: `elements` read and written.

    Parameters
    ----------
    elements
        Elements of the result.
    dtype
        Type of the elements.
    weights
        How many of the elements read are model parameters.
    """
    return _moved(elements, dtype, weights)


@copy.backward
def _(elements: Size, dtype: Dtype, *, weights: Size = 0) -> Steps:
    """The gradient is copied back."""
    del weights
    return copy(elements, dtype)


@Operator
def cat(elements: Size, dtype: Dtype, *, weights: Size = 0) -> Cost:
    """Concatenation: every operand is copied once.

    Bytes: `elements` read and written.

    Parameters
    ----------
    elements
        Elements of the result.
    dtype
        Type of the elements.
    weights
        How many of the elements read are model parameters.
    """
    return _moved(elements, dtype, weights)


@cat.backward
def _(elements: Size, dtype: Dtype, *, weights: Size = 0) -> Steps:
    """The gradient is cut up and copied."""
    del weights
    return copy(elements, dtype)


@Operator
def kv_cache_append(cached: Size, added: Size, dtype: Dtype) -> Cost:
    """Keys and values, old and new, copied into new tensors, as ``DynamicCache`` of transformers does.

    Bytes: the whole cache read and written. The cache grows by the new elements.

    Parameters
    ----------
    cached
        Elements of the cache afterwards.
    added
        How many of them are new.
    dtype
        Type of keys and values.
    """
    return _moved(cached, dtype) + Cost(kv_cache_bytes=added * dtype.bytes)


@kv_cache_append.backward
def _(cached: Size, added: Size, dtype: Dtype) -> Steps:
    """The gradient is cut up and copied."""
    del added
    return copy(cached, dtype)


@Operator
def cast(elements: Size, source: Dtype, target: Dtype, *, weights: Size = 0) -> Cost:
    """Conversion to another dtype; no work where the dtype stays the same.

    Bytes: `elements` read in the old dtype and written in the new one.

    Parameters
    ----------
    elements
        Elements converted.
    source, target
        Dtypes before and after.
    weights
        How many of the elements are model parameters.
    """
    if source == target:
        return ZERO
    written = target.traffic(elements)
    return Cost(
        read=source.traffic(elements),
        written=written,
        weight_bytes=weights * source.bytes,
        activation_bytes=written.total,
    )


@cast.backward
def _(elements: Size, source: Dtype, target: Dtype, *, weights: Size = 0) -> Steps:
    """The gradient is cast back."""
    del weights
    return cast(elements, target, source)


@Operator
def fill(elements: Size, dtype: Dtype) -> Cost:
    """Constant or counting fill of a new tensor (``zeros``, ``arange``): `elements` written. It has no gradient.

    Parameters
    ----------
    elements
        Elements of the result.
    dtype
        Their type.
    """
    written = dtype.traffic(elements)
    return Cost(written=written, activation_bytes=written.total)


@Operator
def pad(source_elements: Size, target_elements: Size, dtype: Dtype) -> Cost:
    """Constant padding: the source read, the larger target written.

    Parameters
    ----------
    source_elements, target_elements
        Elements before and after.
    dtype
        Their type.
    """
    written = dtype.traffic(target_elements)
    return Cost(read=dtype.traffic(source_elements), written=written, activation_bytes=written.total)


@pad.backward
def _(source_elements: Size, target_elements: Size, dtype: Dtype) -> Steps:
    """The gradient of what is not padding is copied."""
    del target_elements
    return copy(source_elements, dtype)


def _picked(rows: Size, width: Size, dtype: Dtype, weights: Size = 0) -> Cost:
    return Cost(read=INT64.traffic(rows)) + _moved(rows * width, dtype, weights)


@Operator
def gather(rows: Size, width: Size, dtype: Dtype, *, weights: Size = 0) -> Cost:
    """Rows picked by an int64 index: ``x[index]``.

    Bytes: `rows` indices and ``rows * width`` elements read, ``rows * width`` elements written.

    Parameters
    ----------
    rows
        Rows picked.
    width
        Elements per row.
    dtype
        Type of the elements.
    weights
        How many of the elements read are model parameters.
    """
    return _picked(rows, width, dtype, weights)


@gather.backward
def _(rows: Size, width: Size, dtype: Dtype, *, weights: Size = 0) -> Steps:
    """Each picked row's gradient is added to the row that it came from."""
    del weights
    return index_put(rows, width, dtype, accumulate=True)


@Operator
def embedding(rows: Size, width: Size, dtype: Dtype) -> Cost:
    """Table lookup: a `gather` whose rows are parameters. Only the rows looked up are read.

    Parameters
    ----------
    rows
        Ids looked up.
    width
        Elements per row of the table.
    dtype
        Type of the table.
    """
    return _picked(rows, width, dtype, weights=rows * width)


@embedding.backward
def _(rows: Size, width: Size, dtype: Dtype) -> Steps:
    """The gradients of the rows looked up are added to the table's, which is not cleared here."""
    return index_put(rows, width, dtype, accumulate=True)


@Operator
def scatter(rows: Size, width: Size, dtype: Dtype) -> Cost:
    """Values put along one dimension where an int64 index says: ``scatter_``. Traffic as in `gather`.

    Parameters
    ----------
    rows
        Rows put.
    width
        Elements per row.
    dtype
        Type of the elements.
    """
    return _picked(rows, width, dtype)


@scatter.backward
def _(rows: Size, width: Size, dtype: Dtype) -> Steps:
    """The gradient is picked from where the values went."""
    return gather(rows, width, dtype)


@Operator
def index_put(rows: Size, width: Size, dtype: Dtype, *, accumulate: bool = False) -> Cost:
    """Rows put where an int64 index says: ``x[index] = rows``, ``index_put_``.

    Bytes: as in `gather`; with `accumulate` the old rows are read too, and each element is one addition.

    Parameters
    ----------
    rows
        Rows put.
    width
        Elements per row.
    dtype
        Type of the elements.
    accumulate
        Whether the rows are added to what is there.
    """
    elements = int(accumulate) * rows * width
    old = dtype.traffic(elements) if accumulate else NOTHING
    return _picked(rows, width, dtype) + Cost(vector_flops=elements, read=old)


@index_put.backward
def _(rows: Size, width: Size, dtype: Dtype, *, accumulate: bool = False) -> Steps:
    """The gradient is picked from where the rows went."""
    del accumulate
    return gather(rows, width, dtype)


@Operator
def sort(elements: Size) -> Cost:
    """``argsort`` of int64 keys: keys read; sorted keys and their int64 indices written. It has no gradient.

    Comparisons depend on the algorithm and are not counted as arithmetic.

    Parameters
    ----------
    elements
        Keys to sort.
    """
    return Cost(
        read=INT64.traffic(elements),
        written=INT64.traffic(2 * elements),
        activation_bytes=2 * elements * INT64.bytes,
    )


@Operator
def topk(rows: Size, width: Size, k: Size, dtype: Dtype) -> Cost:
    """Largest `k` of each row: one comparison per element; k values and k int64 indices written per row.

    Parameters
    ----------
    rows
        Rows, each searched by itself.
    width
        Elements per row.
    k
        How many are kept.
    dtype
        Type of the elements.
    """
    written = dtype.traffic(rows * k) + INT64.traffic(rows * k)
    return Cost(
        vector_flops=rows * width,
        read=dtype.traffic(rows * width),
        written=written,
        activation_bytes=written.total,
    )


@topk.backward
def _(rows: Size, width: Size, k: Size, dtype: Dtype) -> Steps:
    """Zeros, into which the gradients of the kept values are scattered."""
    return fill(rows * width, dtype) + scatter(rows * k, 1, dtype)


@Operator
def masked_scatter(positions: Size, selected: Size, width: Size, dtype: Dtype) -> Cost:
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
    dtype
        Type of the elements.
    """
    moved = dtype.traffic(selected * width)
    return Cost(
        vector_flops=positions * width,
        read=BOOL.traffic(positions) + moved,
        written=moved,
        activation_bytes=moved.total,
    )


@masked_scatter.backward
def _(positions: Size, selected: Size, width: Size, dtype: Dtype) -> Cost:
    """The selected rows' gradients are picked for the source, and cleared for the target."""
    rows = selected * width
    return _moved(rows, dtype) + Cost(read=BOOL.traffic(2 * positions), written=dtype.traffic(rows))
