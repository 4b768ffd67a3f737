"""How torch runs each operator: one function for each makes its operands and gives a call of it.

Each call does what the built-in model's code does, with the same layouts, and returns what it has made. Operators that
the model has as a function or a class of its own are run as that.
"""

from __future__ import annotations

import math
from functools import partial
from itertools import cycle
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import attrs
import torch
import torch.nn.functional as F

from analytic.config import DEFAULT_VARIANT, variant_config
from stage_runners.calibration.operands import Operands
from stage_runners.calibration.stopwatches import Call
from stage_runners.deepseek_ocr.clip import quick_gelu as clip_quick_gelu
from stage_runners.deepseek_ocr.decoder import DeepseekV2RMSNorm, LlamaRotaryEmbedding, _causal_mask, _rotate
from stage_runners.deepseek_ocr.sam import LayerNorm2d

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from stage_runners.calibration.operands import Buffer

#: One call of an operator; returns its results.
Run: TypeAlias = "Callable[[], Any]"

#: Widths that the built-in model gives to what a formula counts in elements only.
_HEAD_DIM: Final = 128
_WIDTH: Final = 1280
#: Choices per token, which the indices of its router come in.
_CHOICES: Final = 6
_EXPERTS: Final = 64
#: Least rows of a table that is looked up.
_TABLE: Final = 1024
#: Channels of a map that a convolution has made.
_CHANNELS: Final = 1024
_EPS: Final = 1e-6
_BICUBIC_TAPS: Final = 16
_MAX_SUMS: Final = 2


def call_of(operator: str, arguments: Mapping[str, int | str | bool], buffer: Buffer) -> Call:
    """Make the operands of an operator, and give a call of it.

    Parameters
    ----------
    operator
        One of `EXECUTORS`.
    arguments
        What its formula is given, by parameter; dtypes by their names.
    buffer
        Where the operands lie.

    Raises
    ------
    OperandsTooLargeError
        If they do not fit there.
    """
    dtypes = {name: getattr(torch, str(arguments[name])) for name in ("dtype", "source", "target") if name in arguments}
    make = Operands(buffer)
    run = EXECUTORS[operator](make, **(dict(arguments) | dtypes))
    return Call(run, tuple(make.warm))


def linear(make: Operands, *, rows: int, in_features: int, out_features: int, dtype: torch.dtype, bias: bool) -> Run:
    """With cold weights: a model reads each weight once per forward, and is larger than any cache."""
    x = make.tensor(dtype, 1, rows, in_features)
    offset = make.tensor(dtype, out_features) if bias else None
    weights = cycle(make.cold(dtype, out_features, in_features))
    return lambda: F.linear(x, next(weights), offset)


def bmm(make: Operands, *, batch: int, rows: int, inner: int, columns: int, dtype: torch.dtype) -> Run:
    """The second operand is transposed; a single pair is multiplied as the router does it."""
    left, right = make.tensor(dtype, batch, rows, inner), make.tensor(dtype, batch, columns, inner)
    if batch == 1:
        return lambda: F.linear(left[0], right[0])
    return lambda: torch.bmm(left, right.transpose(1, 2))


def conv2d(
    make: Operands,
    *,
    images: int,
    in_channels: int,
    out_channels: int,
    kernel: int,
    in_side: int,
    out_side: int,
    dtype: torch.dtype,
    bias: bool,
) -> Run:
    """Stride and padding follow from the sides; all but the first convolution get their channels last."""
    stride = round(in_side / out_side)
    padding = max(0, ((out_side - 1) * stride + kernel - in_side + 1) // 2)
    if in_channels == 3:
        x = make.tensor(dtype, images, in_channels, in_side, in_side)
    else:
        x = make.tensor(dtype, images, in_side, in_side, in_channels).permute(0, 3, 1, 2)
    offset = make.tensor(dtype, out_channels) if bias else None
    weights = cycle(make.cold(dtype, out_channels, in_channels, kernel, kernel))
    return lambda: F.conv2d(x, next(weights), offset, stride, padding)


def embedding(make: Operands, *, rows: int, width: int, dtype: torch.dtype) -> Run:
    """Rows of a table that no cache holds."""
    entries = max(rows, _TABLE)
    tables, ids = cycle(make.cold(dtype, entries, width)), make.indices(entries, rows)
    return lambda: F.embedding(ids, next(tables))


def _heads(make: Operands, heads: int, positions: int, head_dim: int, dtype: torch.dtype) -> Tensor:
    """(1, heads, T, D), as it comes from a projection: each position's heads lie side by side."""
    return make.tensor(dtype, 1, positions, heads, head_dim).transpose(1, 2)


def sdpa(
    make: Operands, *, heads: int, queries: int, keys: int, head_dim: int, dtype: torch.dtype, counted: str
) -> Run:
    """Causal where the triangle counts."""
    query = _heads(make, heads, queries, head_dim, dtype)
    key, value = (make.tensor(dtype, 1, heads, keys, head_dim) for _ in range(2))
    causal = counted == "triangle"
    return lambda: F.scaled_dot_product_attention(query, key, value, is_causal=causal)


def sdpa_with_bias(make: Operands, *, heads: int, queries: int, keys: int, head_dim: int, dtype: torch.dtype) -> Run:
    """The bias has one entry per score."""
    query, key, value = (make.tensor(dtype, 1, heads, count, head_dim) for count in (queries, keys, keys))
    bias = make.tensor(dtype, 1, heads, queries, keys)
    return lambda: F.scaled_dot_product_attention(query, key, value, attn_mask=bias)


def attention_eager(make: Operands, *, heads: int, queries: int, keys: int, head_dim: int, dtype: torch.dtype) -> Run:
    """What the model's eager attention does besides its mask, which is an operator of its own."""
    query = _heads(make, heads, queries, head_dim, dtype)
    key, value = (make.tensor(dtype, 1, heads, keys, head_dim) for _ in range(2))

    def attend() -> Tensor:
        scores = torch.matmul(query, key.transpose(2, 3)) / math.sqrt(head_dim)
        weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(dtype)
        return torch.matmul(weights, value).transpose(1, 2).contiguous()

    return attend


def causal_mask(make: Operands, *, heads: int, queries: int, keys: int, dtype: torch.dtype) -> Run:
    """The mask is made and added."""
    query, key = make.tensor(dtype, 1, 1, queries, 1), make.tensor(dtype, 1, 1, keys, 1)
    scores = make.tensor(dtype, 1, heads, queries, keys)

    def masked() -> Tensor:
        mask = _causal_mask(query, key)
        return scores if mask is None else scores + mask

    return masked


def rope_tables(make: Operands, *, positions: int, half_dim: int, dtype: torch.dtype) -> Run:
    """The model's module."""
    config = attrs.evolve(variant_config(DEFAULT_VARIANT).decoder, hidden_size=2 * half_dim, heads=1)
    module = LlamaRotaryEmbedding(config).to(make.device, dtype)
    x, ids = make.tensor(dtype, 1), torch.arange(positions, device=make.device)[None]
    return lambda: module.forward(x, ids)


def rope_apply(make: Operands, *, pairs: int, table_pairs: int, dtype: torch.dtype) -> Run:
    """The model's function."""
    width = math.gcd(2 * table_pairs, _HEAD_DIM)
    positions, heads = 2 * table_pairs // width, pairs // table_pairs
    x = _heads(make, heads, positions, width, dtype)
    cos, sin = (make.tensor(dtype, 1, positions, width).unsqueeze(1) for _ in range(2))
    return lambda: _rotate(x, cos, sin)


def rms_norm(make: Operands, *, rows: int, width: int, dtype: torch.dtype) -> Run:
    """The model's module."""
    module, x = make.module(DeepseekV2RMSNorm(width, _EPS), dtype), make.tensor(dtype, 1, rows, width)
    return partial(module.forward, x)


def layer_norm(make: Operands, *, rows: int, width: int, dtype: torch.dtype, permuted: bool) -> Run:
    """With scale and shift."""
    x = make.tensor(dtype, width, rows).t() if permuted else make.tensor(dtype, rows, width)
    weight, bias = (make.tensor(dtype, width) for _ in range(2))
    return lambda: F.layer_norm(x, (width,), weight, bias)


def layer_norm_2d(make: Operands, *, pixels: int, channels: int, dtype: torch.dtype) -> Run:
    """The model's module on an image with its channels last."""
    side = math.gcd(pixels, 64)
    module = make.module(LayerNorm2d(channels, _EPS), dtype)
    x = make.tensor(dtype, 1, pixels // side, side, channels).permute(0, 3, 1, 2)
    return partial(module.forward, x)


def gelu(make: Operands, *, elements: int, dtype: torch.dtype) -> Run:
    """One kernel."""
    x = make.tensor(dtype, elements)
    return partial(F.gelu, x)


def silu(make: Operands, *, elements: int, dtype: torch.dtype) -> Run:
    """One kernel."""
    x = make.tensor(dtype, elements)
    return partial(F.silu, x)


def quick_gelu(make: Operands, *, elements: int, dtype: torch.dtype) -> Run:
    """The model's function."""
    x = make.tensor(dtype, elements)
    return partial(clip_quick_gelu, x)


def softmax(make: Operands, *, rows: int, width: int, source: torch.dtype, target: torch.dtype) -> Run:
    """Over the last dimension."""
    x = make.tensor(source, rows, width)
    return lambda: x.softmax(dim=-1, dtype=target)


def _numbers(make: Operands, dtype: torch.dtype, *shape: int) -> Tensor:
    return make.tensor(dtype, *shape) if dtype.is_floating_point else make.indices(_EXPERTS, *shape)


def elementwise(
    make: Operands,
    *,
    elements: int,
    dtype: torch.dtype,
    operands: int,
    shared: int,
    weights: int,
    permuted: bool,
    **_: int,
) -> Run:
    """Sum or product, by what goes in: two operands; one and a scalar; one and a broadcast one; only broadcast ones."""
    broadcast = shared + weights
    if operands == 0:  # rows and columns of square maps, as a bias of relative positions is put together
        side = 2 * elements // broadcast
        maps = elements // side**2
        rows, columns = _numbers(make, dtype, maps, side, 1), _numbers(make, dtype, maps, 1, side)
        return lambda: rows + columns
    if permuted:
        channels = math.gcd(elements, _CHANNELS)
        x, y = (
            make.tensor(dtype, channels, elements // channels).t(),
            make.tensor(dtype, elements // channels, channels),
        )
        return lambda: x + y
    x = _numbers(make, dtype, elements)
    if operands > 1:
        y = _numbers(make, dtype, elements)
        return lambda: x + y
    if broadcast:
        table, factor = x.view(-1, broadcast), _numbers(make, dtype, broadcast)
        return lambda: table * factor
    # The one operator of the model with whole numbers and a scalar tells from which token a choice came.
    return (lambda: x * 0.5) if dtype.is_floating_point else (lambda: x // _CHOICES)


def reduction(make: Operands, *, elements: int, results: int, dtype: torch.dtype) -> Run:
    """Sums, by what comes out: one or two numbers, as of images; counts of experts; rows that choices are summed to."""
    x = _numbers(make, dtype, elements)
    if results <= _MAX_SUMS:
        parts = x.chunk(results)
        return lambda: [part.sum() for part in parts]
    if not dtype.is_floating_point:
        table = x.view(-1, results)
        return lambda: table.sum(dim=0)
    width = math.gcd(results, _WIDTH)
    choices = x.view(results // width, -1, width)
    return lambda: choices.sum(dim=1)


def interpolate(make: Operands, *, source_elements: int, target_elements: int, taps: int, dtype: torch.dtype) -> Run:
    """Antialiased bicubic of square maps, or linear; the channels are as many as the sizes allow."""
    if taps != _BICUBIC_TAPS:
        channels = math.gcd(source_elements, target_elements)
        line, length = make.tensor(dtype, 1, channels, source_elements // channels), target_elements // channels
        return lambda: F.interpolate(line, size=length, mode="linear")
    channels = next(
        count
        for count in range(math.gcd(source_elements, target_elements), 0, -1)
        if _is_square(source_elements, count) and _is_square(target_elements, count)
    )
    side, target_side = (math.isqrt(size // channels) for size in (source_elements, target_elements))
    x = make.tensor(dtype, 1, side, side, channels).permute(0, 3, 1, 2)
    size = (target_side, target_side)
    return lambda: F.interpolate(x, size=size, mode="bicubic", antialias=True, align_corners=False)


def _is_square(elements: int, channels: int) -> bool:
    pixels, rest = divmod(elements, channels)
    return rest == 0 and math.isqrt(pixels) ** 2 == pixels


def topk(make: Operands, *, rows: int, width: int, k: int, dtype: torch.dtype) -> Run:
    """Unsorted."""
    x = make.tensor(dtype, rows, width)
    return lambda: torch.topk(x, k=k, dim=-1, sorted=False)


def sort(make: Operands, *, elements: int) -> Run:
    """Numbers of experts."""
    ids = make.indices(_EXPERTS, elements)
    return ids.argsort


def gather(make: Operands, *, rows: int, width: int, dtype: torch.dtype, weights: int) -> Run:
    """Each token's row is picked once per choice; a table's rows about as often as there are."""
    x = make.tensor(dtype, rows if weights else -(-rows // _CHOICES), width)
    index = make.indices(x.shape[0], rows)
    return lambda: x[index]


def scatter(make: Operands, *, rows: int, width: int, dtype: torch.dtype) -> Run:
    """A one for each choice of a token."""
    ids = make.indices(_EXPERTS, rows * width // _CHOICES, _CHOICES)
    counts = torch.zeros((ids.shape[0], _EXPERTS), dtype=dtype, device=make.device)
    return lambda: counts.scatter_(1, ids, 1)


def index_put(make: Operands, *, rows: int, width: int, dtype: torch.dtype, accumulate: bool) -> Run:
    """Rows go to their places in a tensor that is made for them."""
    x = make.tensor(dtype, rows, width)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(0)).to(make.device)

    def put() -> Tensor:
        return torch.empty_like(x).index_put_((order,), x, accumulate=accumulate)

    return put


def masked_scatter(make: Operands, *, positions: int, selected: int, width: int, dtype: torch.dtype) -> Run:
    """The selected positions come first."""
    x, features = make.tensor(dtype, positions, width), make.tensor(dtype, selected, width)
    mask = (torch.arange(positions, device=make.device) < selected).unsqueeze(-1)
    return lambda: x.masked_scatter_(mask, features)


def kv_cache_append(make: Operands, *, cached: int, added: int, dtype: torch.dtype) -> Run:
    """Keys and values, neither in a cache: each is read once per forward."""
    width = math.gcd(cached // 2, added // 2, _WIDTH)
    head_dim = math.gcd(width, _HEAD_DIM)
    heads, old, new = width // head_dim, (cached - added) // (2 * width), added // (2 * width)
    pairs = cycle([held.unbind() for held in make.cold(dtype, 2, 1, heads, old, head_dim)])
    keys, values = make.tensor(dtype, 2, 1, heads, new, head_dim).unbind()

    def append() -> tuple[Tensor, Tensor]:
        old_keys, old_values = next(pairs)
        return torch.cat([old_keys, keys], dim=-2), torch.cat([old_values, values], dim=-2)

    return append


def cat(make: Operands, *, elements: int, dtype: torch.dtype, weights: int) -> Run:
    """Two halves."""
    del weights
    halves = make.tensor(dtype, elements).chunk(2)
    return lambda: torch.cat(halves)


def copy(make: Operands, *, elements: int, dtype: torch.dtype, weights: int) -> Run:
    """Of a transposed tensor, in runs of a vision encoder's head."""
    del weights
    run = math.gcd(elements, _HEAD_DIM // 2)
    x = _numbers(make, dtype, elements).view(-1, math.gcd(elements // run, 16), run).transpose(0, 1)
    return lambda: x.clone(memory_format=torch.contiguous_format)


def cast(make: Operands, *, elements: int, source: torch.dtype, target: torch.dtype, weights: int) -> Run:
    """To another dtype."""
    del weights
    x = _numbers(make, source, elements)
    return lambda: x.to(target)


def fill(make: Operands, *, elements: int, dtype: torch.dtype) -> Run:
    """Zeros."""
    device = make.device
    return lambda: torch.zeros(elements, dtype=dtype, device=device)


def pad(make: Operands, *, source_elements: int, target_elements: int, dtype: torch.dtype) -> Run:
    """Rows are added."""
    width = math.gcd(source_elements, target_elements)
    x, extra = make.tensor(dtype, source_elements // width, width), (target_elements - source_elements) // width
    return lambda: F.pad(x, (0, 0, 0, extra))


#: How each operator is run, by its name.
EXECUTORS: Final[Mapping[str, Callable[..., Run]]] = {
    executor.__name__: executor
    for executor in (
        linear, bmm, conv2d, embedding, sdpa, sdpa_with_bias, attention_eager, causal_mask, rope_tables, rope_apply,
        rms_norm, layer_norm, layer_norm_2d, gelu, silu, quick_gelu, softmax, elementwise, reduction, interpolate,
        topk, sort, gather, scatter, index_put, masked_scatter, kv_cache_append, cat, copy, cast, fill, pad,
    )
}  # fmt: skip
