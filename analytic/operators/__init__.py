"""Cost formulas of the operators, each written once as a pure function of its shape.

Conventions
-----------
* FLOPs: one multiply-accumulate is 2 `tensor_flops`. Everything else goes to `vector_flops`, where every scalar
  operation counts 1: add, multiply, divide, compare, negate, but also exp, erf, sqrt, rsqrt, sin and cos.
* Bytes: every operand is read once and every result is written once, in its own dtype. Nothing is assumed to stay in a
  cache between operators. An operator that eager PyTorch runs as a sequence of ATen operators also pays for the
  intermediate tensors between them.
* Sizes may be Python ints, arrays or symbols.
* Backward: the gradients of all operands from the gradient of the result. An operator that runs as a sequence goes
  back through its parts.
"""

from analytic.operators.attention import (
    COUNTED,
    Counted,
    attention_eager,
    causal_mask,
    rope_apply,
    rope_tables,
    sdpa,
    sdpa_with_bias,
)
from analytic.operators.base import Operator, OperatorCall, Steps
from analytic.operators.host import host_loop, to_host, view
from analytic.operators.matrix import bmm, conv2d, linear
from analytic.operators.movement import (
    cast,
    cat,
    copy,
    embedding,
    fill,
    gather,
    index_put,
    kv_cache_append,
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
    swiglu,
)

#: Every operator, by name.
OPERATORS = {
    operator.name: operator
    for operator in (
        conv2d,
        linear,
        bmm,
        embedding,
        sdpa,
        sdpa_with_bias,
        attention_eager,
        causal_mask,
        rope_tables,
        rope_apply,
        layer_norm,
        rms_norm,
        layer_norm_2d,
        gelu,
        quick_gelu,
        silu,
        swiglu,
        softmax,
        elementwise,
        reduction,
        interpolate,
        topk,
        sort,
        gather,
        scatter,
        index_put,
        masked_scatter,
        kv_cache_append,
        cat,
        copy,
        cast,
        fill,
        pad,
        view,
        host_loop,
        to_host,
    )
}

__all__ = [
    "COUNTED",
    "OPERATORS",
    "Counted",
    "Operator",
    "OperatorCall",
    "Steps",
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
    "host_loop",
    "index_put",
    "interpolate",
    "kv_cache_append",
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
    "swiglu",
    "to_host",
    "topk",
    "view",
]
