"""The time model's arithmetic for one call of an operator, step by step. Needs no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import attrs

from analytic.cost import Dtype
from analytic.layers.base import Policy
from analytic.operators import host_loop, sdpa, to_host, view
from analytic.timing.curves import Curves, compute_dtype, cost_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from analytic.cost import Cost
    from analytic.model import Stage
    from analytic.operators import Operator, OperatorCall
    from analytic.timing.calibration import Calibration
    from analytic.timing.curves import OperatorTime, Source

#: What keeps only the host busy.
ON_HOST: Final = (view, host_loop, to_host)
_NS_PER_S: Final = 1e9


@attrs.frozen(kw_only=True)
class TimeStep:
    """From the cost of an operator to its time: ``(floor + max(compute, weights + rest)) * ratio + new_memory``.

    Attributes
    ----------
    operator
        Its name.
    arguments
        What it was given, by parameter; dtypes by their names.
    times
        How often it runs in one call.
    tensor_flops, weight_bytes, rest_bytes
        What one run computes and moves; fused attention counts what it executes, whatever the policy says.
    peak_flops_per_s, weight_bytes_per_s, rest_bytes_per_s
        Ceilings that this takes; None where there is nothing to do.
    floor_ns, compute_ns, weights_ns, rest_ns, new_memory_ns
        Terms of the formula.
    ratio
        Of the samples at sizes like these over their roofs; 1 where there are none.
    device_ns, host_ns
        Time of one run on the device, and on the host until it is launched.
    source
        Between the samples, beyond them, or without any.
    """

    operator: str
    arguments: Mapping[str, Any]
    times: int
    tensor_flops: int
    weight_bytes: int
    rest_bytes: int
    peak_flops_per_s: float | None
    weight_bytes_per_s: float | None
    rest_bytes_per_s: float | None
    floor_ns: float
    compute_ns: float
    weights_ns: float
    rest_ns: float
    new_memory_ns: float
    ratio: float
    device_ns: float
    host_ns: float
    source: Source

    @property
    def roof_ns(self) -> float:
        """What the ceilings allow, new memory left out."""
        return self.floor_ns + max(self.compute_ns, self.weights_ns + self.rest_ns)


@attrs.frozen
class CallTime:
    """Time of one call of an operator at one size: the sum over its steps.

    Attributes
    ----------
    arguments
        What it was given, by parameter.
    steps
        Itself, or the operators that it runs as where only these have samples, or neither has.
    """

    arguments: Mapping[str, Any]
    steps: tuple[TimeStep, ...]

    @property
    def device_ns(self) -> float:
        """Time on the device."""
        return sum(step.device_ns * step.times for step in self.steps)


class Arithmetic:
    """The steps of the time model on one device."""

    def __init__(self, device: Calibration) -> None:
        self._device, self._curves = device, Curves(device)

    def times(self, operator: Operator, arguments: Mapping[str, Any], stage: Stage) -> tuple[CallTime, ...]:
        """Time of a call; of calls that grow from forward to forward, of the first and the last one.

        Parameters
        ----------
        operator
            Which operator.
        arguments
            Sizes by parameter; an array has one entry per forward.
        stage
            Where it runs: in a decoder's prefill, fused attention is causal.
        """
        if operator in ON_HOST:
            return ()
        if operator is sdpa:
            counted = Policy(attention_flops="executed").counted(causal=stage == "prefill")
            arguments = dict(arguments) | {"counted": counted}
        found = dict.fromkeys(tuple(_at(value, place) for value in arguments.values()) for place in (0, -1))
        return tuple(self._call(operator, dict(zip(arguments, values, strict=True))) for values in found)

    def _call(self, operator: Operator, arguments: Mapping[str, Any]) -> CallTime:
        (call,) = operator(**arguments).calls
        return CallTime(arguments, tuple(self._steps(call, 1)))

    def _steps(self, call: OperatorCall, times: int) -> Iterator[TimeStep]:
        whole = self._curves.time(call)
        if call.parts is not None:
            together = sum(self._curves.time(part).device_ns * int(part.times) for part in call.parts.calls)
            if together == whole.device_ns:
                for part in call.parts.calls:
                    yield from self._steps(part, times * int(part.times))
                return
        yield self._step(call, times, whole)

    def _step(self, call: OperatorCall, times: int, found: OperatorTime) -> TimeStep:
        arguments = {name: value.name if isinstance(value, Dtype) else value for name, value in call.arguments.items()}
        cost: Cost = cost_of(call.operator.name, arguments)
        weight_bytes, rest_bytes = int(cost.weight_bytes), int(cost.bytes_total - cost.weight_bytes)
        terms, sizes = self._curves.terms(cost, arguments), self._device.memory_bytes_per_s
        return TimeStep(
            operator=call.operator.name,
            arguments=arguments,
            times=times,
            tensor_flops=int(cost.tensor_flops),
            weight_bytes=weight_bytes,
            rest_bytes=rest_bytes,
            peak_flops_per_s=self._device.tensor_flops_per_s[compute_dtype(arguments)] if cost.tensor_flops else None,
            # Weights are read at the speed of the largest copy.
            weight_bytes_per_s=sizes[max(sizes)] if weight_bytes else None,
            rest_bytes_per_s=rest_bytes / terms.rest_ns * _NS_PER_S if rest_bytes else None,
            **attrs.asdict(terms),
            ratio=(found.device_ns - terms.new_memory_ns) / terms.roof_ns,
            device_ns=found.device_ns,
            host_ns=found.host_ns,
            source=found.source,
        )


def _at(value: Any, place: int) -> Any:
    """A size in one of the forwards."""
    return int(value.ravel()[place]) if hasattr(value, "ravel") else value
