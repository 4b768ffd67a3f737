"""Costs of matrix products and convolutions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from analytic.cost import Cost, Dtype, Size
from analytic.operators.base import Operator
from analytic.operators.pointwise import reduction

if TYPE_CHECKING:
    from analytic.operators.base import Steps


@Operator
def linear(rows: Size, in_features: Size, out_features: Size, dtype: Dtype, *, bias: bool = False) -> Cost:
    """Matrix product with a weight: (rows, in) times (in, out), plus an optional bias.

    Tensor FLOPs: ``2 * rows * in * out``. Vector FLOPs: ``rows * out`` with a bias.
    Bytes: input, weight and bias read, result written.

    Parameters
    ----------
    rows
        Positions that the layer is applied to.
    in_features, out_features
        Sizes of the weight.
    dtype
        Type of input, weight and result.
    bias
        Whether a bias of `out_features` elements is added.
    """
    biases = int(bias)
    weights = (in_features + biases) * out_features
    results = rows * out_features
    return Cost(
        tensor_flops=2 * rows * in_features * out_features,
        vector_flops=biases * results,
        read=dtype.traffic(rows * in_features + weights),
        written=dtype.traffic(results),
        weight_bytes=weights * dtype.bytes,
        activation_bytes=results * dtype.bytes,
    )


@linear.backward
def _(rows: Size, in_features: Size, out_features: Size, dtype: Dtype, *, bias: bool = False) -> Steps:
    """Product with the transposed weight, product of input and gradient, and the bias's column sums."""
    products = linear(rows, out_features, in_features, dtype) + bmm(1, in_features, rows, out_features, dtype)
    return products + reduction(rows * out_features, out_features, dtype) * int(bias)


@Operator
def conv2d(  # noqa: PLR0917  a convolution has that many sizes
    images: Size,
    in_channels: Size,
    out_channels: Size,
    kernel: Size,
    in_side: Size,
    out_side: Size,
    dtype: Dtype,
    *,
    bias: bool = False,
) -> Cost:
    """Convolution of square images with a square kernel.

    Tensor FLOPs: ``2 * images * out_side**2 * out_channels * in_channels * kernel**2``, also where the kernel
    overlaps the padding. Vector FLOPs: one per result with a bias. Bytes: input, weight and bias read, result written.

    Parameters
    ----------
    images
        Batch size.
    in_channels, out_channels
        Channels before and after.
    kernel
        Side of the kernel.
    in_side, out_side
        Side of the image before and after, in pixels.
    dtype
        Type of images and weight.
    bias
        Whether a bias of `out_channels` elements is added.
    """
    taps = in_channels * kernel * kernel
    results = images * out_side * out_side * out_channels
    biases = int(bias)
    weights = (taps + biases) * out_channels
    return Cost(
        tensor_flops=2 * results * taps,
        vector_flops=biases * results,
        read=dtype.traffic(images * in_side * in_side * in_channels + weights),
        written=dtype.traffic(results),
        weight_bytes=weights * dtype.bytes,
        activation_bytes=results * dtype.bytes,
    )


@conv2d.backward
def _(  # noqa: PLR0917  the same sizes
    images: Size,
    in_channels: Size,
    out_channels: Size,
    kernel: Size,
    in_side: Size,
    out_side: Size,
    dtype: Dtype,
    *,
    bias: bool = False,
) -> Cost:
    """Transposed convolution of the gradient, correlation of input and gradient, and the bias's sums."""
    taps = in_channels * kernel * kernel
    weights = taps * out_channels
    inputs = images * in_side * in_side * in_channels
    results = images * out_side * out_side * out_channels
    products = Cost(
        tensor_flops=4 * results * taps,
        read=dtype.traffic(inputs + weights + 2 * results),
        written=dtype.traffic(inputs + weights),
        weight_bytes=weights * dtype.bytes,
        activation_bytes=(inputs + weights) * dtype.bytes,
    )
    return products + reduction(results, out_channels, dtype).cost * int(bias)


@Operator
def bmm(batch: Size, rows: Size, inner: Size, columns: Size, dtype: Dtype) -> Cost:
    """Batched product of two activations: (batch, rows, inner) times (batch, inner, columns).

    Tensor FLOPs: ``2 * batch * rows * inner * columns``. Bytes: both operands read, result written.

    Parameters
    ----------
    batch
        Pairs of matrices.
    rows, inner, columns
        Sizes of each pair: (rows, inner) and (inner, columns).
    dtype
        Type of operands and result.
    """
    results = batch * rows * columns
    return Cost(
        tensor_flops=2 * batch * rows * inner * columns,
        read=dtype.traffic(batch * (rows + columns) * inner),
        written=dtype.traffic(results),
        activation_bytes=results * dtype.bytes,
    )


@bmm.backward
def _(batch: Size, rows: Size, inner: Size, columns: Size, dtype: Dtype) -> Steps:
    """One product for each operand's gradient."""
    return bmm(batch, rows, columns, inner, dtype) + bmm(batch, inner, rows, columns, dtype)
