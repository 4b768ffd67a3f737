from __future__ import annotations

import csv
import gzip
import json
import sqlite3
from contextlib import closing
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pytest

from hooks.categories import (
    CATEGORIES,
    RULES,
    UNKNOWN,
    kernel_families,
    kernel_family,
    operator_categories,
    operator_category,
    unknown_names,
)

SHARED = Path(__file__).parents[2].parent / "shared"
#: What the profilers call device work, by its category in a torch.profiler trace.
DEVICE_WORK = {"kernel", "gpu_memcpy", "gpu_memset"}

ATEN = [
    ("aten::mkldnn_convolution", "conv", "convolution"),
    ("aten::addmm", "linear", "GEMM"),
    ("aten::mm", "linear", "GEMM"),
    ("aten::mv", "linear", "GEMV"),
    ("aten::bmm", "attention", "GEMM"),
    ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention", "flash attention"),
    ("aten::_scaled_dot_product_efficient_attention", "attention", "memory-efficient attention"),
    ("aten::scaled_dot_product_attention", "attention", "fused attention"),
    ("aten::native_layer_norm", "norm", "norm"),
    ("aten::rsqrt", "norm", "elementwise"),
    ("aten::gelu", "activation", "activation"),
    ("aten::silu", "activation", "activation"),
    ("aten::_softmax", "activation", "softmax"),
    ("aten::embedding", "embedding", "embedding"),
    ("aten::index_select", "embedding", "embedding"),
    ("aten::_upsample_bicubic2d_aa", "embedding", "resampling"),
    ("aten::cos", "embedding", "elementwise"),
    ("aten::topk", "routing", "sort/top-k"),
    ("aten::index", "routing", "gather/scatter"),
    ("aten::_index_put_impl_", "routing", "gather/scatter"),
    ("aten::floor_divide", "routing", "elementwise"),
    ("aten::add", "elementwise", "elementwise"),
    ("aten::mul_", "elementwise", "elementwise"),
    ("aten::sum", "reduction", "reduction"),
    ("aten::cumsum", "reduction", "scan"),
    ("aten::copy_", "copy", "copy"),
    ("aten::cat", "copy", "cat"),
    ("aten::fill_", "copy", "fill"),
    ("aten::view", "other", "metadata"),
    ("aten::as_strided", "other", "metadata"),
    ("detach_", "other", "metadata"),
    ("aten::empty_strided", "other", "allocation"),
    ("aten::a_new_operator", "other", "other"),
]

DRIVER = [
    ("Memcpy DtoH (Device -> Pageable)", "copy", "memcpy"),
    ("[CUDA memcpy Device-to-Host]", "copy", "memcpy"),
    ("Memset (Device)", "copy", "memset"),
    ("[CUDA memset]", "copy", "memset"),
    ("CUDA graph", "other", "graph"),
]

#: Kernels of libraries and of torch: category, family and name in a line. Some need the rules in their order: one with
#: "flash" in its name only fills a cache, and "_typeConvert" is no convolution.
KERNELS = """
linear | GEMM | nvjet_tst_192x192_64x4_2x1_v_bz_coopB_bias_TNN
linear | GEMM | void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16_32x32_128x2_tn_align8>(T1::Params)
linear | GEMM | void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_256x128_32x3_tn_align8>(T1::Params)
linear | GEMM | sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize64x64x64_warpgroupsize1x1x1_execute_segment_k_off_kernel__5x_cublas
linear | GEMM | void gemmk1_kernel<int, float, (int)256, (int)5, (bool)1, cublasGemvTensorStridedBatched<const float>, float>(cublasGemmk1Params<T2, T9>)
linear | GEMM | void cublasLt::splitKreduce_kernel<(int)32, (int)16, int, __nv_bfloat16, float>(cublasLt::cublasSplitKParams<T6>)
linear | GEMM | bmm_Bfloat16_MxE2m1MxE4m3_Fp32_t128x16x256u2_s3_et128x16_m128x16x32_TN_transOut_dynBatch_sm100f
linear | GEMV | std::enable_if<!T7, void>::type internal::gemvx::kernel<int, int, __nv_bfloat16, __nv_bfloat16, __nv_bfloat16, float, (bool)0, (int)7, cublasGemvParamsEx<int, cublasGemvTensorStridedBatched<const __nv_bfloat16>, float>>(T13)
linear | GEMV | enable_if<!T7, void>::type kernel<int, int, __nv_bfloat16, float, 0, 1, 1, 0, 6, 0, cublasGemvParamsEx<int>>(T13)
conv | convolution | sm80_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x32x32_stage4_execute_kernel__5x_cudnn
conv | convolution | void cutlass__5x_cudnn::Kernel<cutlass_tensorop_bf16_s16816fprop_optimized_bf16_128x128_32x3_nhwc_align8>(T1::Params)
attention | flash attention | void flash::flash_fwd_splitkv_kernel<Flash_fwd_kernel_traits<(int)128, (int)64, cutlass::bfloat16_t>>(flash::Flash_fwd_params)
attention | flash attention | void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<(int)64, cutlass::bfloat16_t>>(pytorch_flash::Flash_fwd_params)
attention | memory-efficient attention | fmha_cutlassF_bf16_aligned_64x64_rf_sm80(PyTorchMemEffAttention::AttentionKernel<cutlass::bfloat16_t, cutlass::arch::Sm80, (bool)1, (int)64>::Params)
attention | fused attention | fmhaSm100aKernel_QkvE4m3OBfloat16H64PagedKvCausalP16VarSeqQ128Kv128PersistentContext
attention | fused attention | cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x128_4x1x1_kernel0_0
copy | copy | void vllm::reshape_and_cache_flash_kernel<__nv_bfloat16, unsigned char>(__nv_bfloat16 const*)
copy | cat | void at::native::<unnamed>::CatArrayBatchedCopy_vectorized<at::native::<unnamed>::OpaqueType<(unsigned int)2>>(char *)
copy | copy | void cudnn::engines_precompiled::nchwToNhwcKernel<__nv_bfloat16, __nv_bfloat16, float>(T1)
norm | norm | void at::native::<unnamed>::vectorized_layer_norm_kernel<float, float, (bool)0>(int, T2, const T1 *)
norm | norm | std::enable_if<(((8)>(0)))&&vllm::_typeConvert<c10::BFloat16>::exists, void>::type vllm::fused_add_rms_norm_kernel<c10::BFloat16, 8>(c10::BFloat16*, long)
activation | softmax | void <unnamed>::softmax_warp_forward<float, float, float, (int)6, (bool)0, (bool)0>(T2 *, const T1 *, int)
activation | softmax | void at::native::(anonymous namespace)::cunn_SoftMaxForward<4, float, float, float>(float*, float const*, int)
routing | sort/top-k | void at::native::sbtopk::gatherTopK<float, unsigned int, (int)1, (bool)0>(at::cuda::detail::TensorInfo<T1>)
routing | sort/top-k | void at::native::bitonicSortKVInPlace<(int)-2, (int)-1, (int)16, (int)16, long, long>(T5)
routing | sort/top-k | void at_cuda_detail::cub::DeviceRadixSortExclusiveSumKernel<at_cuda_detail::cub::DeviceRadixSortPolicy<long>>(T2 *)
routing | sort/top-k | at::native::<unnamed>::fill_reverse_indices_kernel(long *, int)
reduction | scan | void at_cuda_detail::cub::DeviceScanKernel<at_cuda_detail::cub::DeviceScanPolicy<long, std::plus<long>>>(T2)
routing | gather/scatter | void at::native::vectorized_gather_kernel<(int)16, long>(char *, char *, T2 *, int)
embedding | embedding | void at::native::<unnamed>::indexSelectSmallIndex<c10::BFloat16, long, unsigned int>(T1)
embedding | rotary embedding | void vllm::rotary_embedding_kernel<c10::BFloat16, true>(long const*)
embedding | resampling | void at::native::<unnamed>::upsample_gen2d_aa_out_frame<float, float>(T2)
routing | mixture of experts | void moe::dev::finalize::finalizeKernelVecLoad<moe::dev::finalize::KernelParams<cutlass::bfloat16_t> >(int)
elementwise | quantization | void tensorrt_llm::kernels::quantize_with_block_size<__nv_bfloat16, 32, true>(flashinfer::QuantizationSFLayout)
elementwise | fused elementwise | triton_poi_fused_add_bitwise_and_bitwise_not_ge_lt_mul_sub_0
reduction | fused reduction | triton_red_fused__to_copy_add_mean_mul_pow_rsqrt_1
copy | copy | fused__autocast_to__12152488584593855096
other | NCCL | ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)
other | NCCL | ncclDevKernel_SendRecv
other | collective | void (anonymous namespace)::multimem_all_reduce_kernel<c10::BFloat16, 16>(c10::BFloat16*)
other | other | my_own_kernel
"""  # noqa: E501 - names are as long as they are

#: Loops over a functor: what they compute stands inside.
TEMPLATES = """
elementwise | elementwise | void at::native::vectorized_elementwise_kernel<(int)4, at::native::BinaryFunctor<c10::BFloat16, c10::BFloat16, c10::BFloat16, at::native::binary_internal::MulFunctor<float>>, std::array<char *, (unsigned long)3>>(int, T2)
elementwise | elementwise | void at::native::elementwise_kernel<(int)128, (int)4, void at::native::gpu_kernel_impl_nocast<at::native::CUDAFunctor_add<c10::BFloat16>>(at::TensorIteratorBase &, const T1 &)::[lambda(int)]>(int, T3)
copy | copy | void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda(at::TensorIteratorBase &)::[lambda() (instance 3)]::operator ()() const, at::native::memory::LoadWithCast<(int)1>>(int, T1)
copy | copy | void at::native::vectorized_elementwise_kernel<(int)4, at::native::bfloat16_copy_kernel_cuda(at::TensorIteratorBase &)::[lambda(float) (instance 1)], std::array<char *, (unsigned long)2>>(int, T2)
activation | activation | void at::native::vectorized_elementwise_kernel<(int)4, at::native::<unnamed>::silu_kernel(at::TensorIteratorBase &)::[lambda()], std::array<char *, (unsigned long)2>>(int, T2)
activation | activation | void at::native::vectorized_elementwise_kernel<4, at::native::GeluCUDAKernelImpl(at::TensorIteratorBase&, at::native::GeluType)::{lambda()#2}, std::array<char*, 2ul> >(int)
copy | fill | void at::native::vectorized_elementwise_kernel<(int)2, at::native::FillFunctor<long>, std::array<char *>>(int)
norm | elementwise | void at::native::vectorized_elementwise_kernel<(int)4, at::native::rsqrt_kernel_cuda(at::TensorIteratorBase &)::[lambda()], std::array<char *, (unsigned long)2>>(int, T2)
embedding | embedding | void at::native::vectorized_elementwise_kernel<(int)4, at::native::launch_masked_scatter_kernel(const at::TensorBase &)::[lambda()], std::array<char *, (unsigned long)4>>(int)
embedding | elementwise | void <unnamed>::elementwise_kernel_with_index<int, at::native::arange_cuda_out(const c10::Scalar &)::[lambda()]>(T1)
reduction | reduction | void at::native::reduce_kernel<(int)512, (int)1, at::native::ReduceOp<float, at::native::MeanOps<float, float, float, float>, unsigned int, float, (int)4, (int)4>>(T3)
routing | gather/scatter | void at::native::index_elementwise_kernel<(int)128, (int)4, void at::native::gpu_index_kernel<void at::native::index_put_kernel_impl<at::native::OpaqueType<(int)2>>(at::TensorIterator &)>>(long)
routing | gather/scatter | void at::native::_scatter_gather_elementwise_kernel<(int)128, (int)8, void at::native::_cuda_scatter_fill_internal_kernel<at::native::OpaqueType<(int)8>, long>>(int, T3)
"""  # noqa: E501 - names are as long as they are


def listed(text: str) -> list[tuple[str, str, str]]:
    rows = (line.split(" | ", 2) for line in text.strip().splitlines())
    return [(name, category, family) for category, family, name in rows]


@pytest.mark.parametrize(
    ("name", "category", "family"),
    [*ATEN, *DRIVER, *listed(KERNELS), *listed(TEMPLATES)],
)
def test_category_and_family_of_a_name(name, category, family):
    assert (operator_category(name), kernel_family(name)) == (category, family)


def test_the_categories_are_those_of_the_rules():
    assert {rule.category for rule in RULES} == set(CATEGORIES)
    assert UNKNOWN not in {rule.family for rule in RULES}


def test_a_column_of_names_keeps_its_order():
    names = pa.chunked_array([["aten::mm", "aten::add"], ["aten::mm", "who knows"]])
    assert operator_categories(names).to_pylist() == ["linear", "elementwise", "linear", "other"]
    assert kernel_families(names).to_pylist() == ["GEMM", "elementwise", "GEMM", "other"]
    assert kernel_families(pa.chunked_array([], pa.string())).to_pylist() == []


def test_unknown_names_are_listed_with_count_and_time():
    names = pa.chunked_array([["aten::mm", "short", "long", "aten::view", "short", "long"]])
    durations = pa.chunked_array([[100, 1, 20, 3, 2, 30]])
    assert unknown_names(names, durations).to_pydict() == {
        "name": ["long", "short"],
        "event_count": [2, 2],
        "duration_ns": [50, 3],
    }
    assert unknown_names(names[:1], durations[:1]).num_rows == 0


def kernel_summary(path: Path) -> list[tuple[str, int]]:
    with path.open(encoding="utf-8", newline="") as file:
        return [(row["Name"], int(row["Total Time (ns)"])) for row in csv.DictReader(file)]


def profiler_trace(path: Path) -> list[tuple[str, int]]:
    with gzip.open(path) as file:
        events = json.load(file)["traceEvents"]
    return [(event["name"], round(event["dur"] * 1000)) for event in events if event.get("cat") in DEVICE_WORK]


def nsys_export(path: Path) -> list[tuple[str, int]]:
    query = 'SELECT value, "end" - start FROM CUPTI_ACTIVITY_KIND_KERNEL JOIN StringIds ON id = demangledName'
    with closing(sqlite3.connect(f"file:{path}?mode=ro&immutable=1", uri=True)) as database:
        return database.execute(query).fetchall()


@pytest.mark.parametrize(
    ("file", "read"),
    [
        *((f"reference/rtx5090/kern_sum_{part}.csv", kernel_summary)
          for part in ("all-stage", "clip", "decode", "prefill", "projector", "sam")),
        *((f"data/traces/kineto_{trace}.json.gz", profiler_trace)
          for trace in ("h100_bert", "h100_qwen_cut", "b200_gptoss")),
        ("data/traces/nsys_2gpu_h100.sqlite", nsys_export),
    ],
)  # fmt: skip
def test_nearly_all_kernel_time_has_a_family(file, read):
    path = SHARED / file
    if not path.exists():
        pytest.skip(f"{path} is not on this machine")
    names, durations = (pa.chunked_array([column]) for column in zip(*read(path), strict=True))
    unknown = unknown_names(names, durations)
    share = (pc.sum(unknown["duration_ns"]).as_py() or 0) / pc.sum(durations).as_py()
    assert share <= 0.01, unknown.to_pylist()
