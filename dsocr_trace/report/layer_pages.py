"""The page of a layer: which module it stands for, what it owns, and which operators its own forward runs."""

from __future__ import annotations

import inspect
import math
from collections import Counter
from typing import TYPE_CHECKING, Final

import attrs

from analytic.cost import total
from analytic.layers.base import Layer
from analytic.model import STAGES
from dsocr_trace.forecasts.explain import ROOT, operator_lines, summarised
from dsocr_trace.report.docstrings import docstring
from dsocr_trace.report.formulas import given_arguments
from dsocr_trace.report.pieces import count, page, table
from dsocr_trace.report.usage import WORKLOAD, Usage

if TYPE_CHECKING:
    from analytic.families.base import ModuleNode
    from analytic.model import Operation

_COST_HEAD: Final = ("As", "Operator", "With", "Calls", "Tensor FLOP", "Vector FLOP", "Bytes")
#: The tables are wide: they get the room of the table of contents.
_FRONT_MATTER: Final = "---\nhide:\n  - toc\n---"


def layer_page(layer: type[Layer], usage: Usage) -> str:
    """Page of one layer, as Markdown.

    Parameters
    ----------
    layer
        Class of the layer.
    usage
        Where it runs.
    """
    example = usage.example(layer.__name__)
    described = docstring(layer)
    modules = [node for node in usage.work.tree if node.analytic_layer == layer.__name__]
    owned = sum(node.parameter_count for node in modules)
    own = count(owned) if owned else "no"
    classes = " or ".join(f"`{name}`" for name, kinds in usage.model.family.layers.items() if layer in kinds)
    standing = (
        f"It stands for the class {classes} of the published model: {count(len(modules))} "
        f"{'module' if len(modules) == 1 else 'modules'} of the base variant. They own {own} "
        f"parameters themselves. The example on this page is `{example.module_path or ROOT}`."
    )
    return page(
        _FRONT_MATTER,
        f"# `{layer.__name__}`",
        described.summary,
        described.prose,
        standing,
        "## Fields",
        _fields(layer, modules, usage),
        "## Weights",
        _weights(example),
        "## Children",
        _children(usage.layers[example.module_path]),
        "## What it runs",
        _forwards(layer),
        *_stages(example, usage),
    )


def layer_index(usage: Usage) -> str:
    """Page that lists all layers, one line each."""
    rows = [
        (f"[{layer.__name__}]({layer.__name__}.md)", f"`{name}`", docstring(layer).summary)
        for name, layers in usage.model.family.layers.items()
        for layer in layers
    ]
    return page(
        "# Layers",
        "What stands for each module class of DeepSeek-OCR: its weights, its children, and the "
        "[operators](../operators/index.md) that its own forward runs. "
        f"Numbers are those of the base variant at `{WORKLOAD}` in bfloat16, with sdpa attention and balanced routing, "
        "per module and over all its calls. `dsocr-trace explain` gives them for every other module and workload.",
        table(("Layer", "Module class", "What it is"), rows),
    )


def _plain_fields(layer: type[Layer], value: Layer) -> dict[str, object]:
    found = {field.name: getattr(value, field.name) for field in attrs.fields(layer)}
    return {name: each for name, each in found.items() if not isinstance(each, (Layer, tuple))}


def _fields(layer: type[Layer], modules: list[ModuleNode], usage: Usage) -> str:
    """Fields with their meaning, and every combination of values that the model has."""
    values = [_plain_fields(layer, usage.layers[node.module_path]) for node in modules]
    names = list(values[0])
    if not names:
        return "It has none besides its children."
    meanings = docstring(layer).entries
    known = [(f"`{name}`", meanings[name]) for name in names if name in meanings]
    number = Counter(tuple(each.values()) for each in values)
    first = {tuple(each.values()): node.module_path for each, node in reversed(list(zip(values, modules, strict=True)))}
    rows = [
        (*(f"{value}" for value in combination), count(modules_with), f"`{first[combination] or ROOT}`")
        for combination, modules_with in number.items()
    ]
    return page(
        table(("Field", "Meaning"), known) if known else "",
        "Values in the base variant:",
        table((*(f"`{name}`" for name in names), "Modules", "First"), rows),
    ).strip()


def _weights(example: ModuleNode) -> str:
    if not example.parameters:
        return "It owns none itself."
    rows = [
        (f"`{name}`", " \N{MULTIPLICATION SIGN} ".join(map(str, shape)), count(math.prod(shape)))
        for name, shape in example.parameters.items()
    ]
    return table(("Weight", "Shape", "Elements"), rows, right=1)


def _children(example: Layer) -> str:
    children = list(example.children())
    if not children:
        return "It has none."
    rows: list[tuple[str, str]] = []
    for name, child in children:
        kind = type(child).__name__
        if name.isdecimal() and rows and rows[-1][1] == kind:  # like ones that follow each other share a line
            rows[-1] = (f"{rows[-1][0].partition(' … ')[0]} … {name}", kind)
        else:
            rows.append((name, kind))
    return table(("Name", "Layer"), [(f"`{names}`", f"[{kind}]({kind}.md)") for names, kind in rows])


def _forwards(layer: type[Layer]) -> str:
    """What its methods that note operators say, in the order of the source."""
    methods = [each for kind in reversed(layer.__mro__) for each in vars(kind).values() if inspect.isfunction(each)]
    noting = [method for method in methods if "at" in inspect.signature(method).parameters]
    return "\n".join(f"- {docstring(method).summary}" for method in noting if docstring(method).summary)


def _stages(example: ModuleNode, usage: Usage) -> list[str]:
    blocks = []
    for stage in STAGES:
        calls = usage.work.calls.get((stage, example.module_path), 0)
        operations = usage.own.get((stage, example.module_path), [])
        if calls or operations:
            blocks += [f"### {stage.capitalize()}", _called(example, calls, operations), _operators(operations)]
    return blocks or ["It is never called by itself: the model calls what is in it."]


def _called(example: ModuleNode, calls: int, operations: list[Operation]) -> str:
    times = f"{count(calls)} {'call' if calls == 1 else 'calls'}"
    if not operations:
        return f"{times}. Its forward only calls its children."
    return f"{times} of `{example.module_path or ROOT}`."


def _operators(operations: list[Operation]) -> str:
    if not operations:
        return ""
    rows = []
    for operation in operations:
        for line in operator_lines(operation):
            given = given_arguments(line.operator, line.arguments)
            arguments = ", ".join(f"`{name}={summarised(value)}`" for name, value in given.items())
            operator = f"[`{line.operator.name}`](../operators/{line.operator.name}.md)"
            operator += f"<br>{operation.operator_category}"
            numbers = (line.calls, line.cost.tensor_flops, line.cost.vector_flops, line.cost.bytes_total)
            rows.append((f"`{line.name}`", operator, arguments, *map(count, numbers)))
    cost = total(operation.cost for operation in operations)
    sums = (cost.tensor_flops, cost.vector_flops, cost.bytes_total)
    rows.append(("**Sum**", "", "", "", *(f"**{count(number)}**" for number in sums)))
    return table(_COST_HEAD, rows, right=4)
