"""The whole model: vision features placed into the prompt, then the decoder and its language head."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

from analytic import operators as op
from analytic.cost import FP32, INT64
from analytic.layers.base import Layer, LayerList
from analytic.layers.basic import Embedding, Linear, RmsNorm
from analytic.layers.clip import ClipEncoder, clip_encoder
from analytic.layers.decoder import DecoderLayer, decoder_layers
from analytic.layers.sam import SamEncoder, sam_encoder

if TYPE_CHECKING:
    from analytic.config import ModelConfig
    from analytic.cost import Size
    from analytic.crops import PageLayout, View
    from analytic.layers.base import Scope, SequenceShape


@attrs.frozen
class VisionProjector(Layer):
    """Linear map of joined vision features into the decoder's width."""

    layers: Linear

    def forward(self, at: Scope, rows: int) -> None:
        """Apply to `rows` vectors."""
        self.layers.forward(at.child("layers"), rows)


@attrs.frozen
class OcrModel(Layer):
    """Vision encoders and decoder layers, without the language head."""

    embed_tokens: Embedding
    layers: LayerList[DecoderLayer]
    norm: RmsNorm
    sam_model: SamEncoder
    vision_model: ClipEncoder
    projector: VisionProjector

    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Embeddings of the row end and of the separator between views."""
        return {"image_newline": (self.norm.width,), "view_seperator": (self.norm.width,)}

    def encode_view(self, at: Scope, view: View) -> None:
        """Run the vision encoders on one batch of views."""
        side = self.sam_model.out_side(view.size)
        self.sam_model.forward(at.child("sam_model"), view.count, view.size)
        self.vision_model.forward(at.child("vision_model"), view.count, side)
        self.projector.forward(at.child("projector"), view.count * side * side)

    def lay_out(self, at: Scope, page: PageLayout) -> None:
        """Put the features of one page into reading order.

        The two sums test whether the views hold an image at all; without tiles, zeros of the global view's size
        stand for them.
        """
        width = self.norm.width
        views = page.views if len(page.views) > 1 else page.views * 2
        for view in views:
            at.op("image_sums", "reduction", op.reduction(3 * view.count * view.size**2, 1, at.dtype))
            at.op("sums_to_host", "copy", op.to_host(1, at.dtype))
        for view in page.views:
            self._lay_out(at, view, page)
        at.op("views", "other", op.view())
        at.op("views_cat", "copy", op.cat(page.image_tokens * width, at.dtype, weights=width))

    def insert(self, at: Scope, positions: Size, image_tokens: Size) -> None:
        """Put the features of one page into its prompt of that many positions."""
        at.op("insert_views", "other", op.view() * 3)
        at.op("masked_scatter", "embedding", op.masked_scatter(positions, image_tokens, self.norm.width, at.dtype))

    def _lay_out(self, at: Scope, view: View, page: PageLayout) -> None:
        """Join SAM's and CLIP's features, then end every row of tokens with a newline embedding."""
        width, side = self.norm.width, self.sam_model.out_side(view.size)
        tokens = view.count * side * side
        at.op("layout_views", "other", op.view() * (8 if view.kind == "crops" else 6))
        at.op("features_cat", "copy", op.cat(tokens * self.projector.layers.in_features, at.dtype))
        columns, rows = (page.grid or (1, 1)) if view.kind == "crops" else (1, 1)
        if columns > 1:  # one column of tiles is in reading order already
            at.op("tile_order", "copy", op.copy(tokens * width, at.dtype))
        ends = rows * side * width
        at.op("newline_cat", "copy", op.cat((columns * side + 1) * ends, at.dtype, weights=ends))

    def decode(self, at: Scope, shape: SequenceShape) -> None:
        """Run the decoder on new positions."""
        self.embed_tokens.forward(at.child("embed_tokens"), shape.rows)
        at.op("position_ids", "embedding", op.fill(shape.positions, INT64) + op.view())
        for scope, index, layer in at.each("layers", self.layers):
            layer.forward(scope, shape, index)
        self.norm.forward(at.child("norm"), shape.rows)


@attrs.frozen
class OcrForCausalLM(Layer):
    """The model with its language head: the root."""

    model: OcrModel
    lm_head: Linear

    def score(self, at: Scope, shape: SequenceShape) -> None:
        """Logits of every new position, in fp32."""
        self.lm_head.forward(at.child("lm_head"), shape.rows)
        at.op("logits_to_fp32", "copy", op.cast(shape.rows * self.lm_head.out_features, at.dtype, FP32))


def ocr_model(config: ModelConfig) -> OcrForCausalLM:
    """Build the tree of layers."""
    decoder = config.decoder
    model = OcrModel(
        embed_tokens=Embedding(decoder.vocab_size, decoder.hidden_size),
        layers=decoder_layers(decoder),
        norm=RmsNorm(decoder.hidden_size),
        sam_model=sam_encoder(config.sam),
        vision_model=clip_encoder(config.clip),
        projector=VisionProjector(Linear(config.projector.input_dim, config.projector.output_dim, bias=True)),
    )
    return OcrForCausalLM(model, Linear(decoder.hidden_size, decoder.vocab_size, bias=False))
