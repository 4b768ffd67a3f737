"""Cost formulas of the operators, each written once as a pure function of its shape.

Conventions
-----------
* FLOPs: one multiply-accumulate is 2 `tensor_flops`. Everything else goes to `vector_flops`, where every scalar
  operation counts 1: add, multiply, divide, compare, negate, but also exp, erf, sqrt, rsqrt, sin and cos.
* Bytes: every operand is read once and every result is written once, in its own dtype. Nothing is assumed to stay in a
  cache between operators. An operator that eager PyTorch runs as a sequence of ATen operators also pays for the
  intermediate tensors between them.
* `item` is the number of bytes per element of the model's dtype. Sizes may be Python ints, int64 arrays or symbols.
"""

from analytic.operators.attention import attention_eager, causal_mask, rope_apply, rope_tables, sdpa, sdpa_with_bias
from analytic.operators.matrix import bmm, conv2d, linear
from analytic.operators.movement import (
    cast,
    cat,
    copy,
    embedding,
    fill,
    gather,
    masked_scatter,
    pad,
    scatter,
    sort,
    topk,
)
from analytic.operators.pointwise import (
    elementwise,
    gelu,
    interpolate,
    layer_norm,
    layer_norm_2d,
    quick_gelu,
    reduction,
    rms_norm,
    silu,
    softmax,
)

__all__ = [
    "attention_eager",
    "bmm",
    "cast",
    "cat",
    "causal_mask",
    "conv2d",
    "copy",
    "elementwise",
    "embedding",
    "fill",
    "gather",
    "gelu",
    "interpolate",
    "layer_norm",
    "layer_norm_2d",
    "linear",
    "masked_scatter",
    "pad",
    "quick_gelu",
    "reduction",
    "rms_norm",
    "rope_apply",
    "rope_tables",
    "scatter",
    "sdpa",
    "sdpa_with_bias",
    "silu",
    "softmax",
    "sort",
    "topk",
]
