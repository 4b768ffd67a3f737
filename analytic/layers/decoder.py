"""Mixture-of-experts decoder: Llama attention, DeepSeek-V2 MLP, router and norms."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, TypeVar

import attrs

from analytic import operators as op
from analytic.cost import FP32, INT64
from analytic.layers.base import Layer, LayerList
from analytic.layers.basic import Linear, RmsNorm, Silu

if TYPE_CHECKING:
    from analytic.config import DecoderConfig
    from analytic.cost import Size
    from analytic.layers.base import Scope, SequenceShape
    from analytic.routing import ExpertLoad

#: Views of attention by how it attends: six that make heads, two of the tables, one that joins the heads; and the
#: transposed result, or the three transposed operands. In eager attention the operator itself transposes.
_ATTENTION_VIEWS: Final = {"sdpa": 10, "eager": 9, "flash_attention_2": 12}


@attrs.frozen
class RotaryEmbedding(Layer):
    """Cosine and sine tables; every layer computes its own.

    Attributes
    ----------
    half_dim
        Frequencies: half of a head's width.
    """

    half_dim: int

    def forward(self, at: Scope, positions: Size) -> None:
        """Tables for `positions` positions."""
        at.op("rope_tables", "embedding", op.rope_tables(positions, self.half_dim, at.dtype), dtype=FP32)


@attrs.frozen
class DecoderAttention(Layer):
    """Causal self-attention with rotary positions and a key-value cache.

    Attributes
    ----------
    heads
        Heads of the queries.
    kv_heads
        Heads of keys and values.
    head_dim
        Width of one head.
    """

    heads: int
    kv_heads: int
    head_dim: int
    q_proj: Linear
    k_proj: Linear
    v_proj: Linear
    o_proj: Linear
    rotary_emb: RotaryEmbedding

    def forward(self, at: Scope, shape: SequenceShape) -> None:
        """Attend from the new positions to all cached ones."""
        for name, layer in (("q_proj", self.q_proj), ("k_proj", self.k_proj), ("v_proj", self.v_proj)):
            layer.forward(at.child(name), shape.rows)
        at.op("views", "other", op.view() * _ATTENTION_VIEWS[at.tape.policy.attention])
        self.rotary_emb.forward(at.child("rotary_emb"), shape.positions)
        for name, heads in (("rope_query", self.heads), ("rope_key", self.kv_heads)):
            half_dim = self.rotary_emb.half_dim
            cost = op.rope_apply(shape.rows * heads * half_dim, shape.positions * half_dim, at.dtype)
            at.op(name, "elementwise", cost)
        self._extend_cache(at, shape)
        self._attend(at, shape)
        self.o_proj.forward(at.child("o_proj"), shape.rows)

    def _extend_cache(self, at: Scope, shape: SequenceShape) -> None:
        """Keys and values, old and new, are copied into new tensors."""
        width = 2 * shape.batch * self.kv_heads * self.head_dim
        append = op.kv_cache_append(width * shape.cached, width * shape.positions, at.dtype)
        at.op("kv_cache_append", "copy", append)
        if self.kv_heads != self.heads:
            repeated = 2 * shape.batch * self.heads * self.head_dim * shape.cached
            at.op("kv_repeat", "copy", op.copy(repeated, at.dtype))

    def _attend(self, at: Scope, shape: SequenceShape) -> None:
        heads = shape.batch * self.heads
        if at.tape.policy.attention != "eager":
            counted = at.tape.policy.counted(causal=shape.causal)
            fused = op.sdpa(heads, shape.positions, shape.cached, self.head_dim, at.dtype, counted=counted)
            at.op("fused_attention", "attention", fused)
            return
        if shape.causal:
            mask = op.causal_mask(heads, shape.positions, shape.cached, at.dtype)
            at.op("causal_mask", "elementwise", mask)
        eager = op.attention_eager(heads, shape.positions, shape.cached, self.head_dim, at.dtype)
        at.op("eager_attention", "attention", eager)


@attrs.frozen
class GatedMlp(Layer):
    """Gated MLP: down(silu(gate(x)) * up(x)). Dense layers, experts and shared experts are all of this class."""

    gate_proj: Linear
    up_proj: Linear
    down_proj: Linear
    act_fn: Silu

    def forward(self, at: Scope, rows: Size) -> None:
        """Apply to `rows` vectors."""
        hidden = rows * self.gate_proj.out_features
        self.gate_proj.forward(at.child("gate_proj"), rows)
        self.act_fn.forward(at.child("act_fn"), hidden)
        self.up_proj.forward(at.child("up_proj"), rows)
        at.op("gate_multiply", "elementwise", op.elementwise(hidden, at.dtype, operands=2))
        self.down_proj.forward(at.child("down_proj"), rows)


@attrs.frozen
class DenseMlp(GatedMlp):
    """MLP of a layer without experts."""


@attrs.frozen
class RoutedExpert(GatedMlp):
    """One of the experts among which the router chooses."""


@attrs.frozen
class SharedExperts(GatedMlp):
    """The experts that see every token, joined into one MLP."""


SomeMlp = TypeVar("SomeMlp", bound=GatedMlp)


@attrs.frozen
class Router(Layer):
    """Softmax over all experts in fp32, of which the best k are kept.

    Attributes
    ----------
    width
        Elements of a token's vector.
    experts
        Experts to choose among.
    choices
        Experts that each token is sent to, k.
    """

    width: int
    experts: int
    choices: int

    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Weight (experts, width)."""
        return {"weight": (self.experts, self.width)}

    def forward(self, at: Scope, rows: Size) -> None:
        """Route `rows` vectors."""
        weight = self.experts * self.width
        at.op("views", "other", op.view())
        casts = op.cast(rows * self.width, at.dtype, FP32) + op.cast(weight, at.dtype, FP32, weights=weight)
        at.op("cast_to_fp32", "copy", casts)
        if at.dtype == FP32:
            product = op.linear(rows, self.width, self.experts, FP32)
        else:  # what it reads is no weight, but the copy that the cast has made
            product = op.bmm(1, rows, self.width, self.experts, FP32)
        at.op("router_linear", "linear", product, dtype=FP32)
        at.op("router_softmax", "activation", op.softmax(rows, self.experts, FP32, FP32), dtype=FP32)
        at.op("topk", "routing", op.topk(rows, self.experts, self.choices, FP32), dtype=FP32)
        at.op("scale", "elementwise", op.elementwise(rows * self.choices, FP32), dtype=FP32)


@attrs.frozen
class MixtureOfExperts(Layer):
    """Routed experts, dispatched by a loop on the host, and shared experts."""

    experts: LayerList[RoutedExpert]
    gate: Router
    shared_experts: SharedExperts

    def forward(self, at: Scope, rows: Size, load: ExpertLoad) -> None:
        """Apply to `rows` vectors, of which the experts get their `load`."""
        self.gate.forward(at.child("gate"), rows)
        at.op("views", "other", op.view() * 5)
        self._dispatch(at, rows)
        for number, forwards, tokens in load.groups(at.forwards):
            attrs.evolve(at, forwards=forwards).op("token_slices", "other", op.view())
            self.experts.layers[number].forward(at.child(f"experts.{number}", forwards), tokens)
        self._combine(at, rows)
        self.shared_experts.forward(at.child("shared_experts"), rows)
        elements = rows * self.gate.width
        at.op("add_shared", "elementwise", op.elementwise(elements, at.dtype, operands=2))

    def _dispatch(self, at: Scope, rows: Size) -> None:
        """Count the tokens of each expert, sort the tokens by expert, tell the host the counts."""
        experts, picks = self.gate.experts, rows * self.gate.choices
        at.op("count_zeros", "copy", op.fill(rows * experts, INT64))
        at.op("count_scatter", "routing", op.scatter(picks, 1, INT64))
        at.op("count_sum", "reduction", op.reduction(rows * experts, experts, INT64))
        at.op("argsort", "routing", op.sort(picks))
        at.op("token_of_pick", "elementwise", op.elementwise(picks, INT64))
        at.op("gather_tokens", "routing", op.gather(picks, self.gate.width, at.dtype))
        at.op("counts_to_host", "copy", op.to_host(experts, INT64))
        at.op("expert_loop", "other", op.host_loop(experts))

    def _combine(self, at: Scope, rows: Size) -> None:
        """Put the answers back into the tokens' order, weigh them in fp32 and sum them."""
        width, picks = self.gate.width, rows * self.gate.choices
        at.op("answers_cat", "copy", op.cat(picks * width, at.dtype))
        at.op("answers_index_put", "routing", op.index_put(picks, width, at.dtype))
        at.op("answers_to_fp32", "copy", op.cast(picks * width, at.dtype, FP32))
        at.op("answers_weigh", "elementwise", op.elementwise(picks * width, FP32, shared=picks), dtype=FP32)
        at.op("answers_sum", "reduction", op.reduction(picks * width, rows * width, FP32), dtype=FP32)
        at.op("sum_from_fp32", "copy", op.cast(rows * width, FP32, at.dtype))


@attrs.frozen
class DecoderLayer(Layer):
    """Pre-norm layer with a dense or a mixture-of-experts MLP."""

    self_attn: DecoderAttention
    mlp: DenseMlp | MixtureOfExperts
    input_layernorm: RmsNorm
    post_attention_layernorm: RmsNorm

    def forward(self, at: Scope, shape: SequenceShape, index: int) -> None:
        """Apply as layer number `index`."""
        residual = op.elementwise(shape.rows * self.input_layernorm.width, at.dtype, operands=2)
        self.input_layernorm.forward(at.child("input_layernorm"), shape.rows)
        self.self_attn.forward(at.child("self_attn"), shape)
        at.op("residual_attention", "elementwise", residual)
        self.post_attention_layernorm.forward(at.child("post_attention_layernorm"), shape.rows)
        if isinstance(self.mlp, MixtureOfExperts):
            self.mlp.forward(at.child("mlp"), shape.rows, shape.loads[index])
        else:
            self.mlp.forward(at.child("mlp"), shape.rows)
        at.op("residual_mlp", "elementwise", residual)


def _mlp(kind: type[SomeMlp], width: int, hidden: int) -> SomeMlp:
    return kind(
        gate_proj=Linear(width, hidden, bias=False),
        up_proj=Linear(width, hidden, bias=False),
        down_proj=Linear(hidden, width, bias=False),
        act_fn=Silu(),
    )


def decoder_layers(config: DecoderConfig) -> LayerList[DecoderLayer]:
    """Build all layers."""
    width, kv_width = config.hidden_size, config.kv_heads * config.head_dim
    attention = DecoderAttention(
        heads=config.heads,
        kv_heads=config.kv_heads,
        head_dim=config.head_dim,
        q_proj=Linear(width, width, bias=False),
        k_proj=Linear(width, kv_width, bias=False),
        v_proj=Linear(width, kv_width, bias=False),
        o_proj=Linear(width, width, bias=False),
        rotary_emb=RotaryEmbedding(config.head_dim // 2),
    )
    hidden = config.expert_intermediate_size
    moe = MixtureOfExperts(
        experts=LayerList((_mlp(RoutedExpert, width, hidden),) * config.routed_experts),
        gate=Router(width, config.routed_experts, config.experts_per_token),
        shared_experts=_mlp(SharedExperts, width, hidden * config.shared_experts),
    )
    dense = _mlp(DenseMlp, width, config.dense_intermediate_size)
    norm = RmsNorm(width)
    return LayerList(
        tuple(
            DecoderLayer(attention, moe if index in config.moe_layers else dense, norm, norm)
            for index in range(config.layers)
        )
    )
