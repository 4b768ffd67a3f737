"""What one operator costs: arithmetic, memory traffic and the memory that it leaves behind."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, TypeAlias

import attrs
import numpy as np

from analytic.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

#: A size in a formula: a Python int, an array with one entry per forward or per workload, or a symbolic expression.
#: Formulas only add and multiply sizes, so that all three work alike.
Size: TypeAlias = Any


@attrs.frozen
class Dtype:
    """Type of a tensor's elements: its name, and its bytes per element."""

    name: str
    bytes: Size

    def traffic(self, elements: Size) -> Traffic:
        """Bytes of that many elements."""
        return Traffic({self.name: elements * self.bytes})


FP32: Final = Dtype("float32", 4)
INT64: Final = Dtype("int64", 8)
BOOL: Final = Dtype("bool", 1)

#: Types that a model may run in, by full name.
MODEL_DTYPES: Final = {"bfloat16": Dtype("bfloat16", 2), "float16": Dtype("float16", 2), "float32": FP32}
#: Every type that an operand may have, by full name.
DTYPES: Final = MODEL_DTYPES | {"int64": INT64, "bool": BOOL}
_SHORT_NAMES: Final = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def dtype_name(name: str) -> str:
    """Full name of a dtype given by its full or short name (bfloat16 or bf16, float16 or fp16, float32 or fp32).

    Raises
    ------
    InputError
        If no formula knows the dtype.
    """
    full = _SHORT_NAMES.get(name, name)
    if full not in MODEL_DTYPES:
        raise InputError(f"no dtype {name!r}; choose one of {', '.join(_SHORT_NAMES)} with --dtype")
    return full


@attrs.frozen
class Traffic:
    """Bytes that move between the device and its memory, by name of the dtype."""

    by_dtype: Mapping[str, Size] = attrs.field(factory=dict)

    def __add__(self, other: Traffic) -> Traffic:
        if not other.by_dtype:
            return self
        if not self.by_dtype:
            return other
        merged = dict(self.by_dtype)
        for name, size in other.by_dtype.items():
            merged[name] = merged[name] + size if name in merged else size
        return Traffic(merged)

    def __mul__(self, factor: Size) -> Traffic:
        return Traffic({name: size * factor for name, size in self.by_dtype.items()})

    @property
    def total(self) -> Size:
        """Bytes of all dtypes."""
        return sum(self.by_dtype.values())

    def over(self, forwards: int) -> Traffic:
        """Sum over `forwards` calls, in plain ints."""
        return Traffic({name: _over(size, forwards) for name, size in self.by_dtype.items()})


NOTHING: Final = Traffic()


@attrs.frozen
class Cost:
    """Cost of one operator call. Every number is a `Size`; costs of a sequence of operators add up.

    Attributes
    ----------
    tensor_flops
        FLOPs of matrix products and convolutions, one multiply-accumulate counted as 2.
    vector_flops
        All other arithmetic: each scalar operation, also a transcendental one, counts 1.
    read
        Bytes of all operands, each read once, by dtype.
    written
        Bytes of all results, each written once, by dtype.
    weight_bytes
        Share of `bytes_read` that is model parameters.
    activation_bytes
        Bytes of the result that the operator hands on.
    kv_cache_bytes
        Bytes by which the key-value cache grows.
    """

    tensor_flops: Size = 0
    vector_flops: Size = 0
    read: Traffic = NOTHING
    written: Traffic = NOTHING
    weight_bytes: Size = 0
    activation_bytes: Size = 0
    kv_cache_bytes: Size = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.tensor_flops + other.tensor_flops,
            self.vector_flops + other.vector_flops,
            self.read + other.read,
            self.written + other.written,
            self.weight_bytes + other.weight_bytes,
            self.activation_bytes + other.activation_bytes,
            self.kv_cache_bytes + other.kv_cache_bytes,
        )

    def __mul__(self, factor: Size) -> Cost:
        return Cost(
            self.tensor_flops * factor,
            self.vector_flops * factor,
            self.read * factor,
            self.written * factor,
            self.weight_bytes * factor,
            self.activation_bytes * factor,
            self.kv_cache_bytes * factor,
        )

    @property
    def bytes_read(self) -> Size:
        """Bytes read, of all dtypes."""
        return self.read.total

    @property
    def bytes_written(self) -> Size:
        """Bytes written, of all dtypes."""
        return self.written.total

    @property
    def bytes_total(self) -> Size:
        """Bytes read and written."""
        return self.bytes_read + self.bytes_written

    def over(self, forwards: int) -> Cost:
        """Sum over `forwards` calls: arrays hold one entry per call, a plain number is the same in each.

        Returns
        -------
        Cost
            All numbers plain Python ints.
        """
        return Cost(
            _over(self.tensor_flops, forwards),
            _over(self.vector_flops, forwards),
            self.read.over(forwards),
            self.written.over(forwards),
            _over(self.weight_bytes, forwards),
            _over(self.activation_bytes, forwards),
            _over(self.kv_cache_bytes, forwards),
        )

    def columns(self) -> dict[str, Size]:
        """The numbers by the names that tables give them."""
        return {name: getattr(self, name) for name in COST_COLUMNS}


#: Columns of a cost in tables.
COST_COLUMNS: Final = (
    "tensor_flops",
    "vector_flops",
    "bytes_read",
    "bytes_written",
    "weight_bytes",
    "activation_bytes",
    "kv_cache_bytes",
)

ZERO: Final = Cost()


def total(costs: Iterable[Cost]) -> Cost:
    """Sum of costs."""
    rest = iter(costs)
    return sum(rest, start=next(rest, ZERO))


def _over(size: Size, forwards: int) -> int:
    return int(size.sum()) if isinstance(size, np.ndarray) else int(size) * forwards
