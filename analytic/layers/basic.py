"""Leaf layers that several parts of the model use."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

from analytic import operators as op
from analytic.layers.base import Layer

if TYPE_CHECKING:
    from analytic.cost import Size
    from analytic.layers.base import Scope


@attrs.frozen
class Linear(Layer):
    """Matrix product with a weight.

    Attributes
    ----------
    in_features, out_features
        Sizes of the weight.
    bias
        Whether a bias is added.
    """

    in_features: int
    out_features: int
    bias: bool

    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Weight (out, in), and a bias."""
        weight: dict[str, tuple[int, ...]] = {"weight": (self.out_features, self.in_features)}
        return weight | ({"bias": (self.out_features,)} if self.bias else {})

    def forward(self, at: Scope, rows: Size) -> None:
        """Apply to `rows` vectors."""
        at.op("linear", "linear", op.linear(rows, self.in_features, self.out_features, at.dtype, bias=self.bias))


@attrs.frozen
class Conv2d(Layer):
    """Convolution with a square kernel.

    Attributes
    ----------
    in_channels, out_channels
        Channels before and after.
    kernel
        Side of the kernel.
    stride, padding
        Steps and border in pixels.
    bias
        Whether a bias is added.
    """

    in_channels: int
    out_channels: int
    kernel: int
    stride: int
    padding: int
    bias: bool

    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Weight (out, in, kernel, kernel), and a bias."""
        weight: dict[str, tuple[int, ...]] = {"weight": (self.out_channels, self.in_channels, self.kernel, self.kernel)}
        return weight | ({"bias": (self.out_channels,)} if self.bias else {})

    def out_side(self, side: Size) -> Size:
        """Side of the result for square images of that `side`."""
        return (side + 2 * self.padding - self.kernel) // self.stride + 1

    def forward(self, at: Scope, images: Size, side: Size) -> None:
        """Apply to square images of that `side`."""
        cost = op.conv2d(
            images,
            self.in_channels,
            self.out_channels,
            self.kernel,
            side,
            self.out_side(side),
            at.dtype,
            bias=self.bias,
        )
        at.op("conv2d", "conv", cost)


@attrs.frozen
class LayerNorm(Layer):
    """Layer normalisation of vectors.

    Attributes
    ----------
    width
        Elements of a vector.
    """

    width: int

    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Weight and bias."""
        return {"weight": (self.width,), "bias": (self.width,)}

    def forward(self, at: Scope, rows: Size, *, permuted: bool = False) -> None:
        """Apply to `rows` vectors; the elements of `permuted` ones lie apart, as in a channels-first image."""
        at.op("layer_norm", "norm", op.layer_norm(rows, self.width, at.dtype, permuted=permuted))


@attrs.frozen
class LayerNorm2d(Layer):
    """Layer normalisation over the channels of images.

    Attributes
    ----------
    channels
        Channels that are normalised together.
    """

    channels: int

    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Weight and bias."""
        return {"weight": (self.channels,), "bias": (self.channels,)}

    def forward(self, at: Scope, pixels: Size) -> None:
        """Apply to `pixels` pixels of all images together."""
        at.op("layer_norm_2d", "norm", op.layer_norm_2d(pixels, self.channels, at.dtype))


@attrs.frozen
class RmsNorm(Layer):
    """Root-mean-square norm of vectors.

    Attributes
    ----------
    width
        Elements of a vector.
    """

    width: int

    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Weight."""
        return {"weight": (self.width,)}

    def forward(self, at: Scope, rows: Size) -> None:
        """Apply to `rows` vectors."""
        at.op("rms_norm", "norm", op.rms_norm(rows, self.width, at.dtype))


@attrs.frozen
class Embedding(Layer):
    """Table of vectors, looked up by id.

    Attributes
    ----------
    entries
        Vectors in the table.
    width
        Elements of a vector.
    """

    entries: int
    width: int

    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Weight (entries, width)."""
        return {"weight": (self.entries, self.width)}

    def forward(self, at: Scope, rows: Size) -> None:
        """Look up `rows` ids."""
        at.op("embedding", "embedding", op.embedding(rows, self.width, at.dtype))


@attrs.frozen
class Gelu(Layer):
    """Exact GELU."""

    def forward(self, at: Scope, elements: Size) -> None:
        """Apply to all elements."""
        at.op("gelu", "activation", op.gelu(elements, at.dtype))


@attrs.frozen
class Silu(Layer):
    """SiLU."""

    def forward(self, at: Scope, elements: Size) -> None:
        """Apply to all elements."""
        at.op("silu", "activation", op.silu(elements, at.dtype))
