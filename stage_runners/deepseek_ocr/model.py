"""The whole model: vision features placed into the prompt, then the decoder and its language head."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from stage_runners.deepseek_ocr.clip import VitModel
from stage_runners.deepseek_ocr.decoder import DeepseekV2DecoderLayer, DeepseekV2RMSNorm
from stage_runners.deepseek_ocr.sam import ImageEncoderViT

if TYPE_CHECKING:
    from collections.abc import Sequence

    from analytic.config import ModelConfig, ProjectorConfig

#: One page: tiles (N, 3, S, S), or zeros without tiles; and the global view (1, 3, B, B).
PageImages = tuple[Tensor, Tensor]


class MlpProjector(nn.Module):
    """Linear map of joined vision features (B, T, input) into the decoder's width."""

    def __init__(self, config: ProjectorConfig) -> None:
        super().__init__()
        self.layers = nn.Linear(config.input_dim, config.output_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, input) to (B, T, output)."""
        out: Tensor = self.layers(x)
        return out


class DeepseekOCRModel(nn.Module):
    """Vision encoders and decoder layers, without the language head."""

    def __init__(self, config: ModelConfig, attention: str) -> None:
        super().__init__()
        decoder = config.decoder
        self.embed_tokens = nn.Embedding(decoder.vocab_size, decoder.hidden_size)
        self.layers = nn.ModuleList(
            DeepseekV2DecoderLayer(decoder, layer, attention) for layer in range(decoder.layers)
        )
        self.norm = DeepseekV2RMSNorm(decoder.hidden_size, decoder.rms_norm_eps)
        self.sam_model = ImageEncoderViT(config.sam)
        self.vision_model = VitModel(config.clip)
        self.projector = MlpProjector(config.projector)
        self.image_newline = nn.Parameter(torch.zeros(decoder.hidden_size))
        # The checkpoint's own spelling.
        self.view_seperator = nn.Parameter(torch.zeros(decoder.hidden_size))

    def forward(
        self,
        input_ids: Tensor,
        *,
        images: Sequence[PageImages] | None,
        images_seq_mask: Tensor | None,
        images_spatial_crop: Tensor | None,
        cache: DynamicCache | None,
    ) -> Tensor:
        """Hidden states (B, T, hidden) of the prompt, or of the next position where a cache is given."""
        x = self.embed_tokens(input_ids)
        # One position is a decode step; a first page that sums to zero means a prompt without images. The check
        # reads a value back from the device, as the checkpoint's code does.
        if images is not None and input_ids.shape[1] != 1 and images[0][1].sum().item() != 0:
            if images_seq_mask is None or images_spatial_crop is None:
                raise ValueError("images need images_seq_mask and images_spatial_crop")
            for row, (page, grid) in enumerate(zip(images, images_spatial_crop.tolist(), strict=True)):
                features = self._page_features(page, (grid[0], grid[1]))
                x[row].masked_scatter_(images_seq_mask[row].unsqueeze(-1), features)
        past = cache.get_seq_length() if cache is not None else 0
        position_ids = torch.arange(past, past + x.shape[1], device=x.device)[None]
        for layer in self.layers:
            x = layer(x, position_ids, cache)
        out: Tensor = self.norm(x)
        return out

    def _encode(self, images: Tensor) -> Tensor:
        """Images (N, 3, S, S) to features (N, (S/64)^2, hidden)."""
        sam: Tensor = self.sam_model(images)
        clip: Tensor = self.vision_model(sam)
        features: Tensor = self.projector(torch.cat((clip[:, 1:], sam.flatten(2).permute(0, 2, 1)), dim=-1))
        return features

    def _page_features(self, page: PageImages, grid: tuple[int, int]) -> Tensor:
        """Image positions of one page (positions, hidden): tiles, global view, separator."""
        tiles, overview = page
        parts = []
        if tiles.sum().item() != 0:
            local = self._encode(tiles)
            columns, rows = grid
            side = math.isqrt(local.shape[1])
            local = local.view(rows, columns, side, side, -1).permute(0, 2, 1, 3, 4)
            parts.append(self._with_row_ends(local.reshape(rows * side, columns * side, -1)))
        whole = self._encode(overview)
        side = math.isqrt(whole.shape[1])
        parts += [self._with_row_ends(whole.view(side, side, -1)), self.view_seperator[None]]
        return torch.cat(parts, dim=0)

    def _with_row_ends(self, grid: Tensor) -> Tensor:
        """Token grid (rows, columns, hidden) to a sequence, a newline embedding after each row."""
        ends = self.image_newline.expand(grid.shape[0], 1, -1)
        return torch.cat([grid, ends], dim=1).view(-1, grid.shape[-1])


class DeepseekOCRForCausalLM(nn.Module):
    """DeepSeek-OCR with its language head, callable with the arguments of the published model.

    Parameters
    ----------
    config
        All dimensions.
    attention
        One of `ATTENTION_IMPLEMENTATIONS`, for the decoder; the vision encoders always use
        ``scaled_dot_product_attention``.
    """

    def __init__(self, config: ModelConfig, *, attention: str = "sdpa") -> None:
        super().__init__()
        self.config = config
        self.model = DeepseekOCRModel(config, attention)
        self.lm_head = nn.Linear(config.decoder.hidden_size, config.decoder.vocab_size, bias=False)

    @torch.no_grad()
    def forward(
        self,
        input_ids: Tensor,
        *,
        images: Sequence[PageImages] | None = None,
        images_seq_mask: Tensor | None = None,
        images_spatial_crop: Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        use_cache: bool = True,
    ) -> CausalLMOutputWithPast:
        """Logits of every position given.

        Parameters
        ----------
        input_ids
            Token ids (B, T), int64.
        images
            For each row of the batch its tiles (N, 3, S, S) (zeros where it has none) and its global view
            (1, 3, B, B); ignored when T is 1.
        images_seq_mask
            Positions (B, T), bool, that take image features.
        images_spatial_crop
            Tile grid (B, 2) as (columns, rows), int64.
        past_key_values
            Cache of the positions before these; extended in place.
        use_cache
            Whether to keep keys and values.

        Returns
        -------
        CausalLMOutputWithPast
            ``logits`` (B, T, vocabulary) in fp32, and ``past_key_values``.
        """
        cache = (DynamicCache() if past_key_values is None else past_key_values) if use_cache else None
        hidden = self.model(
            input_ids,
            images=images,
            images_seq_mask=images_seq_mask,
            images_spatial_crop=images_spatial_crop,
            cache=cache,
        )
        logits = self.lm_head(hidden).float()
        return CausalLMOutputWithPast(logits=logits, past_key_values=cache)
