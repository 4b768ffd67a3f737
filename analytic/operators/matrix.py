"""Costs of matrix products and convolutions."""

from __future__ import annotations

from analytic.cost import Cost, Size


def linear(rows: Size, in_features: Size, out_features: Size, item: int, *, bias: bool = False) -> Cost:
    """Matrix product with a weight: (rows, in) times (in, out), plus an optional bias.

    Tensor FLOPs: ``2 * rows * in * out``. Vector FLOPs: ``rows * out`` with a bias.
    Bytes: input, weight and bias read, result written.

    Parameters
    ----------
    rows
        Positions that the layer is applied to.
    in_features, out_features
        Sizes of the weight.
    item
        Bytes per element.
    bias
        Whether a bias of `out_features` elements is added.
    """
    biases = int(bias)
    weight = (in_features + biases) * out_features * item
    written = rows * out_features * item
    return Cost(
        tensor_flops=2 * rows * in_features * out_features,
        vector_flops=biases * rows * out_features,
        bytes_read=rows * in_features * item + weight,
        bytes_written=written,
        weight_bytes=weight,
        activation_bytes=written,
    )


def conv2d(  # noqa: PLR0917  a convolution has that many sizes
    images: Size,
    in_channels: Size,
    out_channels: Size,
    kernel: Size,
    in_side: Size,
    out_side: Size,
    item: int,
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
    item
        Bytes per element.
    bias
        Whether a bias of `out_channels` elements is added.
    """
    taps = in_channels * kernel * kernel
    results = images * out_side * out_side * out_channels
    biases = int(bias)
    weight = (taps + biases) * out_channels * item
    return Cost(
        tensor_flops=2 * results * taps,
        vector_flops=biases * results,
        bytes_read=images * in_side * in_side * in_channels * item + weight,
        bytes_written=results * item,
        weight_bytes=weight,
        activation_bytes=results * item,
    )


def bmm(batch: Size, rows: Size, inner: Size, columns: Size, item: int) -> Cost:
    """Batched product of two activations: (batch, rows, inner) times (batch, inner, columns).

    Tensor FLOPs: ``2 * batch * rows * inner * columns``. Bytes: both operands read, result written.
    """
    written = batch * rows * columns * item
    return Cost(
        tensor_flops=2 * batch * rows * inner * columns,
        bytes_read=batch * (rows + columns) * inner * item,
        bytes_written=written,
        activation_bytes=written,
    )
