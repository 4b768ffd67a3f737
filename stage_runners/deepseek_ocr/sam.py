"""SAM ViT-B image encoder with two strided convolutions behind its neck."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from analytic.config import SamConfig


class PatchEmbed(nn.Module):
    """Image (B, 3, H, W) to patches (B, H/16, W/16, width)."""

    def __init__(self, config: SamConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, config.width, kernel_size=config.patch_size, stride=config.patch_size)

    def forward(self, image: Tensor) -> Tensor:
        """Cut and embed the patches."""
        patches: Tensor = self.proj(image)
        return patches.permute(0, 2, 3, 1)


class MLPBlock(nn.Module):
    """Two linear layers with an exact GELU between them."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.lin1 = nn.Linear(width, hidden)
        self.lin2 = nn.Linear(hidden, width)
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., width) to (..., width)."""
        out: Tensor = self.lin2(self.act(self.lin1(x)))
        return out


class LayerNorm2d(nn.Module):
    """Layer norm over the channels of (B, C, H, W), in elementwise operators as the checkpoint's code has it."""

    def __init__(self, channels: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise each position over its channels."""
        mean = x.mean(1, keepdim=True)
        variance = (x - mean).pow(2).mean(1, keepdim=True)
        # Subtracted a second time on purpose: the operator sequence is part of what is measured.
        normalised = (x - mean) / torch.sqrt(variance + self.eps)
        return self.weight[:, None, None] * normalised + self.bias[:, None, None]


class Attention(nn.Module):
    """Self-attention over a (B, H, W, width) map with decomposed relative positions as a materialised bias."""

    def __init__(self, config: SamConfig, window: int) -> None:
        super().__init__()
        self.heads = config.heads
        side = window or config.position_grid
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.proj = nn.Linear(config.width, config.width)
        self.rel_pos_h = nn.Parameter(torch.zeros(2 * side - 1, config.head_dim))
        self.rel_pos_w = nn.Parameter(torch.zeros(2 * side - 1, config.head_dim))

    def forward(self, x: Tensor) -> Tensor:
        """Attend within each map of the batch."""
        batch, height, width, channels = x.shape
        length = height * width
        qkv = self.qkv(x).reshape(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.reshape(3, batch * self.heads, length, -1).unbind(0)
        bias = _position_bias(query, self.rel_pos_h, self.rel_pos_w, (height, width))
        out = F.scaled_dot_product_attention(
            query.view(batch, self.heads, length, -1),
            key.view(batch, self.heads, length, -1),
            value.view(batch, self.heads, length, -1),
            attn_mask=bias.view(batch, self.heads, length, length),
        )
        out = out.view(batch, self.heads, height, width, -1).permute(0, 2, 3, 1, 4)
        projected: Tensor = self.proj(out.reshape(batch, height, width, channels))
        return projected


def _relative_positions(table: Tensor, side: int) -> Tensor:
    """Rows of `table` for each (query, key) pair along one axis: (side, side, head_dim)."""
    length = 2 * side - 1
    if table.shape[0] != length:
        resized = F.interpolate(table.float().t()[None], size=length, mode="linear").to(table.dtype)
        table = resized[0].t()
    position = torch.arange(side, device=table.device)
    return table[position[:, None] - position[None, :] + (side - 1)]


def _position_bias(query: Tensor, table_h: Tensor, table_w: Tensor, size: tuple[int, int]) -> Tensor:
    """Bias (B*heads, H*W, H*W) of decomposed relative positions (MViTv2, arXiv 2112.01526, section 4.1)."""
    height, width = size
    maps = query.reshape(-1, height, width, query.shape[-1])
    along_h = torch.einsum("bhwc,hkc->bhwk", maps, _relative_positions(table_h, height))
    along_w = torch.einsum("bhwc,wkc->bhwk", maps, _relative_positions(table_w, width))
    length = height * width
    # The small factors are laid out first: reshaping their sum would copy the large bias.
    bias = along_h.reshape(-1, length, height, 1) + along_w.reshape(-1, length, 1, width)
    return bias.view(-1, length, length)


class Block(nn.Module):
    """Transformer block; with a window, attention runs in padded windows of that side."""

    def __init__(self, config: SamConfig, window: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, eps=config.layer_norm_eps)
        self.attn = Attention(config, window)
        self.norm2 = nn.LayerNorm(config.width, eps=config.layer_norm_eps)
        self.mlp = MLPBlock(config.width, config.mlp_ratio * config.width)
        self.window = window

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, H, W, width) to the same shape."""
        shortcut = x
        x = self.norm1(x)
        if self.window:
            size = (x.shape[1], x.shape[2])
            x = _merge_windows(self.attn(_split_windows(x, self.window)), self.window, size)
        else:
            x = self.attn(x)
        x = shortcut + x
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


def _split_windows(x: Tensor, window: int) -> Tensor:
    """(B, H, W, C) to (B*windows, window, window, C), zero-padded to whole windows."""
    batch, height, width, channels = x.shape
    pad_h, pad_w = -height % window, -width % window
    if pad_h or pad_w:
        x = F.pad(x, (0, 0, 0, pad_w, 0, pad_h))
    rows, columns = (height + pad_h) // window, (width + pad_w) // window
    x = x.view(batch, rows, window, columns, window, channels).permute(0, 1, 3, 2, 4, 5)
    return x.contiguous().view(-1, window, window, channels)


def _merge_windows(windows: Tensor, window: int, size: tuple[int, int]) -> Tensor:
    """Undo `_split_windows` and drop the padding."""
    height, width = size
    rows, columns = -(-height // window), -(-width // window)
    x = windows.view(-1, rows, columns, window, window, windows.shape[-1]).permute(0, 1, 3, 2, 4, 5)
    x = x.contiguous().view(-1, rows * window, columns * window, windows.shape[-1])
    if (rows * window, columns * window) != size:
        x = x[:, :height, :width, :].contiguous()
    return x


class ImageEncoderViT(nn.Module):
    """Image (B, 3, S, S) to features (B, channels, S/64, S/64)."""

    def __init__(self, config: SamConfig) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(config)
        grid = config.position_grid
        self.pos_embed = nn.Parameter(torch.zeros(1, grid, grid, config.width))
        self.blocks = nn.ModuleList(
            Block(config, 0 if index in config.global_attention_blocks else config.window_size)
            for index in range(config.layers)
        )
        neck = config.neck_channels
        self.neck = nn.Sequential(
            nn.Conv2d(config.width, neck, kernel_size=1, bias=False),
            LayerNorm2d(neck, config.layer_norm_eps),
            nn.Conv2d(neck, neck, kernel_size=3, padding=1, bias=False),
            LayerNorm2d(neck, config.layer_norm_eps),
        )
        first, second = config.downsample_channels
        self.net_2 = nn.Conv2d(neck, first, kernel_size=3, stride=2, padding=1, bias=False)
        self.net_3 = nn.Conv2d(first, second, kernel_size=3, stride=2, padding=1, bias=False)

    def forward(self, image: Tensor) -> Tensor:
        """Encode a batch of square images."""
        x = self.patch_embed(image)
        x = x + _resized_grid(self.pos_embed, x.shape[1])
        for block in self.blocks:
            x = block(x)
        x = self.net_2(self.neck(x.permute(0, 3, 1, 2)))
        features: Tensor = self.net_3(x.clone())
        return features


def _resized_grid(table: Tensor, side: int) -> Tensor:
    """Position table (1, grid, grid, C) for `side` patches a side."""
    if table.shape[1] == side:
        return table
    grid = table.permute(0, 3, 1, 2).float()
    grid = F.interpolate(grid, size=(side, side), mode="bicubic", antialias=True, align_corners=False)
    return grid.to(table.dtype).permute(0, 2, 3, 1)
