"""What every operator's formulas must satisfy, forward and backward, at any shape."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import attrs
import numpy as np
import pytest
import sympy
from hypothesis import given
from hypothesis import strategies as st

from analytic.cost import COST_COLUMNS, FP32, MODEL_DTYPES, ZERO, Cost, Dtype
from analytic.operators import COUNTED, OPERATORS, Operator

Shape: TypeAlias = dict[str, Any]
Pass: TypeAlias = Callable[..., Cost]

#: What a parameter may be, by its annotation. Sizes are positive: zero stands for a part that is left out.
SIZES = st.integers(1, 40)
KINDS = {
    "Size": SIZES,
    "Dtype": st.sampled_from(list(MODEL_DTYPES.values())),
    "bool": st.booleans(),
    "int": st.integers(0, 3),
    "Counted": st.sampled_from(COUNTED),
}
#: Sizes that are part of another one.
WITHIN = {
    "kv_cache_append": {"added": "cached"},
    "cat": {"weights": "elements"},
    "copy": {"weights": "elements"},
    "cast": {"weights": "elements"},
    "gather": {"weights": "rows"},
    "masked_scatter": {"selected": "positions"},
    "pad": {"source_elements": "target_elements"},
    "reduction": {"results": "elements"},
    "topk": {"k": "width"},
    # A causal kernel's triangle has as many keys as queries, or more.
    "sdpa": {"queries": "keys"},
}
#: What grows with the number of images, prompts or positions; all of it together.
BATCH = {
    "conv2d": ("images",),
    "bmm": ("batch",),
    "sdpa": ("heads",),
    "sdpa_with_bias": ("heads",),
    "attention_eager": ("heads",),
    "causal_mask": ("heads",),
    "rope_tables": ("positions",),
    "rope_apply": ("pairs", "table_pairs"),
    "layer_norm_2d": ("pixels",),
    "reduction": ("elements", "results"),
    "interpolate": ("source_elements", "target_elements"),
    "masked_scatter": ("positions", "selected"),
    "kv_cache_append": ("cached", "added"),
    "pad": ("source_elements", "target_elements"),
    **dict.fromkeys(("linear", "embedding", "layer_norm", "rms_norm", "softmax"), ("rows",)),
    **dict.fromkeys(("topk", "gather", "scatter", "index_put"), ("rows",)),
    **dict.fromkeys(("gelu", "quick_gelu", "silu", "swiglu", "elementwise"), ("elements",)),
    **dict.fromkeys(("sort", "cat", "copy", "cast", "fill", "to_host"), ("elements",)),
    "view": (),
    "host_loop": ("turns",),
}
#: Sizes of which a formula holds the square; it is linear in all others.
SQUARED = {"conv2d": {"kernel", "in_side", "out_side"}, "sdpa": {"queries"}}
#: What keeps the host busy and leaves nothing on the device.
ON_HOST = {"view", "host_loop", "to_host"}

each_operator = pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS)
each_pass = pytest.mark.parametrize("direction", ["forward", "backward"])


def sizes_of(operator: Operator) -> list[str]:
    return [name for name, parameter in operator.signature.parameters.items() if parameter.annotation == "Size"]


def fitting(operator: Operator, shape: Shape) -> Shape:
    """The shape, with no part larger than its whole."""
    parts = WITHIN.get(operator.name, {})
    return shape | {part: min(shape[part], shape[whole]) for part, whole in parts.items() if part in shape}


@st.composite
def shapes(draw: st.DrawFn, operator: Operator, count: int = 1) -> list[Shape]:
    """Arguments that differ only in sizes; what has a default is sometimes left out."""
    parameters = operator.signature.parameters.values()
    given_ones = [p for p in parameters if p.default is p.empty or draw(st.booleans())]
    common = {p.name: draw(KINDS[p.annotation]) for p in given_ones if p.annotation != "Size"}
    sizes = [p.name for p in given_ones if p.annotation == "Size"]
    return [fitting(operator, common | {name: draw(SIZES) for name in sizes}) for _ in range(count)]


def evaluated(operator: Operator, direction: str, shape: Shape) -> Cost:
    return operator(**shape).cost if direction == "forward" else operator.backward_cost(**shape)


def numbers(cost: Cost) -> dict[str, Any]:
    """Every number of a cost: its columns, and its bytes by dtype."""
    traffic = {"read": cost.read, "written": cost.written}
    by_dtype = {f"{way} {name}": size for way, moved in traffic.items() for name, size in moved.by_dtype.items()}
    return cost.columns() | by_dtype


def columns(operator: Operator, of_each: list[Shape], kind: type[np.number]) -> Shape:
    """Many shapes as one: arrays for the sizes."""
    sizes = [name for name in of_each[0] if name in sizes_of(operator)]
    return of_each[0] | {name: np.array([shape[name] for shape in of_each], dtype=kind) for name in sizes}


def symbols(operator: Operator, shape: Shape) -> tuple[Shape, dict[sympy.Symbol, int]]:
    """A shape in symbols, bytes per element too, and what they stand for.

    The type in which norms and softmaxes compute anyway stays as it is: a cast to it is no work.
    """
    symbolic, values = dict(shape), {}
    for name, value in shape.items():
        if name in sizes_of(operator):
            symbolic[name] = sympy.Symbol(name, integer=True, positive=True)
            values[symbolic[name]] = value
        elif isinstance(value, Dtype) and value != FP32:
            symbolic[name] = Dtype(value.name, sympy.Symbol(value.name, integer=True, positive=True))
            values[symbolic[name].bytes] = value.bytes
    return symbolic, values


@each_pass
@each_operator
@given(data=st.data())
def test_ints_arrays_and_symbols_agree(operator: Operator, direction: str, data: st.DataObject) -> None:
    drawn = data.draw(shapes(operator, count=3))
    symbolic, values = symbols(operator, drawn[0])
    expected = [numbers(evaluated(operator, direction, shape)) for shape in drawn]
    assert all(type(value) is int for row in expected for value in row.values())
    for kind in (np.int64, np.float64):
        found = numbers(evaluated(operator, direction, columns(operator, drawn, kind)))
        assert found.keys() == expected[0].keys()
        for name, value in found.items():
            assert np.broadcast_to(value, 3).tolist() == [row[name] for row in expected], (name, kind)
    found = numbers(evaluated(operator, direction, symbolic))
    assert {name: sympy.sympify(value).subs(values) for name, value in found.items()} == expected[0]


@each_pass
@each_operator
@given(data=st.data())
def test_parts_are_no_larger_than_their_whole(operator: Operator, direction: str, data: st.DataObject) -> None:
    (shape,) = data.draw(shapes(operator))
    cost = evaluated(operator, direction, shape)
    assert all(value >= 0 for value in numbers(cost).values())
    assert cost.weight_bytes <= cost.bytes_read
    assert cost.activation_bytes <= cost.bytes_written
    assert cost.kv_cache_bytes <= cost.bytes_written
    assert cost.bytes_total == cost.bytes_read + cost.bytes_written
    leaves_nothing = operator.name in ON_HOST or (operator.name == "cast" and shape["source"] == shape["target"])
    if direction == "forward":
        assert (cost.activation_bytes == 0) == leaves_nothing


@each_pass
@each_operator
@given(data=st.data(), more=SIZES)
def test_a_larger_size_costs_no_less(operator: Operator, direction: str, data: st.DataObject, more: int) -> None:
    """Without exception, as long as a part stays within its whole."""
    (shape,) = data.draw(shapes(operator))
    before = evaluated(operator, direction, shape).columns()
    for name in set(sizes_of(operator)) & shape.keys():
        grown = fitting(operator, shape | {name: shape[name] + more})
        after = evaluated(operator, direction, grown).columns()
        assert all(after[column] >= before[column] for column in COST_COLUMNS), name


@each_operator
@given(data=st.data())
def test_equal_calls_are_evaluated_once(operator: Operator, data: st.DataObject) -> None:
    (shape,) = data.draw(shapes(operator))
    assert operator(**shape) is operator(**shape)


@each_operator
@given(data=st.data(), times=SIZES)
def test_steps_add_up(operator: Operator, data: st.DataObject, times: int) -> None:
    one, other = data.draw(shapes(operator, count=2))
    first, second = operator(**one), operator(**other)
    both = first + second
    assert both.cost == first.cost + second.cost
    assert both.backward == operator.backward_cost(**other) + operator.backward_cost(**one)
    assert (both * times).cost == both.cost * times
    assert (both * times).backward == both.backward * times
    assert numbers(both.cost * times) == {name: value * times for name, value in numbers(both.cost).items()}
    assert both.handing_on(1).cost == attrs.evolve(both.cost, activation_bytes=1)
    assert [call.arguments | one for call in first.calls] == [call.arguments for call in first.calls]


@each_operator
@given(data=st.data())
def test_an_operator_that_runs_as_several_costs_what_they_cost(operator: Operator, data: st.DataObject) -> None:
    (shape,) = data.draw(shapes(operator))
    (call,) = operator(**shape).calls
    if call.parts is None:
        return
    apart = sum((part.operator(**part.arguments).cost * part.times for part in call.parts.calls), start=ZERO)
    handed_on = operator(**shape).cost.activation_bytes
    assert operator(**shape).cost == attrs.evolve(apart, activation_bytes=handed_on)
    assert handed_on <= apart.activation_bytes


def once(operator: Operator, shape: Shape) -> tuple[int, int]:
    """Bytes read and written once, however large the batch is: weights, and what all of the batch share."""
    item = shape["dtype"].bytes if "dtype" in shape else 0
    match operator.name:
        case "embedding":  # only the rows that are looked up
            return 0, 0
        case "causal_mask":  # filled, copied, read
            mask = shape["queries"] * shape["keys"] * item
            return 2 * mask, 2 * mask
        case "rope_tables":  # frequencies, cast first
            frequencies = shape["half_dim"]
            cast = shape["dtype"] != FP32
            return frequencies * (cast * item + FP32.bytes), frequencies * cast * FP32.bytes
        case "elementwise":
            return (shape.get("weights", 0) + shape.get("shared", 0)) * item, 0
    return operator(**shape).cost.weight_bytes, 0


@each_operator
@given(data=st.data())
def test_twice_the_batch(operator: Operator, data: st.DataObject) -> None:
    """Twice the arithmetic and the results; weights and what the batch shares are moved once."""
    (shape,) = data.draw(shapes(operator))
    if operator.name != "elementwise":
        shape.pop("weights", None)
    doubled = shape | {name: 2 * shape[name] for name in BATCH[operator.name]}
    one, two = operator(**shape).cost, operator(**doubled).cost
    read, written = once(operator, shape)
    assert two.tensor_flops == 2 * one.tensor_flops
    assert two.vector_flops == 2 * one.vector_flops
    assert two.bytes_read - read == 2 * (one.bytes_read - read)
    assert two.bytes_written - written == 2 * (one.bytes_written - written)
    assert two.activation_bytes == 2 * one.activation_bytes
    assert two.kv_cache_bytes == 2 * one.kv_cache_bytes
    assert two.weight_bytes == one.weight_bytes * (2 if operator.name == "embedding" else 1)
    back, back_of_two = operator.backward_cost(**shape), operator.backward_cost(**doubled)
    assert back_of_two.tensor_flops == 2 * back.tensor_flops
    assert back_of_two.vector_flops == 2 * back.vector_flops


def polynomials(operator: Operator, direction: str, shape: Shape) -> Iterator[tuple[sympy.Symbol, sympy.Poly]]:
    symbolic, _ = symbols(operator, shape)
    sizes = [symbolic[name] for name in sizes_of(operator) if name in symbolic]
    if not sizes:
        return
    for value in numbers(evaluated(operator, direction, symbolic)).values():
        polynomial = sympy.Poly(sympy.expand(value), *sizes)
        yield from ((size, polynomial) for size in sizes)


@each_pass
@each_operator
@given(data=st.data())
def test_formulas_are_linear_in_every_size(operator: Operator, direction: str, data: st.DataObject) -> None:
    """But for the sides of images and kernels, and the triangle of a causal kernel."""
    (shape,) = data.draw(shapes(operator))
    for size, polynomial in polynomials(operator, direction, shape):
        most = 2 if size.name in SQUARED.get(operator.name, ()) else 1
        assert polynomial.degree(size) <= most, size


@pytest.mark.parametrize("name", ["sdpa", "sdpa_with_bias", "attention_eager"])
@each_pass
@given(data=st.data())
def test_attention_is_quadratic_in_the_sequence(name: str, direction: str, data: st.DataObject) -> None:
    (shape,) = data.draw(shapes(OPERATORS[name]))
    shape.pop("counted", None)
    longer = shape | {"queries": 2 * shape["queries"], "keys": 2 * shape["keys"]}
    one, two = (evaluated(OPERATORS[name], direction, each) for each in (shape, longer))
    assert two.tensor_flops == 4 * one.tensor_flops > 0
    assert two.vector_flops == 4 * one.vector_flops
    if name == "sdpa":
        assert two.bytes_total == 2 * one.bytes_total


@given(data=st.data())
def test_a_wider_kernel_is_quadratic(data: st.DataObject) -> None:
    conv2d = OPERATORS["conv2d"]
    (shape,) = data.draw(shapes(conv2d))
    one, wider = (conv2d(**shape | {"kernel": kernel, "bias": False}).cost for kernel in (3, 6))
    assert wider.tensor_flops == 4 * one.tensor_flops
    assert wider.weight_bytes == 4 * one.weight_bytes
    assert wider.written == one.written


@each_operator
def test_every_formula_documents_itself_and_its_parameters(operator: Operator) -> None:
    text = operator.__doc__ or ""
    assert text.partition("Parameters")[0].strip()
    for name in operator.signature.parameters:
        assert name in text.partition("Parameters")[2], name
