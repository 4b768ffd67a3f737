"""Mixture-of-experts decoder: Llama attention, DeepSeek-V2 MLP, router and norms."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import DynamicCache

    from analytic.config import DecoderConfig


#: Factor of rotary tables and of router weights in every published configuration.
_SCALING: Final = 1.0


class DeepseekV2RMSNorm(nn.Module):
    """Root-mean-square norm in fp32, cast back before the weight is applied."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class LlamaRotaryEmbedding(nn.Module):
    """Cosine and sine tables of rotary positions; every layer has its own and computes them anew."""

    inv_freq: Tensor

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.theta, self.head_dim = config.rope_theta, config.head_dim
        self.register_buffer("inv_freq", self.frequencies(), persistent=False)

    def frequencies(self) -> Tensor:
        """Inverse frequencies (head_dim / 2,) in fp32 (RoFormer, arXiv 2104.09864, section 3.2.2)."""
        # On the CPU even where parameters are only sketched on the meta device: its values are needed.
        exponent = torch.arange(0, self.head_dim, 2, device="cpu").float() / self.head_dim
        return 1.0 / self.theta**exponent

    @torch.no_grad()
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Tables (B, T, head_dim) in the dtype of `x` for positions (B, T)."""
        frequencies = self.inv_freq[None, :, None].float().expand(position_ids.shape[0], -1, 1)
        angles = (frequencies @ position_ids[:, None, :].float()).transpose(1, 2)
        angles = torch.cat((angles, angles), dim=-1)
        # By one, but the published code multiplies: the operator sequence is part of what is measured.
        cos, sin = angles.cos() * _SCALING, angles.sin() * _SCALING
        return cos.to(x.dtype), sin.to(x.dtype)


def _rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return (x * cos) + (_rotate_half(x) * sin)


def _causal_mask(query: Tensor, key: Tensor) -> Tensor | None:
    """Additive mask (T, S) for the last T of S positions; None where every position may be seen."""
    length, total = query.shape[2], key.shape[2]
    if length == 1:
        return None
    mask = torch.full((length, total), torch.finfo(query.dtype).min, dtype=query.dtype, device=query.device)
    return mask.triu_(total - length + 1)


def _eager(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    scores = torch.matmul(query, key.transpose(2, 3)) / math.sqrt(query.shape[-1])
    mask = _causal_mask(query, key)
    if mask is not None:
        scores = scores + mask
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    return torch.matmul(weights, value).transpose(1, 2).contiguous()


def _sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    length, total = query.shape[2], key.shape[2]
    mask = _causal_mask(query, key) if length < total else None
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=length == total and length > 1)
    return out.transpose(1, 2).contiguous()


def _flash(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    from flash_attn import flash_attn_func  # noqa: PLC0415  an optional extra

    out: Tensor = flash_attn_func(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), causal=True)
    return out


#: How the decoder attends; (B, heads, T, D) x (B, heads, S, D) to (B, T, heads, D).
ATTENTION_IMPLEMENTATIONS: Final[dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]] = {
    "sdpa": _sdpa,
    "eager": _eager,
    "flash_attention_2": _flash,
}


class LlamaAttention(nn.Module):
    """Causal self-attention with rotary positions and a key-value cache."""

    def __init__(self, config: DecoderConfig, layer: int, attention: str) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.groups = config.heads // config.kv_heads
        self.attend = ATTENTION_IMPLEMENTATIONS[attention]
        width, kv_width = config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=False)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=False)
        self.rotary_emb = LlamaRotaryEmbedding(config)

    def forward(self, x: Tensor, position_ids: Tensor, cache: DynamicCache | None) -> Tensor:
        """Attend from (B, T, hidden) to the cached positions and to itself."""
        batch, length, _ = x.shape
        query, key, value = (
            projection(x).view(batch, length, -1, self.head_dim).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        cos, sin = self.rotary_emb(value, position_ids)
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        query, key = _rotate(query, cos, sin), _rotate(key, cos, sin)
        if cache is not None:
            key, value = cache.update(key, value, self.layer)
        if self.groups > 1:
            key, value = (part.repeat_interleave(self.groups, dim=1) for part in (key, value))
        out: Tensor = self.o_proj(self.attend(query, key, value).reshape(batch, length, -1))
        return out


class DeepseekV2MLP(nn.Module):
    """Gated MLP: down(silu(gate(x)) * up(x)). Dense layers, experts and shared experts are all of this class."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., width) to (..., width)."""
        out: Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return out


class MoEGate(nn.Module):
    """Router: softmax over all experts in fp32, the best k kept without renormalisation."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.experts_per_token = config.experts_per_token
        self.weight = nn.Parameter(torch.empty(config.routed_experts, config.hidden_size))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Expert ids and weights, each (B*T, k), for (B, T, hidden)."""
        flat = x.view(-1, x.shape[-1])
        logits = F.linear(flat.type(torch.float32), self.weight.type(torch.float32))
        scores = logits.softmax(dim=-1, dtype=torch.float32)
        weights, ids = torch.topk(scores, k=self.experts_per_token, dim=-1, sorted=False)
        return ids, weights * _SCALING


class DeepseekV2MoE(nn.Module):
    """Routed experts, dispatched by a loop on the host, and shared experts that see every token."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        width, hidden = config.hidden_size, config.expert_intermediate_size
        self.experts = nn.ModuleList(DeepseekV2MLP(width, hidden) for _ in range(config.routed_experts))
        self.gate = MoEGate(config)
        self.shared_experts = DeepseekV2MLP(width, hidden * config.shared_experts)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, hidden) to the same shape."""
        ids, weights = self.gate(x)
        routed = self._dispatch(x.view(-1, x.shape[-1]), ids, weights).view(x.shape)
        out: Tensor = routed + self.shared_experts(x)
        return out

    def _dispatch(self, tokens: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Send each token (N, hidden) to its k experts and sum their weighted answers."""
        counts = ids.new_zeros((ids.shape[0], len(self.experts)))
        counts.scatter_(1, ids, 1)
        tokens_per_expert = counts.sum(dim=0)
        order = ids.view(-1).argsort()
        sorted_tokens = tokens[order // ids.shape[1]]
        outputs, start = [], 0
        # The host must know the counts before it can launch: on CUDA it waits here, once per layer and forward.
        for expert, count in enumerate(tokens_per_expert.tolist()):
            if count:
                outputs.append(self.experts[expert](sorted_tokens[start : start + count]))
                start += count
        answers = torch.cat(outputs, dim=0)
        scattered = torch.empty_like(answers)
        scattered[order] = answers
        weighted = scattered.view(*ids.shape, -1).type(weights.dtype).mul_(weights.unsqueeze(-1))
        return weighted.sum(dim=1).type(answers.dtype)


class DeepseekV2DecoderLayer(nn.Module):
    """Pre-norm decoder layer with a dense or a mixture-of-experts MLP."""

    def __init__(self, config: DecoderConfig, layer: int, attention: str) -> None:
        super().__init__()
        self.self_attn = LlamaAttention(config, layer, attention)
        self.mlp: nn.Module = (
            DeepseekV2MoE(config)
            if layer in config.moe_layers
            else DeepseekV2MLP(config.hidden_size, config.dense_intermediate_size)
        )
        self.input_layernorm = DeepseekV2RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = DeepseekV2RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, position_ids: Tensor, cache: DynamicCache | None) -> Tensor:
        """Map (B, T, hidden) to the same shape."""
        x = x + self.self_attn(self.input_layernorm(x), position_ids, cache)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out
