"""Llama decoders, as transformers 5 runs them: an example of a model family that a package of its own adds."""
# ruff: noqa: INP001  one module is the whole package

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import attrs

from analytic import operators as op
from analytic.config import ExpertSizes
from analytic.cost import BOOL, FP32, INT64
from analytic.errors import InputError
from analytic.families.base import ModelFamily
from analytic.layers.base import Layer, LayerList
from analytic.layers.basic import Embedding, Linear, RmsNorm, Silu
from analytic.layers.decoder import GatedMlp

if TYPE_CHECKING:
    from collections.abc import Mapping

    from analytic.cost import Size
    from analytic.layers.base import Scope, SequenceShape, Tape


@attrs.frozen
class LlamaConfig:
    """Dimensions of a Llama decoder, by their names in ``config.json``."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    torch_dtype: str

    @property
    def max_positions(self) -> int:
        """Positions that the model was made for."""
        return self.max_position_embeddings

    @property
    def experts(self) -> ExpertSizes:
        """None: the model is dense."""
        return ExpertSizes()


def read_config(raw: Mapping[str, Any], origin: str) -> LlamaConfig:
    """Dimensions from a parsed ``config.json``; what may be missing there has the default of transformers."""
    heads, width = raw.get("num_attention_heads"), raw.get("hidden_size")
    sizes = {
        "vocab_size": raw.get("vocab_size"),
        "hidden_size": width,
        "intermediate_size": raw.get("intermediate_size"),
        "num_hidden_layers": raw.get("num_hidden_layers"),
        "num_attention_heads": heads,
        "num_key_value_heads": raw.get("num_key_value_heads") or heads,
        "max_position_embeddings": raw.get("max_position_embeddings", 2048),
    }
    for name, value in sizes.items():
        if not isinstance(value, int) or value < 1:
            raise InputError(f"{origin}: {name} is {value!r}, it must be a positive whole number")
    if sizes["num_attention_heads"] % sizes["num_key_value_heads"]:
        raise InputError(f"{origin}: {heads} heads do not share {sizes['num_key_value_heads']} key-value heads")
    if raw.get("hidden_act", "silu") != "silu":
        raise InputError(f"{origin}: hidden_act is {raw['hidden_act']!r}, there are formulas for silu only")
    return LlamaConfig(
        **sizes,
        head_dim=raw.get("head_dim") or sizes["hidden_size"] // sizes["num_attention_heads"],
        tie_word_embeddings=raw.get("tie_word_embeddings", False),
        attention_bias=raw.get("attention_bias", False),
        mlp_bias=raw.get("mlp_bias", False),
        # Renamed in transformers 5.
        torch_dtype=raw.get("dtype") or raw.get("torch_dtype") or "float32",
    )


@attrs.frozen
class LlamaRotary(Layer):
    """Cosine and sine tables, made once for all layers. The angles are a broadcast product, not a matrix product."""

    half_dim: int

    def forward(self, at: Scope, positions: Size) -> None:
        """Tables for `positions` positions."""
        angles, table = positions * self.half_dim, 2 * positions * self.half_dim
        steps = (
            op.cast(positions, INT64, FP32)
            + op.elementwise(angles, FP32)
            + op.cat(table, FP32)
            + op.elementwise(table, FP32) * 4
            + op.cast(table, FP32, at.dtype) * 2
        )
        at.op("rope_tables", "embedding", steps, dtype=FP32)


@attrs.frozen
class LlamaAttention(Layer):
    """Causal self-attention whose query heads may share keys and values."""

    heads: int
    kv_heads: int
    head_dim: int
    q_proj: Linear
    k_proj: Linear
    v_proj: Linear
    o_proj: Linear

    def forward(self, at: Scope, shape: SequenceShape) -> None:
        """Attend from the new positions to all cached ones."""
        for name, layer in (("q_proj", self.q_proj), ("k_proj", self.k_proj), ("v_proj", self.v_proj)):
            layer.forward(at.child(name), shape.rows)
        half = self.head_dim // 2
        for name, heads in (("rope_query", self.heads), ("rope_key", self.kv_heads)):
            at.op(name, "elementwise", op.rope_apply(shape.rows * heads * half, shape.positions * half, at.dtype))
        width = 2 * shape.batch * self.kv_heads * self.head_dim
        append = op.kv_cache_append(width * shape.cached, width * shape.positions, at.dtype)
        at.op("kv_cache_append", "copy", append)
        self._attend(at, shape)
        self.o_proj.forward(at.child("o_proj"), shape.rows)

    def _attend(self, at: Scope, shape: SequenceShape) -> None:
        heads = shape.batch * self.heads
        sizes = (heads, shape.positions, shape.cached, self.head_dim, at.dtype)
        if at.tape.policy.attention != "eager":  # fused kernels read shared keys and values as they are
            counted = at.tape.policy.counted(causal=shape.causal)
            at.op("fused_attention", "attention", op.sdpa(*sizes, counted=counted))
            return
        if self.kv_heads != self.heads:
            at.op("kv_repeat", "copy", op.copy(2 * heads * self.head_dim * shape.cached, at.dtype))
        mask = shape.positions * shape.cached
        at.op("mask_add", "elementwise", op.elementwise(heads * mask, at.dtype, shared=mask))
        at.op("eager_attention", "attention", op.attention_eager(*sizes))


@attrs.frozen
class LlamaLayer(Layer):
    """Pre-norm layer of attention and gated MLP."""

    self_attn: LlamaAttention
    mlp: GatedMlp
    input_layernorm: RmsNorm
    post_attention_layernorm: RmsNorm

    def forward(self, at: Scope, shape: SequenceShape) -> None:
        """Apply to the new positions."""
        residual = op.elementwise(shape.rows * self.input_layernorm.width, at.dtype, operands=2)
        self.input_layernorm.forward(at.child("input_layernorm"), shape.rows)
        self.self_attn.forward(at.child("self_attn"), shape)
        at.op("residual_attention", "elementwise", residual)
        self.post_attention_layernorm.forward(at.child("post_attention_layernorm"), shape.rows)
        self.mlp.forward(at.child("mlp"), shape.rows)
        at.op("residual_mlp", "elementwise", residual)


@attrs.frozen
class LlamaDecoder(Layer):
    """Embedding, layers and last norm."""

    embed_tokens: Embedding
    layers: LayerList[LlamaLayer]
    norm: RmsNorm
    rotary_emb: LlamaRotary

    def forward(self, at: Scope, shape: SequenceShape) -> None:
        """Apply to the new positions."""
        self.embed_tokens.forward(at.child("embed_tokens"), shape.rows)
        position_ids = op.fill(shape.positions, INT64) + op.elementwise(shape.positions, INT64)
        at.op("position_ids", "embedding", position_ids)
        if at.tape.policy.attention == "eager":  # one mask for all layers, also for a single position
            mask = shape.positions * shape.cached
            at.op("causal_mask", "elementwise", op.elementwise(mask, BOOL) + op.fill(mask, at.dtype))
        self.rotary_emb.forward(at.child("rotary_emb"), shape.positions)
        for scope, _, layer in at.each("layers", self.layers):
            layer.forward(scope, shape)
        self.norm.forward(at.child("norm"), shape.rows)


@attrs.frozen
class TiedHead(Linear):
    """Language head on the embedding's own weight."""

    def parameters(self) -> dict[str, tuple[int, ...]]:
        """None of its own."""
        return {}


@attrs.frozen
class LlamaForCausalLM(Layer):
    """The decoder with its language head: the root."""

    model: LlamaDecoder
    lm_head: Linear

    def forward(self, at: Scope, shape: SequenceShape) -> None:
        """Logits of every new position, which is what transformers does unless told otherwise."""
        self.model.forward(at.child("model"), shape)
        self.lm_head.forward(at.child("lm_head"), shape.rows)


def build(config: LlamaConfig) -> LlamaForCausalLM:
    """Tree of layers."""
    width, bias = config.hidden_size, config.attention_bias
    query, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    layer = LlamaLayer(
        self_attn=LlamaAttention(
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            q_proj=Linear(width, query, bias=bias),
            k_proj=Linear(width, keys, bias=bias),
            v_proj=Linear(width, keys, bias=bias),
            o_proj=Linear(query, width, bias=bias),
        ),
        mlp=GatedMlp(
            gate_proj=Linear(width, config.intermediate_size, bias=config.mlp_bias),
            up_proj=Linear(width, config.intermediate_size, bias=config.mlp_bias),
            down_proj=Linear(config.intermediate_size, width, bias=config.mlp_bias),
            act_fn=Silu(),
        ),
        input_layernorm=RmsNorm(width),
        post_attention_layernorm=RmsNorm(width),
    )
    decoder = LlamaDecoder(
        embed_tokens=Embedding(config.vocab_size, width),
        layers=LayerList((layer,) * config.num_hidden_layers),
        norm=RmsNorm(width),
        rotary_emb=LlamaRotary(config.head_dim // 2),
    )
    head = TiedHead if config.tie_word_embeddings else Linear
    return LlamaForCausalLM(decoder, head(width, config.vocab_size, bias=False))


class Llama(ModelFamily):
    """Dense decoders with rotary positions and grouped queries."""

    name = "llama"
    architectures = ("LlamaForCausalLM",)
    layers: ClassVar[Mapping[str, tuple[type[Layer], ...]]] = {
        "LlamaForCausalLM": (LlamaForCausalLM,),
        "LlamaModel": (LlamaDecoder,),
        "LlamaDecoderLayer": (LlamaLayer,),
        "LlamaAttention": (LlamaAttention,),
        "LlamaMLP": (GatedMlp,),
        "LlamaRMSNorm": (RmsNorm,),
        "LlamaRotaryEmbedding": (LlamaRotary,),
        "SiLUActivation": (Silu,),
        "Linear": (Linear, TiedHead),
        "Embedding": (Embedding,),
        "ModuleList": (LayerList,),
    }

    def read_config(self, raw: Mapping[str, Any], origin: str) -> LlamaConfig:
        """Dimensions from a parsed ``config.json``."""
        return read_config(raw, origin)

    def build(self, config: LlamaConfig) -> LlamaForCausalLM:
        """Tree of layers."""
        return build(config)

    def prefill(self, root: LlamaForCausalLM, tape: Tape, shape: SequenceShape, image_tokens: Size) -> None:
        """One forward over the whole prompt."""
        del image_tokens  # a text model: whatever fills the prompt, its positions count
        root.forward(tape.enter(1), shape)

    def decode(self, root: LlamaForCausalLM, tape: Tape, shape: SequenceShape, forwards: Size) -> None:
        """One position of each prompt per forward."""
        root.forward(tape.enter(forwards), shape)
