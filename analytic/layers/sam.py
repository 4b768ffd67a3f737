"""SAM ViT-B image encoder with two strided convolutions behind its neck."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import attrs

from analytic import operators as op
from analytic.cost import FP32, INT64
from analytic.layers.base import Layer, LayerList
from analytic.layers.basic import Conv2d, Gelu, LayerNorm, LayerNorm2d, Linear

if TYPE_CHECKING:
    from collections.abc import Iterator

    from analytic.config import SamConfig
    from analytic.layers.base import Scope

#: Weighted source elements per result of cubic interpolation in two dimensions, and of linear in one.
BICUBIC_TAPS: Final = 16
LINEAR_TAPS: Final = 2


@attrs.frozen
class SamPatchEmbed(Layer):
    """Cuts the image into patches and embeds them."""

    proj: Conv2d

    def forward(self, at: Scope, images: int, side: int) -> None:
        """Apply to images of `side` pixels."""
        self.proj.forward(at.child("proj"), images, side)
        at.op("views", "other", op.view())


@attrs.frozen
class SamMlp(Layer):
    """Two linear layers with a GELU between them."""

    lin1: Linear
    lin2: Linear
    act: Gelu

    def forward(self, at: Scope, rows: int) -> None:
        """Apply to `rows` vectors."""
        self.lin1.forward(at.child("lin1"), rows)
        self.act.forward(at.child("act"), rows * self.lin1.out_features)
        self.lin2.forward(at.child("lin2"), rows)


@attrs.frozen
class SamAttention(Layer):
    """Attention over square maps, with decomposed relative positions as a materialised bias.

    Attributes
    ----------
    heads
        Attention heads.
    head_dim
        Width of one head.
    table_side
        Side of the map that the tables of relative positions were made for.
    """

    heads: int
    head_dim: int
    table_side: int
    qkv: Linear
    proj: Linear

    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Relative positions along both axes."""
        shape = (2 * self.table_side - 1, self.head_dim)
        return {"rel_pos_h": shape, "rel_pos_w": shape}

    def forward(self, at: Scope, maps: int, side: int) -> None:
        """Attend within each of `maps` maps of `side` times `side` positions."""
        positions = side * side
        elements = maps * positions * self.heads * self.head_dim
        self.qkv.forward(at.child("qkv"), maps * positions)
        at.op("views", "other", op.view() * 41)
        if maps > 1:  # the heads of a single map need no copy
            at.op("qkv_split", "copy", op.copy(3 * elements, at.dtype))
        self._bias(at, maps, side)
        cost = op.sdpa_with_bias(maps * self.heads, positions, positions, self.head_dim, at.dtype)
        at.op("sdpa", "attention", cost)
        self.proj.forward(at.child("proj"), maps * positions)

    def _bias(self, at: Scope, maps: int, side: int) -> None:
        """Bias of every score: one product of the queries with a table per axis, and their sum."""
        positions, batch = side * side, maps * self.heads
        if side != self.table_side:
            self._resize_tables(at, side)
        index = op.elementwise(positions, INT64, operands=0, shared=2 * side) + op.elementwise(positions, INT64)
        at.op("rel_pos_index", "elementwise", index * 2)
        # Each of the side * side rows comes from one of the 2 * side - 1 rows of the table.
        at.op("rel_pos_gather", "routing", op.gather(positions, self.head_dim, at.dtype, weights=positions) * 2)
        at.op("rel_pos_query_copy", "copy", op.copy(batch * positions * self.head_dim, at.dtype))
        at.op("rel_pos_product", "attention", op.bmm(side, batch * side, self.head_dim, side, at.dtype) * 2)
        at.op("rel_pos_layout", "copy", op.copy(batch * positions * side, at.dtype) * 2)
        bias = op.elementwise(batch * positions * positions, at.dtype, operands=0, shared=2 * batch * positions * side)
        at.op("rel_pos_add", "elementwise", bias)

    def _resize_tables(self, at: Scope, side: int) -> None:
        source = (2 * self.table_side - 1) * self.head_dim
        target = (2 * side - 1) * self.head_dim
        cast = op.cast(source, at.dtype, FP32, weights=source) + op.cast(target, FP32, at.dtype)
        at.op("rel_pos_views", "other", op.view() * 8)
        at.op("rel_pos_cast", "copy", cast * 2)
        at.op("rel_pos_resize", "elementwise", op.interpolate(source, target, LINEAR_TAPS, FP32) * 2, dtype=FP32)


@attrs.frozen
class SamBlock(Layer):
    """Transformer block with attention over the whole map, or within padded windows.

    Attributes
    ----------
    width
        Elements of a position's vector.
    window
        Side of a window in positions; None for attention over the whole map.
    """

    width: int
    window: int | None
    norm1: LayerNorm
    attn: SamAttention
    norm2: LayerNorm
    mlp: SamMlp

    def forward(self, at: Scope, images: int, side: int) -> None:
        """Apply to maps of `side` times `side` positions."""
        rows = images * side * side
        # The map keeps the layout of the first convolution, channels first, through every sum.
        residual = op.elementwise(rows * self.width, at.dtype, operands=2, permuted=True)
        self.norm1.forward(at.child("norm1"), rows, permuted=True)
        if self.window is None:
            self.attn.forward(at.child("attn"), images, side)
        else:
            self._windowed_attention(at, images, side, self.window)
        at.op("residual_attention", "elementwise", residual)
        self.norm2.forward(at.child("norm2"), rows, permuted=True)
        self.mlp.forward(at.child("mlp"), rows)
        at.op("residual_mlp", "elementwise", residual)

    def _windowed_attention(self, at: Scope, images: int, side: int, window: int) -> None:
        windows = -(-side // window)
        elements = images * side * side * self.width
        padded = images * (windows * window) ** 2 * self.width
        at.op("views", "other", op.view() * 6)
        if side % window:
            at.op("window_pad", "copy", op.pad(elements, padded, at.dtype))
        at.op("window_split", "copy", op.copy(padded, at.dtype))
        self.attn.forward(at.child("attn"), images * windows * windows, window)
        at.op("window_merge", "copy", op.copy(padded, at.dtype))
        if side % window:
            at.op("crop_views", "other", op.view() * 2)
            at.op("window_crop", "copy", op.copy(elements, at.dtype))


@attrs.frozen
class SamNeck(Layer):
    """Two convolutions that narrow the map, each with a norm."""

    narrow: Conv2d
    norm: LayerNorm2d
    mix: Conv2d

    def children(self) -> Iterator[tuple[str, Layer]]:
        """Name the four layers by their number."""
        return iter((("0", self.narrow), ("1", self.norm), ("2", self.mix), ("3", self.norm)))

    def forward(self, at: Scope, images: int, side: int) -> None:
        """Apply to maps of `side` times `side` positions."""
        self.narrow.forward(at.child("0"), images, side)
        self.norm.forward(at.child("1"), images * side * side)
        self.mix.forward(at.child("2"), images, side)
        self.norm.forward(at.child("3"), images * side * side)


@attrs.frozen
class SamEncoder(Layer):
    """Images to features of a sixteenth of the patches.

    Attributes
    ----------
    width
        Elements of a patch's vector.
    position_grid
        Side of the map that the learned positions were made for.
    """

    width: int
    position_grid: int
    patch_embed: SamPatchEmbed
    blocks: LayerList[SamBlock]
    neck: SamNeck
    net_2: Conv2d
    net_3: Conv2d

    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Grid of learned positions."""
        return {"pos_embed": (1, self.position_grid, self.position_grid, self.width)}

    def out_side(self, side: int) -> int:
        """Side of the feature map for images of `side` pixels."""
        patches: int = self.patch_embed.proj.out_side(side)
        features: int = self.net_3.out_side(self.net_2.out_side(patches))
        return features

    def forward(self, at: Scope, images: int, side: int) -> None:
        """Encode images of `side` pixels."""
        self.patch_embed.forward(at.child("patch_embed"), images, side)
        patches: int = self.patch_embed.proj.out_side(side)
        self._add_positions(at, images, patches)
        at.op("views", "other", op.view())
        for scope, _, block in at.each("blocks", self.blocks):
            block.forward(scope, images, patches)
        self.neck.forward(at.child("neck"), images, patches)
        self.net_2.forward(at.child("net_2"), images, patches)
        half: int = self.net_2.out_side(patches)
        at.op("clone", "copy", op.copy(images * half * half * self.net_2.out_channels, at.dtype))
        self.net_3.forward(at.child("net_3"), images, half)

    def _add_positions(self, at: Scope, images: int, patches: int) -> None:
        source, target = (grid * grid * self.width for grid in (self.position_grid, patches))
        resized = patches != self.position_grid
        if resized:
            cast = op.cast(source, at.dtype, FP32, weights=source) + op.cast(target, FP32, at.dtype)
            at.op("position_views", "other", op.view() * 2)
            at.op("position_cast", "copy", cast)
            at.op("position_resize", "elementwise", op.interpolate(source, target, BICUBIC_TAPS, FP32), dtype=FP32)
        kind = {"shared": target} if resized else {"weights": target}
        at.op("position_add", "elementwise", op.elementwise(images * target, at.dtype, **kind))


def sam_encoder(config: SamConfig) -> SamEncoder:
    """Build the encoder."""
    width, neck = config.width, config.neck_channels
    first, second = config.downsample_channels

    def block(window: int | None) -> SamBlock:
        return SamBlock(
            width=width,
            window=window,
            norm1=LayerNorm(width),
            attn=SamAttention(
                heads=config.heads,
                head_dim=config.head_dim,
                table_side=window or config.position_grid,
                qkv=Linear(width, 3 * width, bias=True),
                proj=Linear(width, width, bias=True),
            ),
            norm2=LayerNorm(width),
            mlp=SamMlp(
                lin1=Linear(width, config.mlp_ratio * width, bias=True),
                lin2=Linear(config.mlp_ratio * width, width, bias=True),
                act=Gelu(),
            ),
        )

    everywhere, windowed = block(None), block(config.window_size)
    blocks = (everywhere if i in config.global_attention_blocks else windowed for i in range(config.layers))
    return SamEncoder(
        width=width,
        position_grid=config.position_grid,
        patch_embed=SamPatchEmbed(Conv2d(3, width, config.patch_size, config.patch_size, 0, bias=True)),
        blocks=LayerList(tuple(blocks)),
        neck=SamNeck(
            narrow=Conv2d(width, neck, 1, 1, 0, bias=False),
            norm=LayerNorm2d(neck),
            mix=Conv2d(neck, neck, 3, 1, 1, bias=False),
        ),
        net_2=Conv2d(neck, first, 3, 2, 1, bias=False),
        net_3=Conv2d(first, second, 3, 2, 1, bias=False),
    )
