"""Costs of attention and of rotary positions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Literal, TypeAlias

from analytic.cost import FP32, INT64, Cost, Dtype, Size
from analytic.operators.base import Operator
from analytic.operators.matrix import bmm
from analytic.operators.movement import cast, cat, copy, fill
from analytic.operators.pointwise import elementwise, softmax

if TYPE_CHECKING:
    from analytic.operators.base import Steps

#: Which part of the scores' rectangle counts as arithmetic of a fused causal kernel.
Counted: TypeAlias = Literal["rectangle", "triangle", "nothing"]


def _twice_the_pairs(queries: Size, keys: Size, counted: Counted) -> Size:
    """Twice the query-key pairs that are counted; twice, to stay with whole numbers."""
    if counted == "nothing":
        return 0
    rectangle = 2 * queries * keys
    # Query i of T sees the keys up to its own position: T - 1 - i fewer than the last one.
    return rectangle - queries * (queries - 1) if counted == "triangle" else rectangle


@Operator
def sdpa(
    heads: Size, queries: Size, keys: Size, head_dim: Size, dtype: Dtype, *, counted: Counted = "rectangle"
) -> Cost:
    """Attention in one fused kernel that keeps the scores on chip: ``scaled_dot_product_attention``, FlashAttention.

    Tensor FLOPs: two products over all pairs of query and key, ``4 * heads * pairs * head_dim``. Vector FLOPs: 6 per
    pair (scale, and 5 for the softmax). Bytes: Q, K and V read, result written.

    Parameters
    ----------
    heads
        Batch size times attention heads.
    queries, keys
        Positions T that ask and S that are asked.
    head_dim
        Width of one head.
    dtype
        Type of Q, K, V and the result.
    counted
        Pairs that count: the full ``rectangle`` T * S; the ``triangle`` that a causal kernel computes,
        T * S - T * (T - 1) / 2; or ``nothing``, as a counter sees that does not know the kernel.
    """
    twice = heads * _twice_the_pairs(queries, keys, counted)
    results = heads * queries * head_dim
    return Cost(
        tensor_flops=2 * twice * head_dim,
        vector_flops=3 * twice,
        read=dtype.traffic(heads * (queries + 2 * keys) * head_dim),
        written=dtype.traffic(results),
        activation_bytes=results * dtype.bytes,
    )


@sdpa.backward
def _(heads: Size, queries: Size, keys: Size, head_dim: Size, dtype: Dtype, *, counted: Counted = "rectangle") -> Cost:
    """Five products, since the scores were not kept: they are computed again, then the gradients of P, V, Q and K.

    Vector FLOPs: 10 per pair, 6 for the scores again and 4 for the softmax's gradient. Bytes: Q, K, V, result, its
    gradient and a row statistic in fp32 read; three gradients written.
    """
    twice = heads * _twice_the_pairs(queries, keys, counted)
    gradients = heads * (queries + 2 * keys) * head_dim
    return Cost(
        tensor_flops=5 * twice * head_dim,
        vector_flops=5 * twice,
        read=dtype.traffic(gradients + 2 * heads * queries * head_dim) + FP32.traffic(heads * queries),
        written=dtype.traffic(gradients),
        activation_bytes=gradients * dtype.bytes,
    )


@Operator
def sdpa_with_bias(heads: Size, queries: Size, keys: Size, head_dim: Size, dtype: Dtype) -> Cost:
    """`sdpa` with a materialised (heads, queries, keys) bias: one more operation and one more read per score.

    Parameters
    ----------
    heads
        Batch size times attention heads.
    queries, keys
        Positions T that ask and S that are asked.
    head_dim
        Width of one head.
    dtype
        Type of Q, K, V, the bias and the result.
    """
    scores = heads * queries * keys
    fused = sdpa(heads, queries, keys, head_dim, dtype).cost
    return fused + Cost(vector_flops=scores, read=dtype.traffic(scores))


@sdpa_with_bias.backward
def _(heads: Size, queries: Size, keys: Size, head_dim: Size, dtype: Dtype) -> Cost:
    """As `sdpa`, and the bias is read again and gets a gradient."""
    scores = heads * queries * keys
    fused = sdpa.backward_cost(heads, queries, keys, head_dim, dtype)
    extra = Cost(
        vector_flops=scores,
        read=dtype.traffic(scores),
        written=dtype.traffic(scores),
        activation_bytes=scores * dtype.bytes,
    )
    return fused + extra


@Operator
def attention_eager(heads: Size, queries: Size, keys: Size, head_dim: Size, dtype: Dtype) -> Steps:
    """Attention that writes out its scores.

    Sequence: product of Q and K, scale, softmax in fp32, cast back, product with V, copy into (T, heads, D) order.
    Tensor FLOPs as in `sdpa`.

    Parameters
    ----------
    heads
        Batch size times attention heads.
    queries, keys
        Positions T that ask and S that are asked.
    head_dim
        Width of one head.
    dtype
        Type of Q, K, V and the result.
    """
    scores = heads * queries * keys
    results = heads * queries * head_dim
    sequence = (
        bmm(heads, queries, head_dim, keys, dtype)
        + elementwise(scores, dtype)
        + softmax(heads * queries, keys, dtype, FP32)
        + cast(scores, FP32, dtype)
        + bmm(heads, queries, keys, head_dim, dtype)
        + copy(results, dtype)
    )
    return sequence.handing_on(results * dtype.bytes)


@Operator
def causal_mask(heads: Size, queries: Size, keys: Size, dtype: Dtype) -> Steps:
    """Causal mask built as a (queries, keys) tensor and added to all scores.

    Sequence: fill, upper triangle in place, broadcast add.

    Parameters
    ----------
    heads
        Batch size times attention heads.
    queries, keys
        Positions T that ask and S that are asked.
    dtype
        Type of mask and scores.
    """
    mask = queries * keys
    scores = heads * mask
    sequence = fill(mask, dtype) + copy(mask, dtype) + elementwise(scores, dtype, shared=mask)
    return sequence.handing_on(scores * dtype.bytes)


@causal_mask.backward
def _(heads: Size, queries: Size, keys: Size, dtype: Dtype) -> Cost:
    """The mask is a constant; the scores' gradient passes on as it is."""
    del heads, queries, keys, dtype
    return Cost()


@Operator
def rope_tables(positions: Size, half_dim: Size, dtype: Dtype) -> Steps:
    """Cosine and sine tables of the rotary embedding, computed in fp32. They have no gradient.

    Sequence: positions and inverse frequencies to fp32, their outer product as a ``bmm`` with inner size 1,
    concatenation with itself, cos and sin, each scaled, cast back. Tensor FLOPs: ``2 * positions * half_dim``.

    Parameters
    ----------
    positions
        Positions T of the forward.
    half_dim
        Frequencies: half of the head's width.
    dtype
        Type of the model, which the tables and the stored inverse frequencies have.
    """
    table = 2 * positions * half_dim
    sequence = (
        cast(positions, INT64, FP32)
        + cast(half_dim, dtype, FP32)
        + bmm(1, half_dim, 1, positions, FP32)
        + cat(table, FP32)
        + elementwise(table, FP32) * 4
        + cast(table, FP32, dtype) * 2
    )
    return sequence.handing_on(2 * table * dtype.bytes)


@rope_tables.backward
def _(positions: Size, half_dim: Size, dtype: Dtype) -> Cost:
    """Positions are whole numbers, and frequencies are not trained."""
    del positions, half_dim, dtype
    return Cost()


@Operator
def rope_apply(pairs: Size, table_pairs: Size, dtype: Dtype) -> Steps:
    """Rotation of one tensor: ``x * cos + rotate_half(x) * sin``.

    Sequence: multiply, negate one half, concatenate the halves, multiply, add. Arithmetic: 7 per pair.

    Parameters
    ----------
    pairs
        Half of the tensor's elements: each pair is rotated by one angle.
    table_pairs
        Half of one table's elements.
    dtype
        Type of tensor and tables.
    """
    elements = 2 * pairs
    sequence = (
        elementwise(elements, dtype, shared=2 * table_pairs)
        + elementwise(pairs, dtype)
        + cat(elements, dtype)
        + elementwise(elements, dtype, shared=2 * table_pairs)
        + elementwise(elements, dtype, operands=2)
    )
    return sequence.handing_on(elements * dtype.bytes)


@rope_apply.backward
def _(pairs: Size, table_pairs: Size, dtype: Dtype) -> Steps:
    """A rotation by the opposite angles; the tables are constants."""
    return rope_apply(pairs, table_pairs, dtype)


#: What `sdpa` may count, for checks of options.
COUNTED: Final[tuple[Counted, ...]] = ("rectangle", "triangle", "nothing")
