"""What kind of work an event is, read off its name."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Final, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from hooks.columns import each_distinct

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

#: Family of a name that no rule knows.
UNKNOWN: Final = "other"


class Rule(NamedTuple):
    """Category and kernel family of the names in which ``pattern`` is found."""

    category: str
    family: str
    pattern: str


#: First match wins. ATen names match whole; kernels by the part of their name that says what they do. A kernel that is
#: a template over what it computes, such as an elementwise one, is sorted by that: hence the general rules come last.
RULES: Final = tuple(
    Rule(*rule)
    for rule in (
        # What the driver does, not a kernel.
        ("copy", "memcpy", r"(?i)^\[?(cuda )?memcpy"),
        ("copy", "memset", r"(?i)^\[?(cuda )?memset"),
        ("other", "graph", r"(?i)^\[?(cuda )?graph\b"),
        # Between devices.
        ("other", "NCCL", r"(?i)nccl"),
        ("other", "collective", r"(?i)all_?reduce|all_?gather|reduce_?scatter|all_?to_?all|cross_device_reduce"),
        # ATen operators, as the profiler names them on a CPU.
        ("conv", "convolution", r"^aten::(_?convolution|conv[123]d|(mkldnn|cudnn)_convolution|_convolution_mode)$"),
        ("attention", "flash attention", r"^aten::_(scaled_dot_product_)?flash_attention"),
        ("attention", "memory-efficient attention", r"^aten::_(scaled_dot_product_)?efficient_attention"),
        ("attention", "fused attention", r"^aten::_?scaled_dot_product"),
        ("attention", "GEMM", r"^aten::(bmm|baddbmm|einsum)_?$"),
        ("linear", "GEMM", r"^aten::(linear|addmm|mm|matmul|_grouped_mm|mkldnn_.*linear.*)_?$"),
        ("linear", "GEMV", r"^aten::(_?addmv|mv|dot)(_impl)?_?$"),
        ("norm", "norm", r"^aten::(native_|_fused_)?(layer|group|batch|rms)_norm$"),
        ("norm", "elementwise", r"^aten::rsqrt_?$"),
        ("activation", "softmax", r"^aten::_?(log_)?softmax$"),
        ("activation", "activation", r"^aten::(gelu|silu|sigmoid|relu)_?$"),
        ("embedding", "embedding", r"^aten::(embedding|index_select|masked_scatter)_?$"),
        ("embedding", "resampling", r"^aten::_?upsample"),
        ("embedding", "elementwise", r"^aten::(arange|cos|sin)_?$"),
        ("routing", "sort/top-k", r"^aten::(topk|sort|argsort)$"),
        ("routing", "gather/scatter", r"^aten::(scatter|gather|index|index_put|_index_put_impl|nonzero|bincount)_?$"),
        ("routing", "elementwise", r"^aten::floor_divide_?$"),
        ("reduction", "scan", r"^aten::cumsum_?$"),
        ("reduction", "reduction", r"^aten::(sum|mean|argmax|max|min|amax|var|std|any|all)$"),
        (
            "elementwise",
            "elementwise",
            r"^aten::(add|sub|rsub|mul|div|neg|pow|sqrt|exp|eq|ne|lt|gt|le|ge|where|clamp|triu|tril)_?$",
        ),
        ("copy", "cat", r"^aten::(cat|stack)$"),
        ("copy", "fill", r"^aten::(fill|zero|full|zeros|ones|new_zeros|masked_fill|scalar_tensor)_?$"),
        ("copy", "copy", r"^aten::(copy|clone|contiguous|to|_to_copy|type|float|repeat_interleave)_?$"),
        ("copy", "copy", r"^aten::(pad|constant_pad_nd|item|_local_scalar_dense)$"),
        ("other", "allocation", r"^aten::(empty|empty_strided|empty_like|new_empty|resize)_?$"),
        (
            "other",
            "metadata",
            r"^aten::(as_strided|reshape|_reshape_alias|_unsafe_view|view|expand|flatten|unfold)_?$",
        ),
        ("other", "metadata", r"^aten::(t|transpose|permute|slice|select|narrow|split|chunk|unbind|(un)?squeeze)_?$"),
        ("other", "metadata", r"^(aten::)?(detach|resolve_conj|resolve_neg|lift_fresh|result_type)_?$"),
        # Libraries for language models.
        ("copy", "copy", r"reshape_and_cache|copy_page_indices"),
        ("elementwise", "quantization", r"(?i)quantize|_quant_kernel"),
        ("embedding", "rotary embedding", r"(?i)rotary|rope_kernel"),
        ("norm", "norm", r"(?i)layer_?norm|rms_?norm|group_?norm|batch_?norm"),
        ("routing", "mixture of experts", r"moe::dev|moe_align|topkGating|expert_tokens"),
        # Code that a compiler wrote, named by the operators that it fused.
        ("linear", "GEMM", r"^triton_tem_.*mm"),
        ("reduction", "fused reduction", r"^triton_(red|per)_"),
        ("copy", "copy", r"^fused__autocast_to_+\d*$"),
        ("elementwise", "fused elementwise", r"^triton_(poi|for|unk)_|^fused_"),
        # Matrix products inside attention come before convolutions, those before matrix products.
        ("attention", "memory-efficient attention", r"fmha_cutlass|AttentionKernel<|MemEffAttention"),
        ("attention", "fused attention", r"(?i)sdpa|fmha|With(Paged)?KVCache|paged_attention"),
        ("attention", "flash attention", r"(?i)flash(?!infer)"),
        ("attention", "fused attention", r"(?i)attention"),
        ("copy", "copy", r"(?i)nchwToNhwc|nhwcToNchw|transpose_readWrite"),
        ("conv", "convolution", r"(?i)implicit_gemm|conv(?!ert)|fprop|dgrad|wgrad|winograd"),
        ("linear", "GEMM", r"gemmk1|splitK"),
        ("linear", "GEMV", r"(?i)gemv"),
        ("linear", "GEMM", r"(?i)gemm|nvjet|^bmm_|cutlass::(Kernel|device_kernel)|tensorop"),
        # What a template computes, whatever its loop is called.
        ("activation", "softmax", r"(?i)softmax"),
        ("activation", "activation", r"(?i)gelu|silu|sigmoid|relu"),
        ("routing", "sort/top-k", r"(?i)topk|sort|fill_reverse_indices"),
        ("embedding", "embedding", r"(?i)indexSelect|embedding|masked_scatter"),
        ("embedding", "resampling", r"(?i)upsample|interpolate"),
        ("embedding", "elementwise", r"arange_cuda|cos_kernel_cuda|sin_kernel_cuda"),
        ("norm", "elementwise", r"rsqrt_kernel"),
        ("routing", "elementwise", r"div_floor_kernel"),
        (
            "routing",
            "gather/scatter",
            r"(?i)scatter|gather|index_put|indexing_backward|index_elementwise|index_kernel|DeviceSelect|nonzero",
        ),
        ("copy", "cat", r"CatArray"),
        ("copy", "fill", r"(?i)fill|reflection_pad|replication_pad"),
        ("copy", "copy", r"(?i)copy"),
        # The loops.
        ("reduction", "scan", r"(?i)DeviceScan|cumsum|scan_"),
        ("reduction", "reduction", r"(?i)reduce|argmax"),
        ("elementwise", "elementwise", r"(?i)elementwise|multi_tensor_apply"),
    )
)

_COMPILED: Final = tuple((re.compile(rule.pattern), rule) for rule in RULES)
_NO_RULE: Final = Rule("other", UNKNOWN, "")


def operator_category(name: str) -> str:
    """Category of one operator or kernel name; ``other`` for metadata, allocation and unknown names."""
    return _rule(name).category


def kernel_family(name: str) -> str:
    """Family of one operator or kernel name, such as ``GEMV`` or ``flash attention``; `UNKNOWN` if no rule knows it."""
    return _rule(name).family


def operator_categories(names: pa.ChunkedArray) -> pa.ChunkedArray:
    """Category of each name, of type `hooks.columns.CODED`."""
    return each_distinct(lambda distinct: [operator_category(name) for name in distinct], names)


def kernel_families(names: pa.ChunkedArray) -> pa.ChunkedArray:
    """Family of each name, of type `hooks.columns.CODED`."""
    return each_distinct(lambda distinct: [kernel_family(name) for name in distinct], names)


def unknown_names(names: pa.ChunkedArray, duration_ns: pa.ChunkedArray) -> pa.Table:
    """List the names that no rule knows, the longest time first.

    Parameters
    ----------
    names, duration_ns
        Of each event.

    Returns
    -------
    pyarrow.Table
        ``name``, ``event_count`` and ``duration_ns``, one row per name.
    """
    events = pa.table({"name": names, "duration_ns": duration_ns})
    unknown = events.filter(pc.equal(kernel_families(events["name"]), UNKNOWN))
    sums = unknown.group_by("name").aggregate([([], "count_all"), ("duration_ns", "sum")])
    named = sums.rename_columns({"count_all": "event_count", "duration_ns_sum": "duration_ns"})
    return named.select(["name", "event_count", "duration_ns"]).sort_by([("duration_ns", "descending")])


@lru_cache(maxsize=4096)  # a run has hundreds of names, asked for by every table that is made of it
def _rule(name: str) -> Rule:
    return next((rule for pattern, rule in _COMPILED if pattern.search(name)), _NO_RULE)
