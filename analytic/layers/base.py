"""What a layer is, and where its operators are noted down."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Final, Generic, TypeVar

import attrs

from analytic.cost import DTYPE_BYTES, Cost

if TYPE_CHECKING:
    from collections.abc import Iterator

#: Kinds of operators that predictions and measurements are summed by.
OPERATOR_CATEGORIES: Final = (
    "conv",
    "linear",
    "attention",
    "norm",
    "activation",
    "embedding",
    "routing",
    "elementwise",
    "reduction",
    "copy",
    "other",
)


@attrs.frozen
class Layer:
    """One module. Fields that hold layers are its children, in the order in which the model registers them.

    A subclass adds ``forward(at, ...)``, which takes sizes instead of tensors, notes the layer's own operators at
    `at`, and calls its children.
    """

    #: Class of the module in the published model.
    module_class: ClassVar[str]
    #: Name of the layer in the analytic model; None stands for the name of the Python class.
    layer_name: ClassVar[str | None] = None

    @property
    def analytic_layer(self) -> str:
        """Name of the layer in the analytic model."""
        return self.layer_name or type(self).__name__

    def children(self) -> Iterator[tuple[str, Layer]]:
        """Names and layers of the direct children."""
        for field in attrs.fields(type(self)):
            value = getattr(self, field.name)
            if isinstance(value, Layer):
                yield field.name, value

    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the parameters that the layer itself owns."""
        return {}


SomeLayer = TypeVar("SomeLayer", bound=Layer)


@attrs.frozen
class LayerList(Layer, Generic[SomeLayer]):
    """Numbered layers. The list itself is never called."""

    module_class: ClassVar[str] = "ModuleList"
    layers: tuple[SomeLayer, ...]

    def children(self) -> Iterator[tuple[str, Layer]]:
        """Layers by their number."""
        return ((str(index), layer) for index, layer in enumerate(self.layers))


@attrs.frozen
class OperatorRuns:
    """One operator of one module: what each of its calls costs.

    Attributes
    ----------
    operator_category
        One of `OPERATOR_CATEGORIES`.
    compute_dtype
        Dtype in which the operator computes.
    runs
        Pairs of a number of calls and their cost; fields of the cost are either arrays with one entry per call, or
        the same for each of them.
    """

    operator_category: str
    compute_dtype: str
    runs: list[tuple[int, Cost]] = attrs.field(factory=list)


@attrs.frozen
class Tape:
    """All calls and operators of one stage, in order of first appearance.

    Attributes
    ----------
    dtype
        Dtype of the model.
    attention
        How the decoder attends: sdpa, eager or flash_attention_2.
    calls
        Forward calls by module path.
    operators
        Operators by module path and name.
    """

    dtype: str
    attention: str
    calls: dict[str, int] = attrs.field(factory=dict)
    operators: dict[tuple[str, str], OperatorRuns] = attrs.field(factory=dict)

    def at(self, path: str, forwards: int) -> Scope:
        """Scope of the module at `path`, without counting a call of it."""
        return Scope(self, path, forwards)

    def enter(self, forwards: int) -> Scope:
        """Scope of the root, called in all `forwards`."""
        self.calls[""] = forwards
        return self.at("", forwards)


@attrs.frozen
class Scope:
    """Where a layer notes what it does: its path, and how many of its forwards are evaluated at once.

    Sizes given to a layer are either arrays with one entry per forward, or the same in all `forwards`.
    """

    tape: Tape
    path: str
    forwards: int

    @property
    def item(self) -> int:
        """Bytes per element of the model's dtype."""
        return DTYPE_BYTES[self.tape.dtype]

    def child(self, name: str, forwards: int | None = None) -> Scope:
        """Scope of a child that is called now, in all forwards or in a number of them."""
        path = f"{self.path}.{name}" if self.path else name
        count = self.forwards if forwards is None else forwards
        self.tape.calls[path] = self.tape.calls.get(path, 0) + count
        return Scope(self.tape, path, count)

    def op(self, name: str, category: str, cost: Cost, *, dtype: str | None = None) -> None:
        """Note one operator: its name within the module, its category, its cost, its dtype if not the model's."""
        key = (self.path, name)
        if key not in self.tape.operators:
            self.tape.operators[key] = OperatorRuns(category, dtype or self.tape.dtype)
        self.tape.operators[key].runs.append((self.forwards, cost))
