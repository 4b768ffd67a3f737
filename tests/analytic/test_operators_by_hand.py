"""Costs that can be worked out on paper."""

from __future__ import annotations

import numpy as np
import pytest

from analytic import operators as op
from analytic.cost import FP32, INT64, MODEL_DTYPES, ZERO, Cost, Traffic, dtype_name
from analytic.errors import InputError

BF16 = MODEL_DTYPES["bfloat16"]


def test_linear() -> None:
    assert op.linear(5, 3, 4, BF16, bias=True).cost == Cost(
        tensor_flops=2 * 5 * 3 * 4,
        vector_flops=20,
        read=Traffic({"bfloat16": (15 + 12 + 4) * 2}),
        written=Traffic({"bfloat16": 40}),
        weight_bytes=32,
        activation_bytes=40,
    )


def test_conv2d() -> None:
    cost = op.conv2d(2, 3, 4, 3, 8, 4, FP32).cost
    assert cost.tensor_flops == 2 * (2 * 4 * 4 * 4) * (3 * 3 * 3)
    assert cost.bytes_read == (2 * 3 * 64 + 4 * 27) * 4
    assert cost.bytes_written == 2 * 4 * 16 * 4


def test_attention_costs_the_same_products_fused_or_not() -> None:
    shape = (10, 7, 9, 16, BF16)
    fused, biased, eager = op.sdpa(*shape).cost, op.sdpa_with_bias(*shape).cost, op.attention_eager(*shape).cost
    assert fused.tensor_flops == biased.tensor_flops == eager.tensor_flops == 4 * 10 * 7 * 9 * 16
    assert biased.bytes_read - fused.bytes_read == 10 * 7 * 9 * 2
    assert eager.bytes_total > biased.bytes_total > fused.bytes_total


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 9), (2, 2), (7, 7), (5, 9), (9, 9)])
def test_a_causal_kernel_computes_the_pairs_that_see_each_other(queries: int, keys: int) -> None:
    """Query i is the position ``keys - queries + i``, and sees all positions up to its own."""
    visible = sum(key <= keys - queries + query for query in range(queries) for key in range(keys))
    triangle = op.sdpa(3, queries, keys, 16, BF16, counted="triangle").cost
    assert triangle.tensor_flops == 3 * visible * 4 * 16
    assert triangle.vector_flops == 3 * visible * 6
    nothing = op.sdpa(3, queries, keys, 16, BF16, counted="nothing").cost
    assert (nothing.tensor_flops, nothing.vector_flops) == (0, 0)
    rectangle = op.sdpa(3, queries, keys, 16, BF16).cost
    assert triangle.read == nothing.read == rectangle.read
    backward = op.sdpa.backward_cost(3, queries, keys, 16, BF16, counted="triangle")
    assert backward.tensor_flops == 3 * visible * 10 * 16


def test_a_row_of_indices_is_read_beside_the_elements() -> None:
    cost = op.gather(3, 5, BF16).cost
    assert cost.read == Traffic({"int64": 3 * 8, "bfloat16": 15 * 2})
    assert cost.written == BF16.traffic(15)


def test_top_k_writes_values_and_indices() -> None:
    assert op.topk(2, 64, 6, FP32).cost.written == Traffic({"float32": 2 * 6 * 4, "int64": 2 * 6 * 8})


def test_a_norm_in_fp32_moves_both_types() -> None:
    """Input and weight in bf16; five tensors in fp32 between the casts, and two numbers per row."""
    cost = op.rms_norm(3, 5, BF16).cost
    assert cost.read == Traffic({"bfloat16": (15 + 15 + 5) * 2, "float32": (4 * 15 + 2 * 3 + 3) * 4})
    assert cost.written == Traffic({"bfloat16": (15 + 15) * 2, "float32": (3 * 15 + 3 + 2 * 3) * 4})
    assert (cost.weight_bytes, cost.activation_bytes) == (10, 30)


def test_cast_to_the_same_dtype_is_no_work() -> None:
    assert op.cast(100, FP32, FP32).cost == ZERO
    assert op.cast.backward_cost(100, FP32, FP32) == ZERO


def test_positions_masks_and_indices_have_no_gradient() -> None:
    gradients = (
        op.rope_tables.backward_cost(9, 32, BF16),
        op.causal_mask.backward_cost(2, 9, 9, BF16),
        op.fill.backward_cost(9, INT64),
        op.sort.backward_cost(9),
    )
    assert set(map(bool, (cost != ZERO for cost in gradients))) == {False}


def test_cost_sums_over_calls() -> None:
    cost = Cost(tensor_flops=np.array([1, 2, 3]), read=BF16.traffic(np.array([1, 0, 5])) + FP32.traffic(2))
    assert cost.over(3) == Cost(tensor_flops=6, read=Traffic({"bfloat16": 12, "float32": 24}))


@pytest.mark.parametrize(("given", "name"), [("bf16", "bfloat16"), ("fp32", "float32"), ("float16", "float16")])
def test_dtype_names(given: str, name: str) -> None:
    assert dtype_name(given) == name


def test_unknown_dtype() -> None:
    with pytest.raises(InputError, match="no dtype 'int8'; choose one of bf16, fp16, fp32 with --dtype"):
        dtype_name("int8")
