from __future__ import annotations

import pyarrow as pa
import pytest

from hooks.categories import CATEGORIES, operator_categories, operator_category


@pytest.mark.parametrize(
    ("name", "category"),
    [
        ("aten::mkldnn_convolution", "conv"),
        ("aten::addmm", "linear"),
        ("aten::mm", "linear"),
        ("aten::bmm", "attention"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("aten::native_layer_norm", "norm"),
        ("aten::gelu", "activation"),
        ("aten::silu", "activation"),
        ("aten::_softmax", "activation"),
        ("aten::embedding", "embedding"),
        ("aten::topk", "routing"),
        ("aten::index", "routing"),
        ("aten::_index_put_impl_", "routing"),
        ("aten::add", "elementwise"),
        ("aten::mul_", "elementwise"),
        ("aten::sum", "reduction"),
        ("aten::copy_", "copy"),
        ("aten::cat", "copy"),
        ("aten::view", "other"),
        ("aten::as_strided", "other"),
        ("aten::a_new_operator", "other"),
        ("Memcpy DtoH (Device -> Pageable)", "copy"),
        ("void at::native::elementwise_kernel<128, 2>(int)", "elementwise"),
        ("void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16>(Params)", "linear"),
        ("void flash_fwd_splitkv_kernel<Flash_fwd_kernel_traits<128, 64>>(Flash_fwd_params)", "attention"),
        ("void at::native::(anonymous namespace)::CatArrayBatchedCopy<float>(float*)", "copy"),
        ("void at::native::reduce_kernel<512, 1>(ReduceOp)", "reduction"),
    ],
)
def test_category_of_a_name(name, category):
    assert operator_category(name) == category
    assert category in CATEGORIES


def test_a_column_of_names_keeps_its_order():
    names = pa.chunked_array([["aten::mm", "aten::add"], ["aten::mm", "who knows"]])
    assert operator_categories(names).to_pylist() == ["linear", "elementwise", "linear", "other"]
