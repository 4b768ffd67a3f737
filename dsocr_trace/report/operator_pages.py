"""The page of an operator: what it costs, why, and where the model runs it."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any, Final

import analytic.operators
from analytic.cost import Dtype
from analytic.model import STAGES
from analytic.operators import OPERATORS
from dsocr_trace.forecasts.explain import ROOT, summarised
from dsocr_trace.report.docstrings import Docstring, docstring
from dsocr_trace.report.formulas import formulas, given_arguments, option_values, parts, plain, quantities, symbols
from dsocr_trace.report.pieces import count, linked, page, table
from dsocr_trace.report.usage import WORKLOAD, Usage, WorkedCall, composites

if TYPE_CHECKING:
    import inspect
    from collections.abc import Callable

    from analytic.operators import Operator

_FROM_SUMMARY: Final = "The formulas follow from the first sentence alone."
_NONE: Final = "It has no gradient: nothing runs backward."


def operator_page(operator: Operator, usage: Usage, math: Callable[[Any], str]) -> str:
    """Page of one operator, as Markdown.

    Parameters
    ----------
    operator
        Which operator.
    usage
        Where it runs.
    math
        Renders an expression.
    """
    described = docstring(operator)
    return page(
        f"# `{operator.name}`",
        linked(described.summary, OPERATORS, operator.name),
        "## Parameters",
        _parameters(operator, described),
        "## Forward",
        _formulas(operator, math, backward=False),
        _legend(operator),
        "## Backward",
        _backward(operator, math),
        "## Derivation",
        _derivation(operator, described, math),
        "## Assumptions",
        _assumptions(operator),
        "## Worked number",
        _worked(usage.worked(operator), usage),
        "## Where it runs",
        _runs(operator, usage),
    )


def operator_index() -> str:
    """Page that lists all operators, one line each."""
    rows = [
        (f"[`{name}`]({name}.md)", linked(docstring(found).summary, OPERATORS)) for name, found in OPERATORS.items()
    ]
    return page(
        "# Operators",
        "What costs are made of. Each formula is written once, in `analytic/operators/`; these pages evaluate it, with "
        "symbols for the general case and with numbers for the worked one. [Cost model](../cost-model.md) has the "
        "conventions, [Layers](../layers/index.md) which operators each module runs.",
        table(("Operator", "What it is"), rows),
    )


def _parameters(operator: Operator, described: Docstring) -> str:
    rows = [
        (f"`{name}`", _kind(given), linked(described.entries.get(name, ""), OPERATORS, operator.name))
        for name, given in operator.signature.parameters.items()
    ]
    return table(("Parameter", "Kind", "Meaning"), rows) if rows else "It takes none."


def _kind(given: inspect.Parameter) -> str:
    options = option_values(given)
    kind = " or ".join(f"`{value}`" for value in options) if options else _KINDS[given.annotation]
    return kind if given.default is given.empty else f"{kind}; default `{given.default}`"


_KINDS: Final = {"Size": "size", "int": "number", "Dtype": "dtype"}


def _formulas(operator: Operator, math: Callable[[Any], str], *, backward: bool) -> str:
    rows: list[tuple[str, str]] = []
    before = ""
    for formula in formulas(operator, backward=backward):
        column, _, dtype = formula.quantity.partition(", ")
        named = f"… of which `{dtype}`" if dtype else f"`{column}`"
        when = ", ".join(f"`{name}={value}`" for name, value in formula.when.items())
        if when:
            named += f"<br>with {when}"
        elif formula.quantity == before:
            named += "<br>otherwise"
        rows.append((named, math(formula.expression)))
        before = formula.quantity
    return table(("Number", "Formula"), rows) if rows else "It costs nothing."


def _legend(operator: Operator) -> str:
    dtypes = [(name, symbol) for name, symbol in symbols(operator).items() if isinstance(symbol, Dtype)]
    meanings = [f"`{plain(symbol.bytes)}` is the bytes of one element of `{name}`." for name, symbol in dtypes]
    return " ".join([*meanings, "Numbers that are not listed are zero."])


def _backward(operator: Operator, math: Callable[[Any], str]) -> str:
    if not formulas(operator, backward=True):
        reason = linked(_backward_docstring(operator).summary, OPERATORS)
        return f"{_NONE} {reason}".strip()
    return _formulas(operator, math, backward=True)


def _backward_docstring(operator: Operator) -> Docstring:
    return docstring(operator.backward_formula)


def _derivation(operator: Operator, described: Docstring, math: Callable[[Any], str]) -> str:
    paragraphs = [linked(described.prose, OPERATORS, operator.name), _parts(operator, math)]
    written = _backward_docstring(operator)
    if formulas(operator, backward=True):
        through = "Through the same operators in reverse, each with its own backward formula."
        paragraphs.append(f"**Backward.** {linked(written.summary, OPERATORS) or through}")
        paragraphs.append(linked(written.prose, OPERATORS))
    return page(*paragraphs).strip() or _FROM_SUMMARY


def _parts(operator: Operator, math: Callable[[Any], str]) -> str:
    """Table of the operators that a composite runs as."""
    rows = []
    for call in parts(operator):
        given = ", ".join(
            f"`{name}` = {f'`{value.name}`' if isinstance(value, Dtype) else math(value)}"
            for name, value in given_arguments(call.operator, call.arguments).items()
        )
        rows.append((f"[`{call.operator.name}`]({call.operator.name}.md)", math(call.times), given))
    if not rows:
        return ""
    return f"Forward, it runs as these operators, one after the other:\n\n{table(('Operator', 'Times', 'With'), rows)}"


def _assumptions(operator: Operator) -> str:
    """Conventions that all operators share, as the package states them, and what follows for composites."""
    bullets = docstring(analytic.operators).sections["Conventions"].replace("\n  ", " ").splitlines()
    conventions = "\n".join(bullet for bullet in bullets if not bullet.startswith("* Sizes"))
    if parts(operator):
        conventions += "\n* Tensors between its parts are written and read; only the result is handed on."
    return conventions


def _worked(worked: WorkedCall, usage: Usage) -> str:
    if worked.operation is None:
        where = "The model does not run it. A small example instead:"
    else:
        operation = worked.operation
        node = usage.nodes[operation.module_path]
        eager = "" if worked.attention == next(iter(usage.works)) else f" with {worked.attention} attention"
        where = (
            f"Its heaviest call at `{WORKLOAD}`{eager} is `{operation.name}` of `{operation.module_path or ROOT}` "
            f"([{node.analytic_layer}](../layers/{node.analytic_layer}.md)) in {operation.stage}:"
        )
    arguments = ", ".join(f"`{name}={summarised(value)}`" for name, value in worked.arguments.items())
    forward, backward = quantities(worked.cost), quantities(worked.backward_cost)
    rows = [
        (f"`{name}`", count(forward[name]), count(backward[name]))
        for name in worked.cost.columns()
        if forward[name] or backward[name]
    ]
    numbers = table(("Number", "Forward", "Backward"), rows, right=2) if rows else "All numbers are zero."
    return page(where, arguments, numbers)


def _runs(operator: Operator, usage: Usage) -> str:
    found: dict[tuple[str, str, str], dict[str, int]] = defaultdict(lambda: dict.fromkeys(STAGES, 0))
    for attention, operation, line in usage.lines.get(operator.name, []):
        usual = attention == next(iter(usage.works))
        key = (usage.nodes[operation.module_path].analytic_layer, operation.name, attention)
        if usual or operation.name not in {name for _, name, how in found if how != attention}:
            found[key][operation.stage] += line.calls
    rows = [
        (f"[{layer}](../layers/{layer}.md)", f"`{name}`", attention, *(count(calls[stage]) for stage in STAGES))
        for (layer, name, attention), calls in found.items()
    ]
    inside = ", ".join(f"[`{name}`]({name}.md)" for name in composites().get(operator.name, []))
    return page(
        f"Calls at `{WORKLOAD}`, over all modules of a layer:" if rows else "No layer of the model runs it by itself.",
        table(("Layer", "As", "Attention", *(stage.capitalize() for stage in STAGES)), rows, right=3) if rows else "",
        f"It is also a part of {inside}." if inside else "",
    )
