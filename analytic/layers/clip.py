"""CLIP-L vision transformer, fed with SAM features instead of patches."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import attrs

from analytic import operators as op
from analytic.cost import FP32
from analytic.layers.base import Layer, LayerList
from analytic.layers.basic import Conv2d, Embedding, LayerNorm, Linear
from analytic.layers.sam import BICUBIC_TAPS

if TYPE_CHECKING:
    from analytic.config import ClipConfig
    from analytic.layers.base import Scope


@attrs.frozen
class ClipEmbeddings(Layer):
    """Class token and position table around ready-made patch features. Its own patch embedding is never called.

    Attributes
    ----------
    width
        Elements of a position's vector.
    """

    width: int
    patch_embedding: Conv2d
    position_embedding: Embedding

    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Class token."""
        return {"class_embedding": (self.width,)}

    def forward(self, at: Scope, images: int, side: int) -> None:
        """Apply to feature maps of `side` times `side` positions."""
        tokens = (1 + side * side) * self.width
        at.op("views", "other", op.view() * 3)
        at.op("class_token_cat", "copy", op.cat(images * tokens, at.dtype, weights=images * self.width))
        table = self.position_embedding.entries
        self.position_embedding.forward(at.child("position_embedding"), table)
        if side != math.isqrt(table - 1):
            self._resize_positions(at, (table - 1) * self.width, side * side * self.width)
        at.op("position_add", "elementwise", op.elementwise(images * tokens, at.dtype, shared=tokens))

    def _resize_positions(self, at: Scope, source: int, target: int) -> None:
        cast = op.cast(source, at.dtype, FP32) + op.cast(target, FP32, at.dtype)
        copies = op.copy(source, at.dtype) + op.cat(target + self.width, at.dtype)
        at.op("position_views", "other", op.view() * 6)
        at.op("position_cast", "copy", cast + copies)
        at.op("position_resize", "elementwise", op.interpolate(source, target, BICUBIC_TAPS, FP32), dtype=FP32)


@attrs.frozen
class ClipAttention(Layer):
    """Full self-attention.

    Attributes
    ----------
    heads
        Attention heads.
    head_dim
        Width of one head.
    """

    heads: int
    head_dim: int
    qkv_proj: Linear
    out_proj: Linear

    def forward(self, at: Scope, images: int, positions: int) -> None:
        """Attend within each image."""
        self.qkv_proj.forward(at.child("qkv_proj"), images * positions)
        at.op("views", "other", op.view() * 10)
        at.op("sdpa", "attention", op.sdpa(images * self.heads, positions, positions, self.head_dim, at.dtype))
        self.out_proj.forward(at.child("out_proj"), images * positions)


@attrs.frozen
class ClipMlp(Layer):
    """Two linear layers with a quick GELU between them."""

    fc1: Linear
    fc2: Linear

    def forward(self, at: Scope, rows: int) -> None:
        """Apply to `rows` vectors."""
        self.fc1.forward(at.child("fc1"), rows)
        at.op("quick_gelu", "activation", op.quick_gelu(rows * self.fc1.out_features, at.dtype))
        self.fc2.forward(at.child("fc2"), rows)


@attrs.frozen
class ClipBlock(Layer):
    """Pre-norm transformer block.

    Attributes
    ----------
    width
        Elements of a position's vector.
    """

    width: int
    self_attn: ClipAttention
    mlp: ClipMlp
    layer_norm1: LayerNorm
    layer_norm2: LayerNorm

    def forward(self, at: Scope, images: int, positions: int) -> None:
        """Apply to `positions` positions of each image."""
        rows = images * positions
        self.layer_norm1.forward(at.child("layer_norm1"), rows)
        self.self_attn.forward(at.child("self_attn"), images, positions)
        at.op("residual_attention", "elementwise", op.elementwise(rows * self.width, at.dtype, operands=2))
        self.layer_norm2.forward(at.child("layer_norm2"), rows)
        self.mlp.forward(at.child("mlp"), rows)
        at.op("residual_mlp", "elementwise", op.elementwise(rows * self.width, at.dtype, operands=2))


@attrs.frozen
class ClipTransformer(Layer):
    """The stack of blocks."""

    layers: LayerList[ClipBlock]

    def forward(self, at: Scope, images: int, positions: int) -> None:
        """Apply to `positions` positions of each image."""
        for scope, _, block in at.each("layers", self.layers):
            block.forward(scope, images, positions)


@attrs.frozen
class ClipEncoder(Layer):
    """SAM features to tokens."""

    embeddings: ClipEmbeddings
    transformer: ClipTransformer
    pre_layrnorm: LayerNorm

    def forward(self, at: Scope, images: int, side: int) -> None:
        """Apply to feature maps of `side` times `side` positions."""
        positions = 1 + side * side
        self.embeddings.forward(at.child("embeddings"), images, side)
        self.pre_layrnorm.forward(at.child("pre_layrnorm"), images * positions)
        self.transformer.forward(at.child("transformer"), images, positions)


def clip_encoder(config: ClipConfig) -> ClipEncoder:
    """Build the encoder."""
    width, hidden = config.width, config.mlp_ratio * config.width
    block = ClipBlock(
        width=width,
        self_attn=ClipAttention(
            heads=config.heads,
            head_dim=config.head_dim,
            qkv_proj=Linear(width, 3 * width, bias=True),
            out_proj=Linear(width, width, bias=True),
        ),
        mlp=ClipMlp(fc1=Linear(width, hidden, bias=True), fc2=Linear(hidden, width, bias=True)),
        layer_norm1=LayerNorm(width),
        layer_norm2=LayerNorm(width),
    )
    return ClipEncoder(
        embeddings=ClipEmbeddings(
            width=width,
            patch_embedding=Conv2d(3, width, config.patch_size, config.patch_size, 0, bias=False),
            position_embedding=Embedding(config.positions, width),
        ),
        transformer=ClipTransformer(LayerList((block,) * config.layers)),
        pre_layrnorm=LayerNorm(width),
    )
