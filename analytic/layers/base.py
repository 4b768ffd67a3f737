"""What a layer is, and where its operators are noted down."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, Final, Generic, NamedTuple, TypeVar

import attrs

from analytic.cost import MODEL_DTYPES, Dtype, Size

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from analytic.operators import Counted, Steps
    from analytic.routing import ExpertLoad

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

    layers: tuple[SomeLayer, ...]

    def children(self) -> Iterator[tuple[str, Layer]]:
        """Layers by their number."""
        return ((str(index), layer) for index, layer in enumerate(self.layers))


@attrs.frozen
class SequenceShape:
    """Sizes of a decoder's forwards in one stage.

    Attributes
    ----------
    batch
        Prompts per forward.
    positions
        New positions T of each prompt.
    cached
        Positions in the key-value cache after the forward, S.
    causal
        Whether there are several new positions, of which each sees only those before it.
    loads
        Tokens of the experts, for each mixture-of-experts layer.
    """

    batch: Size
    positions: Size
    cached: Size
    causal: bool
    loads: Mapping[int, ExpertLoad]

    @property
    def rows(self) -> Size:
        """Positions of all prompts together."""
        return self.batch * self.positions


@attrs.frozen
class OperatorRuns:
    """One operator of one module: what each of its calls costs.

    Attributes
    ----------
    operator_category
        One of `OPERATOR_CATEGORIES`.
    compute_dtype
        Name of the dtype in which the operator computes.
    runs
        Pairs of a number of calls and their steps.
    """

    operator_category: str
    compute_dtype: str
    runs: list[tuple[Size, Steps]] = attrs.field(factory=list)


@attrs.frozen
class Policy:
    """How a model runs, and what of it is counted.

    Attributes
    ----------
    dtype
        Name of the dtype of weights and activations.
    attention
        How a decoder attends: sdpa, eager or flash_attention_2.
    attention_flops
        What counts as arithmetic of fused attention in a decoder. ``full``: the rectangle of queries and keys.
        ``executed``: only the triangle that a causal kernel computes. ``counter``: what torch's FlopCounterMode sees,
        to which the kernels of flash_attention_2 are unknown.
    """

    dtype: str = "bfloat16"
    attention: str = "sdpa"
    attention_flops: str = "full"

    def counted(self, *, causal: bool) -> Counted:
        """What `analytic.operators.sdpa` counts."""
        if self.attention_flops == "counter" and self.attention == "flash_attention_2":
            return "nothing"
        return "triangle" if causal and self.attention_flops == "executed" else "rectangle"


class Moment(NamedTuple):
    """What happens next in a forward: the call of a module, or an operator that it runs.

    Attributes
    ----------
    path
        Module.
    name
        What the module calls the operator; empty for the call itself.
    times
        How often.
    steps
        What runs; None for the call itself.
    """

    path: str
    name: str
    times: Size
    steps: Steps | None


@attrs.frozen
class Tape:
    """All calls and operators of one stage, in order of first appearance.

    Attributes
    ----------
    policy
        How the model runs.
    folded
        Whether equal layers of a list are noted once, with their number. Sizes are then arrays with one entry per
        workload; otherwise they are arrays with one entry per forward.
    calls
        Forward calls by module path.
    operators
        Operators by module path and name.
    sequence
        Everything in the order in which it happens.
    """

    policy: Policy
    folded: bool = False
    calls: dict[str, Size] = attrs.field(factory=dict)
    operators: dict[tuple[str, str], OperatorRuns] = attrs.field(factory=dict)
    sequence: list[Moment] = attrs.field(factory=list)

    def at(self, path: str, forwards: Size) -> Scope:
        """Scope of the module at `path`, without counting a call of it."""
        return Scope(self, path, forwards)

    def enter(self, forwards: Size) -> Scope:
        """Scope of the root, called in all `forwards`."""
        self.calls[""] = forwards
        self.sequence.append(Moment("", "", forwards, None))
        return self.at("", forwards)


@attrs.frozen
class Scope:
    """Where a layer notes what it does: its path, and how many forwards of it are evaluated at once."""

    tape: Tape
    path: str
    forwards: Size

    @property
    def dtype(self) -> Dtype:
        """Dtype of the model."""
        return MODEL_DTYPES[self.tape.policy.dtype]

    def child(self, name: str, forwards: Size | None = None) -> Scope:
        """Scope of a child that is called now, in all forwards or in a number of them."""
        path = f"{self.path}.{name}" if self.path else name
        count = self.forwards if forwards is None else forwards
        self.tape.calls[path] = self.tape.calls.get(path, 0) + count
        self.tape.sequence.append(Moment(path, "", count, None))
        return Scope(self.tape, path, count)

    def each(self, name: str, layers: LayerList[SomeLayer]) -> Iterator[tuple[Scope, int, SomeLayer]]:
        """Scopes of a list's layers with their numbers, each called now."""
        if not self.tape.folded:
            for index, layer in enumerate(layers.layers):
                yield self.child(f"{name}.{index}"), index, layer
            return
        for layer, group in groupby(enumerate(layers.layers), key=lambda numbered: numbered[1]):
            numbers = [index for index, _ in group]
            yield self.child(f"{name}.{numbers[0]}", self.forwards * len(numbers)), numbers[0], layer

    def op(self, name: str, category: str, steps: Steps, *, dtype: Dtype | None = None) -> None:
        """Note one operator: its name within the module, its category, what it runs, its dtype if not the model's."""
        key = (self.path, name)
        if key not in self.tape.operators:
            self.tape.operators[key] = OperatorRuns(category, (dtype or self.dtype).name)
        self.tape.operators[key].runs.append((self.forwards, steps))
        self.tape.sequence.append(Moment(self.path, name, self.forwards, steps))
