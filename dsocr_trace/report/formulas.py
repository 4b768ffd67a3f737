"""Formulas of the operators as text: each operator is evaluated with symbols instead of sizes."""

from __future__ import annotations

import itertools
import re
from typing import TYPE_CHECKING, Any, Final

import attrs
import numpy as np
import sympy

from analytic.cost import Dtype
from analytic.operators import COUNTED

if TYPE_CHECKING:
    import inspect
    from collections.abc import Iterator, Mapping

    from analytic.cost import Cost
    from analytic.operators import Operator, OperatorCall

#: Values of a parameter that is an option, by its annotation.
_OPTIONS: Final = {"bool": (False, True), "Counted": COUNTED}
#: In front of a symbol's name: its place among the parameters, which sympy sorts by.
_PLACE: Final = re.compile(r"\b\d\d:")


#: Bytes per element stand behind the sizes.
_BYTES_LAST: Final = 50


@attrs.frozen
class Formula:
    """One number of an operator's cost.

    Attributes
    ----------
    quantity
        Column of the cost; with the dtype behind it where it is a part of the bytes.
    when
        Parameters and the values for which it holds; empty where it always does.
    expression
        In symbols that have the parameters' names.
    """

    quantity: str
    when: Mapping[str, Any]
    expression: sympy.Expr


def formulas(operator: Operator, *, backward: bool = False) -> list[Formula]:
    """All formulas of an operator, without those that are always zero.

    A number that depends on an option has one formula for each of its values. One that is different where optional
    sizes are left out has that formula first.
    """
    choices = list(_choices(operator))
    cases = [evaluated(operator, case, backward=backward) for case in choices]
    optional = _optional_sizes(operator)
    found = []
    for quantity in dict.fromkeys(itertools.chain.from_iterable(cases)):
        expressions = [case.get(quantity, sympy.Integer(0)) for case in cases]
        if not any(expressions):
            continue
        same = all(expression == expressions[0] for expression in expressions)
        for choice, expression in zip(choices, expressions, strict=True):
            when = {} if same else choice
            if optional:
                without = evaluated(operator, choice | optional, backward=backward).get(quantity, sympy.Integer(0))
                if simplest(_left_out(expression, operator)) != without:
                    found.append(Formula(quantity, when | optional, without))
            found.append(Formula(quantity, when, expression))
            if same:
                break
    return found


def evaluated(operator: Operator, fixed: Mapping[str, Any], *, backward: bool = False) -> dict[str, sympy.Expr]:
    """Numbers of an operator by quantity, with symbols for all parameters that are not `fixed`."""
    arguments = symbols(operator) | dict(fixed)
    cost = operator.backward_cost(**arguments) if backward else operator(**arguments).cost
    return {quantity: simplest(sympy.sympify(value)) for quantity, value in quantities(cost).items()}


def of_call(operator: Operator, arguments: Mapping[str, Any]) -> dict[str, sympy.Expr]:
    """Formulas that one call used, by quantity, without zeros: its options are chosen, and what is left out is gone."""
    fixed = {name: value for name, value in arguments.items() if _annotation(operator, name) in _OPTIONS}
    fixed |= {name: 0 for name in _optional_sizes(operator) if isinstance(arguments[name], int) and not arguments[name]}
    # Types that are equal in the call are equal in the formula: a cast to the same type is no work.
    first: dict[Dtype, Dtype] = {}
    for name, symbol in symbols(operator).items():
        if isinstance(symbol, Dtype):
            fixed[name] = first.setdefault(arguments[name], symbol)
    found = evaluated(operator, fixed)
    return {quantity: expression for quantity, expression in found.items() if expression}


def values(operator: Operator, arguments: Mapping[str, Any]) -> dict[sympy.Symbol, Any]:
    """What the symbols of an operator's formulas stand for in one call."""
    found = {}
    for name, symbol in symbols(operator).items():
        if isinstance(symbol, Dtype):
            found[symbol.bytes] = arguments[name].bytes
        else:
            found[symbol] = arguments[name]
    return found


def symbols(operator: Operator) -> dict[str, Any]:
    """A symbol for each size of an operator, and a dtype with symbolic bytes for each dtype."""
    found: dict[str, Any] = {}
    for place, (name, parameter) in enumerate(operator.signature.parameters.items()):
        if parameter.annotation == "Dtype":
            found[name] = Dtype(name, _symbol(_BYTES_LAST + place, "b" if name == "dtype" else f"b_{name}"))
        elif parameter.annotation not in _OPTIONS:
            found[name] = _symbol(place, name)
    return found


def option_values(parameter: inspect.Parameter) -> tuple[Any, ...]:
    """Values that a parameter may have; none for a size or a dtype."""
    return _OPTIONS.get(parameter.annotation, ())


def given_arguments(operator: Operator, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments that are not the default ones."""
    defaults = {name: given.default for name, given in operator.signature.parameters.items()}
    return {name: value for name, value in arguments.items() if np.any(value != defaults[name])}


def parts(operator: Operator) -> tuple[OperatorCall, ...]:
    """The operators that one runs as, with their arguments in symbols; empty for a primitive."""
    (call,) = operator(**symbols(operator)).calls
    return call.parts.calls if call.parts else ()


def quantities(cost: Cost) -> dict[str, Any]:
    """Numbers of a cost by column; bytes of several dtypes also by dtype."""
    found: dict[str, Any] = {}
    for column, value in cost.columns().items():
        found[column] = value
        traffic = {"bytes_read": cost.read, "bytes_written": cost.written}.get(column)
        if traffic and len(traffic.by_dtype) > 1:
            found |= {f"{column}, {dtype}": size for dtype, size in sorted(traffic.by_dtype.items())}
    return found


def plain(expression: Any) -> str:
    """An expression, symbolic or a number, as text that Python could read."""
    return _PLACE.sub("", str(expression))


def latex(expression: Any) -> str:
    """An expression as LaTeX, names upright and products with a dot."""
    expression = sympy.sympify(expression)
    names = {symbol: _latex_name(_name(symbol)) for symbol in expression.free_symbols}
    text: str = sympy.latex(expression, symbol_names=names, mul_symbol="dot")
    return text


def simplest(expression: sympy.Expr) -> sympy.Expr:
    """The shortest of the usual forms of an expression."""
    expanded = sympy.expand(expression)
    if not expanded.is_Add:
        return expanded
    # The elements of each dtype, times its bytes.
    dtypes = [symbol for symbol in expanded.free_symbols if _name(symbol).partition("_")[0] == "b"]
    by_dtype = sympy.collect(expanded, sorted(dtypes, key=str), sympy.factor)
    return min((_positive(sympy.factor(expanded)), by_dtype, expanded), key=lambda form: len(plain(form)))


def _positive(product: sympy.Expr) -> sympy.Expr:
    """The product without a minus sign in front, if one of its factors is a sum that can take it."""
    sums = [factor for factor in product.args if factor.is_Add]
    if product.is_Mul and sums and product.as_coeff_Mul()[0].is_negative:
        return -product / sums[0] * sympy.expand(-sums[0])
    return product


def _symbol(place: int, name: str) -> sympy.Symbol:
    return sympy.Symbol(f"{place:02}:{name}", integer=True, positive=True)


def _name(symbol: sympy.Symbol) -> str:
    return plain(symbol)


def _latex_name(name: str) -> str:
    if name.partition("_")[0] == "b":
        letter, _, which = name.partition("_")
        return rf"\text{{{letter}}}_{{\text{{{which}}}}}" if which else rf"\text{{{letter}}}"
    return rf"\text{{{name}}}"


def _parameter(operator: Operator, name: str) -> inspect.Parameter:
    return operator.signature.parameters[name]


def _annotation(operator: Operator, name: str) -> Any:
    return _parameter(operator, name).annotation


def _optional_sizes(operator: Operator) -> dict[str, int]:
    """Sizes that are zero if not given."""
    found = operator.signature.parameters.items()
    return {name: 0 for name, given in found if given.annotation == "Size" and given.default == 0}


def _left_out(expression: sympy.Expr, operator: Operator) -> sympy.Expr:
    found = symbols(operator)
    return expression.subs({found[name]: 0 for name in _optional_sizes(operator)})


def _choices(operator: Operator) -> Iterator[dict[str, Any]]:
    """Every combination of the values of the options."""
    options = {
        name: _OPTIONS[given.annotation]
        for name, given in operator.signature.parameters.items()
        if given.annotation in _OPTIONS
    }
    return (dict(zip(options, chosen, strict=True)) for chosen in itertools.product(*options.values()))
