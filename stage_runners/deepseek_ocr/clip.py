"""CLIP-L vision transformer whose patches are the SAM encoder's features."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from analytic.config import ClipConfig


class CLIPVisionEmbeddings(nn.Module):
    """Class token and position table around ready-made patch features."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.class_embedding = nn.Parameter(torch.zeros(config.width))
        # Never called, the patches come from SAM; but the checkpoint holds its weight.
        self.patch_embedding = nn.Conv2d(
            3, config.width, kernel_size=config.patch_size, stride=config.patch_size, bias=False
        )
        self.position_embedding = nn.Embedding(config.positions, config.width)
        # On the CPU even where parameters are only sketched on the meta device: its values are needed.
        position_ids = torch.arange(config.positions, device="cpu")[None]
        self.register_buffer("position_ids", position_ids, persistent=False)

    def forward(self, features: Tensor) -> Tensor:
        """Features (B, width, h, w) to tokens (B, 1 + h*w, width)."""
        patches = features.flatten(2).transpose(1, 2)
        class_token = self.class_embedding.expand(patches.shape[0], 1, -1)
        tokens = torch.cat([class_token, patches], dim=1)
        return tokens + _resized_positions(self.position_embedding(self.position_ids), tokens.shape[1])


def _resized_positions(table: Tensor, length: int) -> Tensor:
    """Position table (1, 1 + grid*grid, C) for `length` tokens, the class token's row kept as it is."""
    old_side, side = math.isqrt(table.shape[1] - 1), math.isqrt(length)
    if old_side == side:
        return table
    width = table.shape[2]
    grid = table[:, 1:].view(1, old_side, old_side, width).permute(0, 3, 1, 2).contiguous().float()
    grid = F.interpolate(grid, size=(side, side), mode="bicubic", antialias=True, align_corners=False)
    resized = grid.to(table.dtype).permute(0, 2, 3, 1).view(1, side * side, width)
    return torch.cat([table[:, :1], resized], dim=1)


def quick_gelu(x: Tensor) -> Tensor:
    """Sigmoid approximation of GELU: x * sigmoid(1.702 x) (Hendrycks and Gimpel, arXiv 1606.08415)."""
    return x * torch.sigmoid(1.702 * x)


class NoTPFeedForward(nn.Module):
    """Two linear layers with a quick GELU between them."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.width, config.mlp_ratio * config.width)
        self.fc2 = nn.Linear(config.mlp_ratio * config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, width) to the same shape."""
        out: Tensor = self.fc2(quick_gelu(self.fc1(x)))
        return out


class NoTPAttention(nn.Module):
    """Full self-attention over (B, T, width)."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv_proj = nn.Linear(config.width, 3 * config.width)
        self.out_proj = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        """Attend over all positions."""
        batch, length, width = x.shape
        qkv = self.qkv_proj(x).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = (part.squeeze(2).permute(0, 2, 1, 3) for part in torch.split(qkv, 1, dim=2))
        out = F.scaled_dot_product_attention(query, key, value)
        projected: Tensor = self.out_proj(out.permute(0, 2, 1, 3).reshape(batch, length, width))
        return projected


class NoTPTransformerBlock(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.self_attn = NoTPAttention(config)
        self.mlp = NoTPFeedForward(config)
        self.layer_norm1 = nn.LayerNorm(config.width, eps=config.layer_norm_eps)
        self.layer_norm2 = nn.LayerNorm(config.width, eps=config.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, width) to the same shape."""
        # Both are called past __call__, as the checkpoint's code does: whoever relies on module hooks misses them.
        x = x + self.self_attn.forward(self.layer_norm1(x))
        return x + self.mlp.forward(self.layer_norm2(x))


class NoTPTransformer(nn.Module):
    """The stack of transformer blocks."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(NoTPTransformerBlock(config) for _ in range(config.layers))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, width) to the same shape."""
        for layer in self.layers:
            x = layer(x)
        return x


class VitModel(nn.Module):
    """SAM features (B, width, h, w) to tokens (B, 1 + h*w, width)."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.embeddings = CLIPVisionEmbeddings(config)
        self.transformer = NoTPTransformer(config)
        # The checkpoint's own spelling.
        self.pre_layrnorm = nn.LayerNorm(config.width, eps=config.layer_norm_eps)

    def forward(self, features: Tensor) -> Tensor:
        """Encode ready-made patch features."""
        out: Tensor = self.transformer(self.pre_layrnorm(self.embeddings(features)))
        return out
