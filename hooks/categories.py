"""What kind of work an event is, read off its name."""

from __future__ import annotations

import re
from typing import Final

import pyarrow as pa
import pyarrow.compute as pc

#: Operator categories of events and of predictions.
CATEGORIES: Final = (
    "conv",
    "linear",
    "attention",
    "norm",
    "activation",
    "embedding",
    "routing",
    "elementwise",
    "reduction",
    "copy",
    "other",
)

#: First match wins. ATen names are matched whole; CUDA kernels by the part of their name that says what they do.
_RULES: Final = tuple(
    (re.compile(pattern), category)
    for category, pattern in (
        ("conv", r"aten::(_?convolution|conv2d|mkldnn_convolution|cudnn_convolution|_convolution_mode)$"),
        ("attention", r"aten::(_?scaled_dot_product.*|_flash_attention.*|_efficient_attention.*|bmm|baddbmm|einsum)$"),
        ("linear", r"aten::(linear|addmm|mm|matmul|mkldnn_.*linear.*|_?addmv.*|mv|dot)$"),
        ("norm", r"aten::(native_)?(layer|group|batch|rms)_norm$|aten::rsqrt$"),
        ("activation", r"aten::(gelu|silu|sigmoid|_?softmax|relu)_?$"),
        ("embedding", r"aten::(embedding|_?upsample.*|masked_scatter|arange|cos|sin)_?$"),
        ("routing", r"aten::(topk|sort|argsort|scatter|index|index_put|_index_put_impl|gather|floor_divide)_?$"),
        ("reduction", r"aten::(sum|mean|argmax|max|min|amax|var|std|any|all|cumsum)_?$"),
        ("elementwise", r"aten::(add|sub|rsub|mul|div|neg|pow|sqrt|exp|eq|ne|lt|gt|le|ge|where|clamp|triu|tril)_?$"),
        (
            "copy",
            r"aten::(copy|cat|clone|contiguous|to|_to_copy|type|float|pad|constant_pad_nd|repeat_interleave)_?$",
        ),
        ("copy", r"aten::(fill|zero|full|zeros|new_zeros|masked_fill|item|_local_scalar_dense)_?$"),
        ("attention", r"(?i)flash|fmha|attention|sdpa"),
        ("conv", r"(?i)conv|implicit_gemm|fprop|winograd"),
        ("linear", r"(?i)gemm|gemv|cutlass|nvjet|splitK"),
        ("norm", r"(?i)layer_?norm|rms_?norm"),
        ("activation", r"(?i)gelu|silu|softmax|sigmoid"),
        ("routing", r"(?i)topk|sort|scatter|gather|index_put|indexing_backward|index_elementwise|index_kernel"),
        ("embedding", r"(?i)indexSelect|embedding|upsample|interpolate|masked_scatter"),
        ("copy", r"(?i)^memcpy|^memset|copy|CatArray|fill|pad"),
        ("reduction", r"(?i)reduce|argmax|cumsum|scan"),
        ("elementwise", r"(?i)elementwise"),
    )
)


def operator_category(name: str) -> str:
    """Category of one operator or kernel name; ``other`` for metadata, allocation and unknown names."""
    return next((category for pattern, category in _RULES if pattern.search(name)), "other")


def operator_categories(names: pa.ChunkedArray) -> pa.ChunkedArray:
    """Category of each name; every distinct name is looked up once."""
    encoded = pc.dictionary_encode(names)
    chunks = [
        pa.array([operator_category(name) for name in chunk.dictionary.to_pylist()], pa.string()).take(chunk.indices)
        for chunk in encoded.chunks
    ]
    return pa.chunked_array(chunks, pa.string())
