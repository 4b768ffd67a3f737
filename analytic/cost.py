"""What one operator costs: arithmetic, memory traffic and the memory that it leaves behind."""

from __future__ import annotations

from typing import Any, Final, TypeAlias

import attrs
import numpy as np

from analytic.errors import InputError

#: A size in a formula: a Python int, an int64 array with one entry per forward, or a symbolic expression.
#: Formulas only add and multiply sizes, so that all three work alike.
Size: TypeAlias = Any

FP32: Final = 4
INT64: Final = 8
BOOL: Final = 1

#: Bytes per element of the dtypes that a model may run in.
DTYPE_BYTES: Final = {"bfloat16": 2, "float16": 2, "float32": 4}
_SHORT_NAMES: Final = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def dtype_name(name: str) -> str:
    """Full name of a dtype given by its full or short name (bfloat16 or bf16, float16 or fp16, float32 or fp32).

    Raises
    ------
    InputError
        If no formula knows the dtype.
    """
    full = _SHORT_NAMES.get(name, name)
    if full not in DTYPE_BYTES:
        raise InputError(f"no dtype {name!r}; choose one of {', '.join(_SHORT_NAMES)} with --dtype")
    return full


@attrs.frozen
class Cost:
    """Cost of one operator call. Every field is a `Size`; costs of a sequence of operators add up.

    Attributes
    ----------
    tensor_flops
        FLOPs of matrix products and convolutions, one multiply-accumulate counted as 2.
    vector_flops
        All other arithmetic: each scalar operation, also a transcendental one, counts 1.
    bytes_read
        Bytes of all operands, each read once.
    bytes_written
        Bytes of all results, each written once.
    weight_bytes
        Share of `bytes_read` that is model parameters.
    activation_bytes
        Bytes of the result that the operator hands on.
    kv_cache_bytes
        Bytes by which the key-value cache grows.
    """

    tensor_flops: Size = 0
    vector_flops: Size = 0
    bytes_read: Size = 0
    bytes_written: Size = 0
    weight_bytes: Size = 0
    activation_bytes: Size = 0
    kv_cache_bytes: Size = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.tensor_flops + other.tensor_flops,
            self.vector_flops + other.vector_flops,
            self.bytes_read + other.bytes_read,
            self.bytes_written + other.bytes_written,
            self.weight_bytes + other.weight_bytes,
            self.activation_bytes + other.activation_bytes,
            self.kv_cache_bytes + other.kv_cache_bytes,
        )

    def __mul__(self, factor: Size) -> Cost:
        return Cost(*(value * factor for value in attrs.astuple(self, recurse=False)))

    def handing_on(self, size: Size) -> Cost:
        """Cost of a sequence of operators that drops its intermediate results and hands on only `size` bytes."""
        return attrs.evolve(self, activation_bytes=size)

    @property
    def bytes_total(self) -> Size:
        """Bytes read and written."""
        return self.bytes_read + self.bytes_written

    def over(self, forwards: int) -> Cost:
        """Sum over `forwards` calls: arrays hold one entry per call, a plain number is the same in each.

        Returns
        -------
        Cost
            All fields plain Python ints.
        """
        values = attrs.astuple(self, recurse=False)
        return Cost(*(int(v.sum()) if isinstance(v, np.ndarray) else int(v) * forwards for v in values))


ZERO: Final = Cost()


def total(costs: list[Cost]) -> Cost:
    """Sum of costs."""
    return sum(costs, start=ZERO)
