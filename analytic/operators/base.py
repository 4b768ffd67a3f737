"""What an operator is: one formula for its forward pass, one for its backward pass, and the calls made of it."""

from __future__ import annotations

import functools
import inspect
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import attrs

from analytic.cost import ZERO, Cost, Size

if TYPE_CHECKING:
    from collections.abc import Callable

#: A primitive gives its cost; an operator that runs as several gives those.
Formula: TypeAlias = "Callable[..., Cost | Steps]"

#: How many calls of different sizes are remembered of each operator: more than one model has.
_REMEMBERED: Final = 1024


class Operator:
    """A named cost formula. Calling it with sizes gives `Steps`: itself, called once.

    Attributes
    ----------
    name
        What formulas, tables and documentation call it.
    signature
        Its parameters: sizes, dtypes, and options.
    """

    def __init__(self, formula: Formula) -> None:
        functools.update_wrapper(self, formula)
        self.name: str = formula.__name__
        self.signature = inspect.signature(formula)
        self._formula = formula
        self._backward: Formula | None = None
        # Typed, since True and 1 are equal.
        self._remembered = functools.lru_cache(_REMEMBERED, typed=True)(self._evaluated)

    def __call__(self, *args: Any, **kwargs: Any) -> Steps:
        """Call it once, with these sizes; equal layers, which give the same sizes, share the same steps."""
        try:
            return self._remembered(*args, **kwargs)
        except TypeError:  # an array is not hashable
            return self._evaluated(*args, **kwargs)

    def _evaluated(self, *args: Any, **kwargs: Any) -> Steps:
        found = self._formula(*args, **kwargs)
        parts = found if isinstance(found, Steps) else None
        cost = found if isinstance(found, Cost) else found.cost
        return Steps((OperatorCall(self, args, kwargs, parts),), cost)

    @property
    def backward_formula(self) -> Formula | None:
        """Its own formula of the backward pass, if it has one."""
        return self._backward

    def backward(self, formula: Formula) -> Formula:
        """Give the formula of the backward pass, with the same parameters (a decorator)."""
        self._backward = formula
        return formula

    def backward_steps(self, *args: Any, **kwargs: Any) -> Cost | Steps:
        """What the backward pass of one call runs.

        An operator without a formula of its own goes backwards through its parts; one without parts has no gradient.
        """
        if self._backward is not None:
            return self._backward(*args, **kwargs)
        found = self._formula(*args, **kwargs)
        return ZERO if isinstance(found, Cost) else found.backward

    def backward_cost(self, *args: Any, **kwargs: Any) -> Cost:
        """Cost of the backward pass of one call: gradients of its operands from the gradient of its result."""
        found = self.backward_steps(*args, **kwargs)
        return found if isinstance(found, Cost) else found.cost


@attrs.frozen(eq=False)
class OperatorCall:
    """One operator with the sizes that it was given.

    Attributes
    ----------
    operator
        Which operator.
    args, kwargs
        What it was called with.
    parts
        The operators that it runs as; None for a primitive.
    times
        How many equal calls this stands for.
    """

    operator: Operator
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    parts: Steps | None
    times: Size = 1

    @property
    def arguments(self) -> dict[str, Any]:
        """Everything that it was called with, defaults included, by parameter."""
        bound = self.operator.signature.bind(*self.args, **self.kwargs)
        bound.apply_defaults()
        return dict(bound.arguments)


@attrs.frozen(eq=False)
class Steps:
    """Operators that run one after the other, and what they cost together."""

    calls: tuple[OperatorCall, ...]
    cost: Cost

    def __add__(self, other: Steps) -> Steps:
        return Steps(self.calls + other.calls, self.cost + other.cost)

    def __mul__(self, times: Size) -> Steps:
        calls = tuple(attrs.evolve(call, times=call.times * times) for call in self.calls)
        return Steps(calls, self.cost * times)

    def handing_on(self, size: Size) -> Steps:
        """Drop the intermediate results: only `size` bytes are handed on."""
        return Steps(self.calls, attrs.evolve(self.cost, activation_bytes=size))

    @property
    def backward(self) -> Cost:
        """Cost of the backward pass through all of them."""
        cost = ZERO
        for call in reversed(self.calls):
            cost = cost + call.operator.backward_cost(*call.args, **call.kwargs) * call.times
        return cost
