"""Costs of elementwise arithmetic, reductions, norms and activations."""

from __future__ import annotations

from typing import TYPE_CHECKING

from analytic.cost import FP32, Cost, Dtype, Size
from analytic.operators.base import Operator
from analytic.operators.movement import cast

if TYPE_CHECKING:
    from analytic.operators.base import Steps


def _elementwise(  # noqa: PLR0917  private, called by position
    elements: Size, dtype: Dtype, operands: Size, flops: Size, shared: Size = 0, weights: Size = 0
) -> Cost:
    return Cost(
        vector_flops=flops * elements,
        read=dtype.traffic(operands * elements + shared + weights),
        written=dtype.traffic(elements),
        weight_bytes=weights * dtype.bytes,
        activation_bytes=elements * dtype.bytes,
    )


@Operator
def elementwise(
    elements: Size,
    dtype: Dtype,
    *,
    operands: int = 1,
    flops: int = 1,
    shared: Size = 0,
    weights: Size = 0,
    permuted: bool = False,
) -> Cost:
    """One arithmetic operator over all elements: add, multiply, negate, ...

    Arithmetic: ``flops * elements``. Bytes: full-size operands, broadcast operands and parameters read; one result
    written.

    Parameters
    ----------
    elements
        Elements of the result.
    dtype
        Type of operands and result.
    operands
        Operands as large as the result.
    flops
        Scalar operations per element.
    shared
        Elements of smaller operands, which are broadcast.
    weights
        Elements of parameters, which are broadcast.
    permuted
        Whether one operand is channels-first where the other is not. The bytes are the same, the time is not.
    """
    del permuted
    return _elementwise(elements, dtype, operands, flops, shared, weights)


@elementwise.backward
def _(
    elements: Size,
    dtype: Dtype,
    *,
    operands: int = 1,
    flops: int = 1,
    shared: Size = 0,
    weights: Size = 0,
    permuted: bool = False,
) -> Cost:
    """For each operand the gradient times a derivative, which is then summed for broadcast ones, taken as one operand.

    An addition does less: its derivatives are 1.
    """
    del permuted
    broadcast = shared + weights
    each = _elementwise(elements, dtype, 2, flops)
    if not _given(broadcast):
        return each * operands
    summed = Cost(
        vector_flops=elements,
        read=dtype.traffic(elements),
        written=dtype.traffic(broadcast),
        activation_bytes=broadcast * dtype.bytes,
    )
    return each * (operands + 1) + summed


def _given(size: Size) -> bool:
    """Whether a size is something else than the plain number 0."""
    return not (isinstance(size, int) and size == 0)


@Operator
def reduction(elements: Size, results: Size, dtype: Dtype) -> Cost:
    """Sum, mean or maximum: 1 operation per element, and the results written.

    Parameters
    ----------
    elements
        Elements that are reduced.
    results
        Elements that come out.
    dtype
        Type of both.
    """
    return Cost(
        vector_flops=elements,
        read=dtype.traffic(elements),
        written=dtype.traffic(results),
        activation_bytes=results * dtype.bytes,
    )


@reduction.backward
def _(elements: Size, results: Size, dtype: Dtype) -> Steps:
    """Each element gets its result's gradient, scaled."""
    return elementwise(elements, dtype, operands=0, shared=results)


@Operator
def layer_norm(rows: Size, width: Size, dtype: Dtype, *, permuted: bool = False) -> Cost:
    """Layer normalisation in one kernel, scale and shift included.

    Arithmetic: 7 per element (mean, subtract, square, sum, multiply, scale, shift) and 4 per row (two divisions, the
    epsilon, the root). Bytes: input and both parameters read, result written.

    Parameters
    ----------
    rows
        Vectors that are normalised.
    width
        Elements of each.
    dtype
        Type of input, parameters and result.
    permuted
        Whether the elements of a vector lie apart, as in a channels-first image, so that the operator lays them out
        anew inside. That is in the calibrated time, not in the bytes.
    """
    del permuted
    return _elementwise(rows * width, dtype, 1, 7, weights=2 * width) + Cost(vector_flops=4 * rows)


@layer_norm.backward
def _(rows: Size, width: Size, dtype: Dtype, *, permuted: bool = False) -> Cost:
    """One kernel.

    Arithmetic: 13 per element: 2 to normalise the input again, 4 for both row sums, 4 to combine them, and 3 for the
    sums over rows that the parameters' gradients are; 2 divisions per row. Bytes: gradient, input, mean and deviation
    of each row in fp32, and the weight read; three gradients written.
    """
    del permuted
    elements = rows * width
    return Cost(
        vector_flops=13 * elements + 2 * rows,
        read=dtype.traffic(2 * elements + width) + FP32.traffic(2 * rows),
        written=dtype.traffic(elements + 2 * width),
        weight_bytes=width * dtype.bytes,
        activation_bytes=(elements + 2 * width) * dtype.bytes,
    )


@Operator
def rms_norm(rows: Size, width: Size, dtype: Dtype) -> Steps:
    """Root-mean-square norm in fp32, as eager PyTorch runs it.

    Sequence: cast to fp32, square, mean, add epsilon, rsqrt, multiply, cast back, multiply by the weight.
    Arithmetic: 4 per element and 2 per row.

    Parameters
    ----------
    rows
        Vectors that are normalised.
    width
        Elements of each.
    dtype
        Type of input, weight and result.
    """
    elements = rows * width
    sequence = (
        cast(elements, dtype, FP32)
        + elementwise(elements, FP32)
        + reduction(elements, rows, FP32)
        + elementwise(rows, FP32) * 2
        + elementwise(elements, FP32, shared=rows)
        + cast(elements, FP32, dtype)
        + elementwise(elements, dtype, weights=width)
    )
    return sequence.handing_on(elements * dtype.bytes)


@Operator
def layer_norm_2d(pixels: Size, channels: Size, dtype: Dtype) -> Steps:
    """Layer normalisation over the channels of an image, as eager PyTorch runs it.

    Sequence: mean, subtract, square, mean, subtract, add epsilon, sqrt, divide, scale, shift.
    Arithmetic: 8 per element and 2 per pixel.

    Parameters
    ----------
    pixels
        Images times height times width.
    channels
        Channels that are normalised together.
    dtype
        Type of input, parameters and result.
    """
    elements = pixels * channels
    sequence = (
        reduction(elements, pixels, dtype) * 2
        + elementwise(elements, dtype, shared=pixels) * 3
        + elementwise(elements, dtype)
        + elementwise(pixels, dtype) * 2
        + elementwise(elements, dtype, weights=channels) * 2
    )
    return sequence.handing_on(elements * dtype.bytes)


@Operator
def gelu(elements: Size, dtype: Dtype) -> Cost:
    """Exact GELU, ``x / 2 * (1 + erf(x / sqrt(2)))``, in one kernel: 5 operations per element.

    Parameters
    ----------
    elements
        Elements that it is applied to.
    dtype
        Their type.
    """
    return _elementwise(elements, dtype, 1, 5)


@gelu.backward
def _(elements: Size, dtype: Dtype) -> Cost:
    """11 per element: 4 for the distribution function, 5 for x times its density, their sum, times the gradient."""
    return _elementwise(elements, dtype, 2, 11)


@Operator
def silu(elements: Size, dtype: Dtype) -> Cost:
    """``x * sigmoid(x)`` in one kernel: 5 operations per element, 4 of them the sigmoid.

    Parameters
    ----------
    elements
        Elements that it is applied to.
    dtype
        Their type.
    """
    return _elementwise(elements, dtype, 1, 5)


@silu.backward
def _(elements: Size, dtype: Dtype) -> Cost:
    """9 per element: the sigmoid s in 4, then ``dy * s * (1 + x * (1 - s))``."""
    return _elementwise(elements, dtype, 2, 9)


@Operator
def swiglu(elements: Size, dtype: Dtype) -> Cost:
    """``silu(gate) * up`` in one kernel: 6 operations per element. Eager models run `silu` and a product instead.

    Parameters
    ----------
    elements
        Elements of the gate, which are those of the result.
    dtype
        Their type.
    """
    return _elementwise(elements, dtype, 2, 6)


@swiglu.backward
def _(elements: Size, dtype: Dtype) -> Cost:
    """12 per element: the 9 of `silu`, its value anew from the sigmoid, and a product each; both gradients written."""
    return Cost(
        vector_flops=12 * elements,
        read=dtype.traffic(3 * elements),
        written=dtype.traffic(2 * elements),
        activation_bytes=2 * elements * dtype.bytes,
    )


@Operator
def quick_gelu(elements: Size, dtype: Dtype) -> Steps:
    """``x * sigmoid(1.702 x)`` as three operators: multiply, sigmoid (4 operations), multiply.

    Parameters
    ----------
    elements
        Elements that it is applied to.
    dtype
        Their type.
    """
    sequence = (
        elementwise(elements, dtype) + elementwise(elements, dtype, flops=4) + elementwise(elements, dtype, operands=2)
    )
    return sequence.handing_on(elements * dtype.bytes)


@Operator
def softmax(rows: Size, width: Size, source: Dtype, target: Dtype) -> Cost:
    """Softmax over each row in one kernel, reading one dtype and writing another.

    Arithmetic: 5 per element (maximum, subtract, exp, sum, divide). So it runs on CUDA; a CPU casts in a separate step.

    Parameters
    ----------
    rows
        Rows, each normalised by itself.
    width
        Elements per row.
    source, target
        Dtypes of input and result.
    """
    elements = rows * width
    return Cost(
        vector_flops=5 * elements,
        read=source.traffic(elements),
        written=target.traffic(elements),
        activation_bytes=elements * target.bytes,
    )


@softmax.backward
def _(rows: Size, width: Size, source: Dtype, target: Dtype) -> Cost:
    """``s * (dy - sum(dy * s))``: 4 per element; gradient and result read."""
    elements = rows * width
    return Cost(
        vector_flops=4 * elements,
        read=target.traffic(2 * elements),
        written=source.traffic(elements),
        activation_bytes=elements * source.bytes,
    )


@Operator
def interpolate(source_elements: Size, target_elements: Size, taps: Size, dtype: Dtype) -> Cost:
    """Resampling: a weighted sum of `taps` source elements per target element, 2 operations each.

    `taps` is 16 for bicubic and 2 for linear; the wider support of antialiased shrinking is not counted.

    Parameters
    ----------
    source_elements, target_elements
        Elements before and after.
    taps
        Source elements that each target element is made of.
    dtype
        Type of both.
    """
    return Cost(
        vector_flops=2 * taps * target_elements,
        read=dtype.traffic(source_elements),
        written=dtype.traffic(target_elements),
        activation_bytes=target_elements * dtype.bytes,
    )


@interpolate.backward
def _(source_elements: Size, target_elements: Size, taps: Size, dtype: Dtype) -> Cost:
    """Each target element's gradient is added to its sources, with the same weights."""
    return Cost(
        vector_flops=2 * taps * target_elements,
        read=dtype.traffic(target_elements),
        written=dtype.traffic(source_elements),
        activation_bytes=source_elements * dtype.bytes,
    )
