"""What the analytic engine knows: operators by name, layers by module class."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

import attrs

from analytic.operators import OPERATORS
from dsocr_trace.report.console import plain_table, result_console

if TYPE_CHECKING:
    from analytic.model import Model


@attrs.frozen
class LayerRow:
    """One module class of a model and the layers that stand for it."""

    module_class: str
    layers: tuple[str, ...]
    instances: int
    parameters: int


def layer_rows(model: Model) -> list[LayerRow]:
    """Module classes in the order of their first instance."""
    layers: dict[str, dict[str, None]] = defaultdict(dict)
    instances: dict[str, int] = defaultdict(int)
    parameters: dict[str, int] = defaultdict(int)
    for node in model.tree:
        layers[node.module_class][node.analytic_layer] = None
        instances[node.module_class] += 1
        parameters[node.module_class] += node.parameter_count
    return [LayerRow(name, tuple(found), instances[name], parameters[name]) for name, found in layers.items()]


def operator_rows() -> list[tuple[str, str]]:
    """Operators with the first line of their description."""
    return [(name, (operator.__doc__ or "").splitlines()[0]) for name, operator in OPERATORS.items()]


def print_layers(model: Model) -> None:
    """Print the layers of a model."""
    table = plain_table("Module classes and the layers that stand for them", "Class", "Layers")
    table.add_column("Instances", justify="right")
    table.add_column("Parameters", justify="right")
    for row in layer_rows(model):
        table.add_row(row.module_class, ", ".join(row.layers), f"{row.instances:,}", f"{row.parameters:,}")
    result_console().print(table)


def print_operators() -> None:
    """Print the operators that costs are made of."""
    table = plain_table("Operators that costs are made of", "Operator", "What it is")
    for row in operator_rows():
        table.add_row(*row)
    result_console().print(table)
