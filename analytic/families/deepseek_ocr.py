"""DeepSeek-OCR: the table of its classes, and what its stages run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from analytic.config import ModelConfig
from analytic.families.base import ModelFamily
from analytic.layers import basic, clip, decoder, ocr, sam
from analytic.layers.base import LayerList
from analytic.layers.ocr import OcrForCausalLM, ocr_model

if TYPE_CHECKING:
    from collections.abc import Mapping

    from analytic.cost import Size
    from analytic.crops import PageLayout
    from analytic.layers.base import Layer, SequenceShape, Tape


class DeepseekOcr(ModelFamily):
    """SAM and CLIP encoders, a projector, and a mixture-of-experts decoder."""

    name = "deepseek-ocr"
    architectures = ("DeepseekOCRForCausalLM",)
    layers: ClassVar[Mapping[str, tuple[type[Layer], ...]]] = {
        "Linear": (basic.Linear,),
        "Conv2d": (basic.Conv2d,),
        "LayerNorm": (basic.LayerNorm,),
        "LayerNorm2d": (basic.LayerNorm2d,),
        "Embedding": (basic.Embedding,),
        "GELU": (basic.Gelu,),
        "SiLU": (basic.Silu,),
        "ModuleList": (LayerList,),
        "ImageEncoderViT": (sam.SamEncoder,),
        "PatchEmbed": (sam.SamPatchEmbed,),
        "Block": (sam.SamBlock,),
        "Attention": (sam.SamAttention,),
        "MLPBlock": (sam.SamMlp,),
        "Sequential": (sam.SamNeck,),
        "VitModel": (clip.ClipEncoder,),
        "CLIPVisionEmbeddings": (clip.ClipEmbeddings,),
        "NoTPTransformer": (clip.ClipTransformer,),
        "NoTPTransformerBlock": (clip.ClipBlock,),
        "NoTPAttention": (clip.ClipAttention,),
        "NoTPFeedForward": (clip.ClipMlp,),
        "MlpProjector": (ocr.VisionProjector,),
        "DeepseekV2DecoderLayer": (decoder.DecoderLayer,),
        "LlamaAttention": (decoder.DecoderAttention,),
        "LlamaFlashAttention2": (decoder.DecoderAttention,),  # the published code's, before transformers 4.48
        "LlamaRotaryEmbedding": (decoder.RotaryEmbedding,),
        "DeepseekV2MLP": (decoder.DenseMlp, decoder.RoutedExpert, decoder.SharedExperts),
        "DeepseekV2MoE": (decoder.MixtureOfExperts,),
        "MoEGate": (decoder.Router,),
        "DeepseekV2RMSNorm": (basic.RmsNorm,),
        "DeepseekOCRModel": (ocr.OcrModel,),
        "DeepseekOCRForCausalLM": (OcrForCausalLM,),
    }

    parts: ClassVar[Mapping[str, str]] = {
        r"model\.sam_model": "SAM",
        r"model\.vision_model": "CLIP",
        r"model\.projector": "projector",
        r"model\.layers\.\d+\.self_attn": "attention",
        r"model\.layers\.\d+\.mlp": "experts",
        r"lm_head": "language head",
    }

    def read_config(self, raw: Mapping[str, Any], origin: str) -> ModelConfig:
        """Dimensions from a parsed ``config.json``."""
        return ModelConfig.from_dict(raw, origin=origin)

    def build(self, config: ModelConfig) -> OcrForCausalLM:
        """Tree of layers."""
        return ocr_model(config)

    def encode_page(self, root: OcrForCausalLM, tape: Tape, page: PageLayout, pages: Size) -> None:
        """Each view batch of each page is a call of its own."""
        for view in page.views:
            root.model.encode_view(tape.at("model", pages), view)

    def place_page(self, root: OcrForCausalLM, tape: Tape, page: PageLayout, pages: Size) -> None:
        """Features are put into reading order, page by page."""
        root.model.lay_out(tape.at("model", pages), page)

    def prefill(self, root: OcrForCausalLM, tape: Tape, shape: SequenceShape, image_tokens: Size) -> None:
        """Features are put into the prompts; then the decoder, and the language head on every position."""
        at = tape.enter(1)
        inner = at.child("model")
        root.model.insert(tape.at("model", shape.batch), shape.positions, image_tokens)
        root.model.decode(inner, shape)
        root.score(at, shape)

    def decode(self, root: OcrForCausalLM, tape: Tape, shape: SequenceShape, forwards: Size) -> None:
        """The decoder and the language head on one position of each prompt."""
        at = tape.enter(forwards)
        root.model.decode(at.child("model"), shape)
        root.score(at, shape)
