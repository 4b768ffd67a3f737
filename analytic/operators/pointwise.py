"""Costs of elementwise arithmetic, reductions, norms and activations."""

from __future__ import annotations

from analytic.cost import FP32, Cost, Size
from analytic.operators.movement import cast


def elementwise(
    elements: Size, item: int, *, operands: int = 1, flops: int = 1, shared: Size = 0, weights: Size = 0
) -> Cost:
    """One arithmetic operator over all elements: add, multiply, negate, ...

    Arithmetic: ``flops * elements``. Bytes: full-size operands, broadcast operands and parameters read; one result
    written.

    Parameters
    ----------
    elements
        Elements of the result.
    item
        Bytes per element.
    operands
        Operands as large as the result.
    flops
        Scalar operations per element.
    shared
        Elements of smaller operands, which are broadcast.
    weights
        Elements of parameters, which are broadcast.
    """
    written = elements * item
    return Cost(
        vector_flops=flops * elements,
        bytes_read=operands * written + (shared + weights) * item,
        bytes_written=written,
        weight_bytes=weights * item,
        activation_bytes=written,
    )


def reduction(elements: Size, results: Size, item: int) -> Cost:
    """Sum, mean or maximum: 1 operation per element, and the results written."""
    written = results * item
    return Cost(vector_flops=elements, bytes_read=elements * item, bytes_written=written, activation_bytes=written)


def layer_norm(rows: Size, width: Size, item: int) -> Cost:
    """Layer normalisation in one kernel, scale and shift included.

    Arithmetic: 7 per element (mean, subtract, square, sum, multiply, scale, shift) and 4 per row (two divisions, the
    epsilon, the root). Bytes: input and both parameters read, result written.
    """
    affine = 2 * width
    return elementwise(rows * width, item, flops=7, weights=affine) + Cost(vector_flops=4 * rows)


def rms_norm(rows: Size, width: Size, item: int) -> Cost:
    """Root-mean-square norm in fp32, as eager PyTorch runs it.

    Sequence: cast to fp32, square, mean, add epsilon, rsqrt, multiply, cast back, multiply by the weight.
    Arithmetic: 4 per element and 2 per row.
    """
    elements = rows * width
    sequence = (
        cast(elements, item, FP32)
        + elementwise(elements, FP32)
        + reduction(elements, rows, FP32)
        + elementwise(rows, FP32) * 2
        + elementwise(elements, FP32, shared=rows)
        + cast(elements, FP32, item)
        + elementwise(elements, item, weights=width)
    )
    return sequence.handing_on(elements * item)


def layer_norm_2d(pixels: Size, channels: Size, item: int) -> Cost:
    """Layer normalisation over the channels of an image, as eager PyTorch runs it.

    Sequence: mean, subtract, square, mean, subtract, add epsilon, sqrt, divide, scale, shift.
    Arithmetic: 8 per element and 2 per pixel.

    Parameters
    ----------
    pixels
        Images times height times width.
    channels
        Channels that are normalised together.
    item
        Bytes per element.
    """
    elements = pixels * channels
    sequence = (
        reduction(elements, pixels, item) * 2
        + elementwise(elements, item, shared=pixels) * 3
        + elementwise(elements, item)
        + elementwise(pixels, item) * 2
        + elementwise(elements, item, weights=channels) * 2
    )
    return sequence.handing_on(elements * item)


def gelu(elements: Size, item: int) -> Cost:
    """Exact GELU, ``x / 2 * (1 + erf(x / sqrt(2)))``, in one kernel: 5 operations per element."""
    return elementwise(elements, item, flops=5)


def silu(elements: Size, item: int) -> Cost:
    """``x * sigmoid(x)`` in one kernel: 5 operations per element, 4 of them the sigmoid."""
    return elementwise(elements, item, flops=5)


def quick_gelu(elements: Size, item: int) -> Cost:
    """``x * sigmoid(1.702 x)`` as three operators: multiply, sigmoid (4 operations), multiply."""
    sequence = (
        elementwise(elements, item) + elementwise(elements, item, flops=4) + elementwise(elements, item, operands=2)
    )
    return sequence.handing_on(elements * item)


def softmax(rows: Size, width: Size, source_item: int, target_item: int) -> Cost:
    """Softmax over each row in one kernel, reading one dtype and writing another.

    Arithmetic: 5 per element (maximum, subtract, exp, sum, divide). So it runs on CUDA; a CPU casts in a separate step.
    """
    elements = rows * width
    written = elements * target_item
    return Cost(
        vector_flops=5 * elements,
        bytes_read=elements * source_item,
        bytes_written=written,
        activation_bytes=written,
    )


def interpolate(source_elements: Size, target_elements: Size, taps: int, item: int) -> Cost:
    """Resampling: a weighted sum of `taps` source elements per target element, 2 operations each.

    `taps` is 16 for bicubic and 2 for linear; the wider support of antialiased shrinking is not counted.
    """
    written = target_elements * item
    return Cost(
        vector_flops=2 * taps * target_elements,
        bytes_read=source_elements * item,
        bytes_written=written,
        activation_bytes=written,
    )
