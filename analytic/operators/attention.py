"""Costs of attention and of rotary positions."""

from __future__ import annotations

from analytic.cost import FP32, INT64, Cost, Size
from analytic.operators.matrix import bmm
from analytic.operators.movement import cast, cat, copy, fill
from analytic.operators.pointwise import elementwise, softmax


def sdpa(heads: Size, queries: Size, keys: Size, head_dim: Size, item: int) -> Cost:
    """Attention in one fused kernel that keeps the scores on chip: ``scaled_dot_product_attention``, FlashAttention.

    Tensor FLOPs: two products, ``4 * heads * queries * keys * head_dim``: the full rectangle, also where a causal
    kernel skips half of it. Vector FLOPs: 6 per score (scale, and 5 for the softmax). Bytes: Q, K and V read,
    result written.

    Parameters
    ----------
    heads
        Batch size times attention heads.
    queries, keys
        Positions T that ask and S that are asked.
    head_dim
        Width of one head.
    item
        Bytes per element.
    """
    written = heads * queries * head_dim * item
    return Cost(
        tensor_flops=4 * heads * queries * keys * head_dim,
        vector_flops=6 * heads * queries * keys,
        bytes_read=heads * (queries + 2 * keys) * head_dim * item,
        bytes_written=written,
        activation_bytes=written,
    )


def sdpa_with_bias(heads: Size, queries: Size, keys: Size, head_dim: Size, item: int) -> Cost:
    """`sdpa` with a materialised (heads, queries, keys) bias: one more operation and one more read per score."""
    scores = heads * queries * keys
    return sdpa(heads, queries, keys, head_dim, item) + Cost(vector_flops=scores, bytes_read=scores * item)


def attention_eager(heads: Size, queries: Size, keys: Size, head_dim: Size, item: int) -> Cost:
    """Attention that writes out its scores.

    Sequence: product of Q and K, scale, softmax in fp32, cast back, product with V, copy into (T, heads, D) order.
    Tensor FLOPs as in `sdpa`, whose parameters these are.
    """
    scores = heads * queries * keys
    results = heads * queries * head_dim
    sequence = (
        bmm(heads, queries, head_dim, keys, item)
        + elementwise(scores, item)
        + softmax(heads * queries, keys, item, FP32)
        + cast(scores, FP32, item)
        + bmm(heads, queries, keys, head_dim, item)
        + copy(results, item)
    )
    return sequence.handing_on(results * item)


def causal_mask(heads: Size, queries: Size, keys: Size, item: int) -> Cost:
    """Causal mask built as a (queries, keys) tensor and added to all scores.

    Sequence: fill, upper triangle in place, broadcast add.
    """
    mask = queries * keys
    scores = heads * mask
    sequence = fill(mask, item) + copy(mask, item) + elementwise(scores, item, shared=mask)
    return sequence.handing_on(scores * item)


def rope_tables(positions: Size, half_dim: Size, item: int) -> Cost:
    """Cosine and sine tables of the rotary embedding, computed in fp32.

    Sequence: positions and inverse frequencies to fp32, their outer product as a ``bmm`` with inner size 1,
    concatenation with itself, cos and sin, each scaled, cast back. Tensor FLOPs: ``2 * positions * half_dim``.

    Parameters
    ----------
    positions
        Positions T of the forward.
    half_dim
        Frequencies: half of the head's width.
    item
        Bytes per element of the model's dtype, which the tables and the stored inverse frequencies have.
    """
    table = 2 * positions * half_dim
    sequence = (
        cast(positions, INT64, FP32)
        + cast(half_dim, item, FP32)
        + bmm(1, half_dim, 1, positions, FP32)
        + cat(table, FP32)
        + elementwise(table, FP32) * 4
        + cast(table, FP32, item) * 2
    )
    return sequence.handing_on(2 * table * item)


def rope_apply(pairs: Size, table_pairs: Size, item: int) -> Cost:
    """Rotation of one tensor: ``x * cos + rotate_half(x) * sin``.

    Sequence: multiply, negate one half, concatenate the halves, multiply, add. Arithmetic: 7 per pair.

    Parameters
    ----------
    pairs
        Half of the tensor's elements: each pair is rotated by one angle.
    table_pairs
        Half of one table's elements.
    item
        Bytes per element.
    """
    elements = 2 * pairs
    sequence = (
        elementwise(elements, item, shared=2 * table_pairs) * 2
        + elementwise(pairs, item)
        + cat(elements, item)
        + elementwise(elements, item, operands=2)
    )
    return sequence.handing_on(elements * item)
