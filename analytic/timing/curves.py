"""Time of one operator: what its calibration says, and the roof where that says nothing.

A time is a roof times a ratio. The roof is what the calibrated ceilings allow: the shortest time that anything takes,
plus the longer of arithmetic at the fastest matrix product's speed and traffic at a streaming copy's. The ratio is how
much longer the operator took at sizes like these: a locally weighted linear regression of the measured ratios, both in
logarithms (Cleveland, "Robust locally weighted regression and smoothing scatterplots", JASA 74, 1979). So the curve
follows the ceilings between the samples, and beyond them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

import attrs
import numpy as np
import numpy.typing as npt

from analytic.cost import DTYPES, FP32, Dtype
from analytic.errors import InputError
from analytic.operators import OPERATORS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from analytic.cost import Cost
    from analytic.operators import OperatorCall
    from analytic.timing.calibration import Calibration, Sample

Source: TypeAlias = Literal["calibrated", "extrapolated", "roof"]
Floats: TypeAlias = npt.NDArray[np.float64]
#: Features of a sample, ratio of its time to its roof, and its time on the host.
_Point: TypeAlias = "tuple[Floats, float, float]"

#: Distance in doublings of a size at which a sample counts for 1/e.
_REACH: Final = 1.5
#: How far beyond the samples a size may lie, in doublings, and still count as measured.
_MARGIN: Final = 0.5
_NS_PER_S: Final = 1e9

#: Whether attention is causal, how many neighbours an interpolation reads, how many operands go in, and whether their
#: layouts differ: each is a kernel of its own.
_KERNELS: Final = ("counted", "taps", "operands", "permuted")
#: Operands that are broadcast.
_BROADCAST: Final = ("shared", "weights")
#: What the time of an operator depends on; of all others, on the bytes that it moves.
_FEATURES: Final[Mapping[str, Callable[[Mapping[str, Any]], Sequence[float]]]] = {
    "linear": lambda a: (a["rows"], a["in_features"], a["out_features"]),
    "bmm": lambda a: (a["batch"], a["rows"], a["inner"], a["columns"]),
    "conv2d": lambda a: (a["images"] * a["out_side"] ** 2, a["in_channels"] * a["kernel"] ** 2, a["out_channels"]),
    "sdpa": lambda a: (a["heads"], a["queries"], a["keys"], a["head_dim"]),
    "sdpa_with_bias": lambda a: (a["heads"], a["queries"], a["keys"], a["head_dim"]),
    "attention_eager": lambda a: (a["heads"], a["queries"], a["keys"], a["head_dim"]),
    # Where all operands are broadcast, a loop is as short as one of them.
    "elementwise": lambda a: (a["elements"], a["elements"] / a["shared"] if a["shared"] and not a["operands"] else 1),
}


@attrs.frozen
class OperatorTime:
    """Predicted time of one call.

    Attributes
    ----------
    device_ns, host_ns
        On the device, and on the host until it is launched.
    roof_ns
        What the calibrated ceilings would allow.
    floor_ns
        Part of it: the shortest time that anything takes.
    compute_bound
        Whether arithmetic is the longer part of the calibrated roof.
    source
        Between the samples, beyond them, or without any.
    """

    device_ns: float
    host_ns: float
    roof_ns: float
    floor_ns: float
    compute_bound: bool
    source: Source


@attrs.frozen
class Terms:
    """What a time is made of before its ratio: ``roof * ratio + new_memory``, in ns.

    Attributes
    ----------
    floor_ns
        The shortest time that anything takes.
    compute_ns
        Arithmetic at the fastest matrix product's speed.
    weights_ns, rest_ns
        Traffic of the weights and all other, at a streaming copy's speed.
    new_memory_ns
        Making the memory of a large result.
    """

    floor_ns: float
    compute_ns: float
    weights_ns: float
    rest_ns: float
    new_memory_ns: float

    @property
    def roof_ns(self) -> float:
        """What the ceilings allow, new memory left out."""
        return self.floor_ns + max(self.compute_ns, self.weights_ns + self.rest_ns)

    @property
    def compute_bound(self) -> bool:
        """Whether arithmetic is the longer part."""
        return self.compute_ns > self.weights_ns + self.rest_ns


class Curves:
    """Times of all operators on a calibrated device."""

    def __init__(self, calibration: Calibration) -> None:
        self._calibration = calibration
        sizes = sorted(calibration.memory_bytes_per_s)
        self._copied = np.log2(np.array(sizes, dtype=np.float64))
        self._bandwidth = np.log2([calibration.memory_bytes_per_s[size] for size in sizes])
        points: dict[tuple[str, str, Any], list[_Point]] = {}
        for sample in calibration.samples:
            operator, dtype, kernel = _kind(sample.operator, sample.arguments)
            point = self._point(sample)
            # Also by the operator alone, for kernels without a sample of their own.
            for which in (kernel, None):
                points.setdefault((operator, dtype, which), []).append(point)
        self._curves = {key: _curve(found) for key, found in points.items()}
        self._known: dict[tuple[Any, ...], OperatorTime] = {}

    def time(self, call: OperatorCall) -> OperatorTime:
        """Time of one call of an operator, `times` not counted."""
        key = (call.operator.name, *map(_plain, call.args), *((name, _plain(v)) for name, v in call.kwargs.items()))
        if key not in self._known:
            self._known[key] = self._time(call)
        return self._known[key]

    def _time(self, call: OperatorCall) -> OperatorTime:
        arguments = {name: _plain(value) for name, value in call.arguments.items()}
        operator, dtype, kernel = _kind(call.operator.name, arguments)
        keys = [(operator, name, which) for which in (kernel, None) for name in (dtype, FP32.name)]
        curve = next((self._curves[key] for key in keys if key in self._curves), None)
        if curve is None and call.parts is not None:
            return _together([(self.time(part), _plain(part.times)) for part in call.parts.calls])
        cost = cost_of(call.operator.name, arguments)
        terms = self.terms(cost, arguments)
        roof, new = terms.roof_ns, terms.new_memory_ns
        ratio, host_ns = 1.0, self._calibration.host.operator_ns
        source: Source = "roof"
        if curve is not None:
            ratio, host_ns, inside = curve.at(features_of(call.operator.name, arguments, cost))
            source = "calibrated" if inside else "extrapolated"
        return OperatorTime(roof * ratio + new, host_ns, roof + new, terms.floor_ns, terms.compute_bound, source)

    def terms(self, cost: Cost, arguments: Mapping[str, Any]) -> Terms:
        """What the time of a call is made of.

        Parameters
        ----------
        cost
            Of the call.
        arguments
            What it is given, by parameter; dtypes by their names.
        """
        host, weights, size = self._calibration.host, float(cost.weight_bytes), float(cost.activation_bytes)
        compute = float(cost.tensor_flops) / self._peak(compute_dtype(arguments)) if cost.tensor_flops else 0.0
        return Terms(
            floor_ns=host.kernel_floor_ns,
            compute_ns=compute * _NS_PER_S,
            # Weights are cold: between two uses of one the rest of the model passes through the caches.
            weights_ns=weights / 2 ** float(self._bandwidth[-1]) * _NS_PER_S,
            rest_ns=self._moved(float(cost.bytes_total) - weights) * _NS_PER_S,
            new_memory_ns=size * host.fresh_byte_ns if size >= host.fresh_from_bytes else 0.0,
        )

    def _moved(self, size: float) -> float:
        """Seconds that a streaming copy takes for as many bytes."""
        if size < 1:
            return 0.0
        return size / 2 ** float(np.interp(np.log2(size), self._copied, self._bandwidth))

    def _peak(self, dtype: str) -> float:
        peaks = self._calibration.tensor_flops_per_s
        if dtype not in peaks:
            raise InputError(
                f"{self._calibration.device} was not measured in {dtype}; choose one of {', '.join(peaks)} with "
                "--dtype, or measure it with dsocr-trace calibrate --dtype"
            )
        return peaks[dtype]

    def _point(self, sample: Sample) -> _Point:
        cost = cost_of(sample.operator, sample.arguments)
        ratio = sample.device_ns / self.terms(cost, sample.arguments).roof_ns
        return features_of(sample.operator, sample.arguments, cost), ratio, sample.host_ns


def _plain(value: Any) -> Any:
    """Sizes as numbers, dtypes as their names."""
    if isinstance(value, Dtype):
        return value.name
    return value.item() if isinstance(value, (np.ndarray, np.generic)) else value


def _kind(operator: str, arguments: Mapping[str, Any]) -> tuple[str, str, Any]:
    """Which calls share a curve: operator, dtype, and what chooses a kernel of its own."""
    is_broadcast = "operands" in arguments and any(arguments[name] for name in _BROADCAST)
    return operator, compute_dtype(arguments), (*(arguments.get(name) for name in _KERNELS), is_broadcast)


def compute_dtype(arguments: Mapping[str, Any]) -> str:
    """Dtype that an operator computes in: that of its operands, fp32 in a conversion."""
    names = {value for value in arguments.values() if isinstance(value, str) and value in DTYPES}
    return names.pop() if len(names) == 1 else FP32.name


def cost_of(operator: str, arguments: Mapping[str, Any]) -> Cost:
    """Cost of one call with these arguments, dtypes by their names."""
    sizes = {name: DTYPES.get(value, value) if isinstance(value, str) else value for name, value in arguments.items()}
    return OPERATORS[operator](**sizes).cost


def features_of(operator: str, arguments: Mapping[str, Any], cost: Cost) -> Floats:
    """What the time of an operator depends on, all positive."""
    found = _FEATURES[operator](arguments) if operator in _FEATURES else (cost.bytes_total,)
    return np.maximum(np.asarray(found, dtype=np.float64), 1.0)


@attrs.frozen(eq=False)
class _Curve:
    """Samples of one operator: doublings of its features (samples, features), log ratios and host times (samples,)."""

    features: Floats
    log_ratio: Floats
    host_ns: Floats

    def at(self, features: Floats) -> tuple[float, float, bool]:
        """Ratio and host time at some features, and whether they lie among the samples."""
        low, high = self.features.min(axis=0), self.features.max(axis=0)
        place = np.log2(features)
        inside = bool(np.all((place >= low - _MARGIN) & (place <= high + _MARGIN)))
        # Beyond the samples the ratio stays what it was at their edge.
        place = np.clip(place, low, high)
        offset = self.features - place
        # The nearest sample always counts, however thin the grid is there.
        distance = np.square(offset).sum(axis=1)
        weight = np.exp(-(distance - distance.min()) / _REACH**2)
        design = np.column_stack([np.ones(len(offset)), offset])
        weighted = design * weight[:, None]
        # A little ridge keeps the slopes finite where samples lie on a line.
        normal = weighted.T @ design + np.diag([0.0, *np.full(offset.shape[1], 1e-3)])
        answer = np.linalg.solve(normal, weighted.T @ np.column_stack([self.log_ratio, self.host_ns]))[0]
        return float(np.exp(answer[0])), max(float(answer[1]), 0.0), inside


def _curve(points: Sequence[_Point]) -> _Curve:
    features, ratios, host_ns = zip(*points, strict=True)
    return _Curve(np.log2(features), np.log(ratios), np.array(host_ns))


def _together(parts: Sequence[tuple[OperatorTime, float]]) -> OperatorTime:
    """Time of operators that run one after the other."""
    longest = max(parts, key=lambda part: part[0].device_ns * part[1])[0]
    sources: set[Source] = {part.source for part, _ in parts}
    return OperatorTime(
        device_ns=sum(part.device_ns * times for part, times in parts),
        host_ns=sum(part.host_ns * times for part, times in parts),
        roof_ns=sum(part.roof_ns * times for part, times in parts),
        floor_ns=sum(part.floor_ns * times for part, times in parts),
        compute_bound=longest.compute_bound,
        source=next(source for source in ("roof", "extrapolated", "calibrated") if source in sources),
    )
