"""What the analytic engine knows: operators by name, layers by module class."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

import attrs

from analytic.families.base import OTHER
from analytic.operators import OPERATORS
from dsocr_trace.report.console import plain_table, result_console
from dsocr_trace.report.units import percent

if TYPE_CHECKING:
    from analytic.model import Model
    from dsocr_trace.verification.live_layers import LiveModel


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


def print_live_layers(model: LiveModel, differences: list[str]) -> None:
    """Print the classes of a live model, the layers that stand for them, and what changed since the snapshot."""
    table = plain_table("Module classes of the live model and the layers that stand for them", "Class")
    table.add_column("Instances", justify="right")
    table.add_column("Parameters", justify="right")
    table.add_column("Direct children")
    table.add_column("Layers")
    for row in model.classes:
        shape = row.shape
        layers = [
            f"{OTHER} ({percent(own / model.parameters)} of all parameters)" if name == OTHER else name
            for name, own in row.layers.items()
        ]
        children = ", ".join(f"{count:,} {name}" for name, count in shape.children.items())
        table.add_row(
            row.module_class, f"{shape.instances:,}", f"{shape.parameters:,}", children or "-", ", ".join(layers)
        )
    console = result_console()
    console.print(table)
    for line in differences:
        console.print(line, markup=False, soft_wrap=True)
    if model.variant is None:
        console.print("no snapshot of this model family: nothing to compare with")
    else:
        console.print(f"differences from the snapshot of {model.variant}: {len(differences) or 'none'}")


def print_operators() -> None:
    """Print the operators that costs are made of."""
    table = plain_table("Operators that costs are made of", "Operator", "What it is")
    for row in operator_rows():
        table.add_row(*row)
    result_console().print(table)
