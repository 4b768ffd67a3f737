"""Every formula gives the same numbers for ints, arrays and symbols."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable
from typing import Any, TypeAlias

import attrs
import numpy as np
import pytest
import sympy

from analytic import operators as op
from analytic.cost import Cost, dtype_name
from analytic.errors import InputError

Formula: TypeAlias = Callable[..., Cost]

#: Parameters that are not sizes: item sizes and counts that the operator's kind fixes.
FIXED = {"item": 2, "source_item": 2, "target_item": 4, "operands": 2, "flops": 3, "taps": 16, "bias": True}
FORMULAS = [getattr(op, name) for name in op.__all__]


def sizes_of(formula: Formula) -> list[str]:
    return [name for name in inspect.signature(formula).parameters if name not in FIXED]


def evaluate(formula: Formula, sizes: dict[str, Any]) -> Cost:
    fixed = {name: FIXED[name] for name in inspect.signature(formula).parameters if name in FIXED}
    return formula(**sizes, **fixed)


@pytest.mark.parametrize("formula", FORMULAS, ids=lambda formula: formula.__name__)
def test_ints_arrays_and_symbols_agree(formula: Formula) -> None:
    rng = random.Random(formula.__name__)  # noqa: S311  only shapes
    shapes = [{name: rng.randint(1, 40) for name in sizes_of(formula)} for _ in range(4)]
    columns = {name: np.array([shape[name] for shape in shapes], dtype=np.int64) for name in sizes_of(formula)}
    symbols = {name: sympy.Symbol(name, integer=True, positive=True) for name in sizes_of(formula)}
    by_array = evaluate(formula, columns)
    by_symbol = evaluate(formula, symbols)
    for index, shape in enumerate(shapes):
        by_int = evaluate(formula, shape)
        for field in attrs.fields(Cost):
            expected = getattr(by_int, field.name)
            assert isinstance(expected, int)
            array = np.broadcast_to(getattr(by_array, field.name), len(shapes))
            assert array[index] == expected, field.name
            substituted = sympy.sympify(getattr(by_symbol, field.name)).subs(
                {symbols[name]: value for name, value in shape.items()}
            )
            assert substituted == expected, field.name


@pytest.mark.parametrize("formula", FORMULAS, ids=lambda formula: formula.__name__)
def test_weights_are_part_of_what_is_read(formula: Formula) -> None:
    cost = evaluate(formula, dict.fromkeys(sizes_of(formula), 3))
    assert 0 <= cost.weight_bytes <= cost.bytes_read
    assert 0 < cost.activation_bytes <= cost.bytes_written


@pytest.mark.parametrize("formula", FORMULAS, ids=lambda formula: formula.__name__)
def test_every_formula_documents_itself(formula: Formula) -> None:
    assert formula.__doc__


def test_linear_by_hand() -> None:
    assert op.linear(5, 3, 4, 2, bias=True) == Cost(
        tensor_flops=2 * 5 * 3 * 4,
        vector_flops=20,
        bytes_read=(15 + 12 + 4) * 2,
        bytes_written=40,
        weight_bytes=32,
        activation_bytes=40,
    )


def test_conv2d_by_hand() -> None:
    cost = op.conv2d(2, 3, 4, 3, 8, 4, 4)
    assert cost.tensor_flops == 2 * (2 * 4 * 4 * 4) * (3 * 3 * 3)
    assert cost.bytes_read == (2 * 3 * 64 + 4 * 27) * 4
    assert cost.bytes_written == 2 * 4 * 16 * 4


def test_attention_costs_the_same_products_fused_or_not() -> None:
    shape = {"heads": 10, "queries": 7, "keys": 9, "head_dim": 16, "item": 2}
    fused, biased, eager = op.sdpa(**shape), op.sdpa_with_bias(**shape), op.attention_eager(**shape)
    assert fused.tensor_flops == biased.tensor_flops == eager.tensor_flops == 4 * 10 * 7 * 9 * 16
    assert biased.bytes_read - fused.bytes_read == 10 * 7 * 9 * 2
    assert eager.bytes_total > biased.bytes_total > fused.bytes_total


def test_cast_to_the_same_dtype_is_no_work() -> None:
    assert op.cast(100, 4, 4) == Cost()


def test_cost_sums_over_calls() -> None:
    cost = Cost(tensor_flops=np.array([1, 2, 3]), bytes_read=5)
    assert cost.over(3) == Cost(tensor_flops=6, bytes_read=15)


@pytest.mark.parametrize(("given", "name"), [("bf16", "bfloat16"), ("fp32", "float32"), ("float16", "float16")])
def test_dtype_names(given: str, name: str) -> None:
    assert dtype_name(given) == name


def test_unknown_dtype() -> None:
    with pytest.raises(InputError, match="no dtype 'int8'; choose one of bf16, fp16, fp32 with --dtype"):
        dtype_name("int8")
