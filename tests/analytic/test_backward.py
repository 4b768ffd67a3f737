"""Backward formulas against what autograd runs: tensor FLOPs on the meta device, bytes written on the CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from analytic import operators as op
from analytic.cost import FP32, MODEL_DTYPES, Dtype
from analytic.operators import OPERATORS

if TYPE_CHECKING:
    from collections.abc import Callable

#: Sizes for the formula, shapes of the operands, and what is applied to them.
Case: TypeAlias = "tuple[dict[str, Any], list[tuple[int, ...]], Callable[..., torch.Tensor]]"

BF16 = MODEL_DTYPES["bfloat16"]
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
ATTENTION_SHAPES = [(1, 1, 1, 1, 8), (2, 3, 7, 7, 16), (1, 4, 5, 9, 8), (3, 1, 9, 2, 24)]


def linear(rows: int, width: int, out: int, *, bias: bool, dtype: Dtype = BF16) -> Case:
    sizes = {"rows": rows, "in_features": width, "out_features": out, "dtype": dtype, "bias": bias}
    return sizes, [(rows, width), (out, width), *([(out,)] * bias)], F.linear


def conv2d(images: int, channels: tuple[int, int], kernel: int, stride: int, side: int, *, bias: bool) -> Case:
    padding = kernel // 2
    sizes = {
        "images": images,
        "in_channels": channels[0],
        "out_channels": channels[1],
        "kernel": kernel,
        "in_side": side,
        "out_side": (side + 2 * padding - kernel) // stride + 1,
        "dtype": BF16,
        "bias": bias,
    }
    shapes = [(images, channels[0], side, side), (channels[1], channels[0], kernel, kernel), *([channels[1:]] * bias)]
    return sizes, shapes, lambda *tensors: F.conv2d(*tensors, stride=stride, padding=padding)


def bmm(batch: int, rows: int, inner: int, columns: int) -> Case:
    sizes = {"batch": batch, "rows": rows, "inner": inner, "columns": columns, "dtype": BF16}
    return sizes, [(batch, rows, inner), (batch, inner, columns)], torch.bmm


def normed(rows: int, width: int, dtype: Dtype = BF16) -> Case:
    sizes = {"rows": rows, "width": width, "dtype": dtype}
    return sizes, [(rows, width), (width,), (width,)], lambda x, *scale: F.layer_norm(x, (width,), *scale)


def softmax(rows: int, width: int) -> Case:
    sizes = {"rows": rows, "width": width, "source": FP32, "target": FP32}
    return sizes, [(rows, width)], lambda x: torch.softmax(x, -1)


def pointwise(function: Callable[..., torch.Tensor], elements: int, operands: int = 1, dtype: Dtype = BF16) -> Case:
    return {"elements": elements, "dtype": dtype}, [(elements,)] * operands, function


def backward(case: Case, device: str, mode: Any) -> None:
    """Run the backward pass of a case, and nothing else, in a mode that watches."""
    sizes, shapes, function = case
    dtype = DTYPES[sizes.get("dtype", FP32).name]
    operands = [torch.ones(shape, dtype=dtype, device=device, requires_grad=True) for shape in shapes]
    result = function(*operands)
    gradient = torch.ones_like(result)
    with mode:
        torch.autograd.grad(result, operands, gradient)


def counted(case: Case) -> int:
    counter = FlopCounterMode(display=False)
    backward(case, "meta", counter)
    return counter.get_total_flops()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 3, 4), (17, 64, 8)])
def test_linear(shape: tuple[int, int, int], bias: bool) -> None:  # noqa: FBT001  a parameter of the test
    case = linear(*shape, bias=bias)
    assert op.linear.backward_cost(**case[0]).tensor_flops == counted(case) > 0


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "shape",
    [(1, (1, 1), 1, 1, 1), (2, (3, 4), 3, 1, 8), (2, (3, 16), 3, 2, 9), (3, (8, 2), 1, 1, 5), (1, (3, 8), 5, 4, 32)],
)
def test_conv2d(shape: tuple[Any, ...], bias: bool) -> None:  # noqa: FBT001  a parameter of the test
    case = conv2d(*shape, bias=bias)
    assert op.conv2d.backward_cost(**case[0]).tensor_flops == counted(case) > 0


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 4, 5), (7, 1, 16, 9)])
def test_bmm(shape: tuple[int, int, int, int]) -> None:
    case = bmm(*shape)
    assert op.bmm.backward_cost(**case[0]).tensor_flops == counted(case) > 0


def attention(batch: int, heads: int, queries: int, keys: int, width: int, *, bias: bool = False) -> tuple[Any, ...]:
    """Sizes for the formula, and Q, K, V and a bias on the meta device."""
    shapes = [(batch, heads, rows, width) for rows in (queries, keys, keys)]
    shapes += [(batch, heads, queries, keys)] * bias
    tensors = [torch.empty(shape, device="meta", dtype=torch.bfloat16, requires_grad=True) for shape in shapes]
    return (batch * heads, queries, keys, width, BF16), tensors


def flops_back_from(result: torch.Tensor, operands: list[torch.Tensor]) -> int:
    with FlopCounterMode(display=False) as counter:
        torch.autograd.grad(result, operands, torch.empty_like(result))
    return counter.get_total_flops()


@pytest.mark.parametrize("shape", ATTENTION_SHAPES)
def test_fused_attention_computes_its_scores_again(shape: tuple[int, ...]) -> None:
    """Five products, as torch counts for its own flash kernel; not the four of attention that keeps its scores."""
    sizes, operands = attention(*shape)
    flash, *_ = torch.ops.aten._scaled_dot_product_flash_attention(*operands)
    assert op.sdpa.backward_cost(*sizes).tensor_flops == flops_back_from(flash, operands) > 0
    sizes, operands = attention(*shape, bias=True)
    biased, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(*operands, compute_log_sumexp=True)
    assert op.sdpa_with_bias.backward_cost(*sizes).tensor_flops == flops_back_from(biased, operands) > 0


@pytest.mark.parametrize("shape", ATTENTION_SHAPES)
def test_eager_attention_keeps_its_scores(shape: tuple[int, ...]) -> None:
    sizes, (query, key, value) = attention(*shape)
    scores = torch.matmul(query, key.transpose(2, 3)) / 4
    result = torch.matmul(F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype), value)
    found = op.attention_eager.backward_cost(*sizes).tensor_flops
    assert found == flops_back_from(result.transpose(1, 2).contiguous(), [query, key, value]) > 0
    fused = op.sdpa.backward_cost(*sizes).tensor_flops
    assert 5 * found == 4 * fused


def without_products() -> list[Any]:
    """Operators whose backward pass holds no matrix product."""
    x, idx = torch.empty(3, 4, device="meta", requires_grad=True), torch.empty(2, device="meta", dtype=torch.int64)
    both = torch.empty(3, 4, device="meta", requires_grad=True)
    image = torch.empty(1, 2, 3, 3, device="meta", requires_grad=True)
    mask = torch.empty(3, 1, device="meta", dtype=torch.bool)
    cases = {
        "embedding": ((2, 4, FP32), F.embedding(idx, x), [x]),
        "layer_norm": ((3, 4, FP32), F.layer_norm(x, (4,)), [x]),
        "rms_norm": ((3, 4, FP32), x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6), [x]),
        "layer_norm_2d": ((3, 4, FP32), (x - x.mean(1, keepdim=True)) / x.var(1, keepdim=True), [x]),
        "softmax": ((3, 4, FP32, FP32), torch.softmax(x, -1), [x]),
        "gelu": ((12, FP32), F.gelu(x), [x]),
        "quick_gelu": ((12, FP32), x * torch.sigmoid(1.702 * x), [x]),
        "silu": ((12, FP32), F.silu(x), [x]),
        "swiglu": ((12, FP32), F.silu(x) * both, [x, both]),
        "elementwise": ((12, FP32), x * both, [x, both]),
        "reduction": ((12, 3, FP32), x.mean(-1), [x]),
        "interpolate": ((18, 72, 16, FP32), F.interpolate(image, size=(6, 6), mode="bicubic"), [image]),
        "topk": ((3, 4, 2, FP32), x.topk(2).values, [x]),
        "gather": ((2, 4, FP32), x[idx], [x]),
        "scatter": ((3, 4, FP32), torch.scatter(x * 1, 1, torch.empty_like(x, dtype=torch.int64), both), [both]),
        "index_put": ((2, 4, FP32), torch.index_put(x, (idx,), both[:2]), [both]),
        "masked_scatter": ((3, 2, 4, FP32), x.masked_scatter(mask, both), [both]),
        "kv_cache_append": ((24, 12, FP32), torch.cat((x, both)), [x, both]),
        "cat": ((24, FP32), torch.cat((x, both)), [x, both]),
        "copy": ((12, FP32), x.t().contiguous(), [x]),
        "cast": ((12, FP32, BF16), x.to(torch.bfloat16), [x]),
        "pad": ((12, 18, FP32), F.pad(x, (0, 2)), [x]),
        "rope_apply": ((6, 6, FP32), x * both + torch.cat((-x[:, 2:], x[:, :2]), -1) * both, [x]),
        "causal_mask": ((1, 3, 4, FP32), x + torch.ones(3, 4, device="meta"), [x]),
    }
    return [pytest.param(name, *case, id=name) for name, case in cases.items()]


#: Matrix products, tested above, and what autograd never goes back through.
REST = {"linear", "conv2d", "bmm", "sdpa", "sdpa_with_bias", "attention_eager", "rope_tables", "sort", "fill"}
#: What keeps only the host busy, there and back.
REST |= {"view", "host_loop", "to_host"}


@pytest.mark.parametrize(("name", "sizes", "result", "operands"), without_products())
def test_nothing_else_multiplies_matrices(
    name: str, sizes: tuple[Any, ...], result: torch.Tensor, operands: list[torch.Tensor]
) -> None:
    assert flops_back_from(result, operands) == 0
    assert OPERATORS[name].backward_cost(*sizes).tensor_flops == 0


def test_every_operator_has_met_autograd() -> None:
    assert {case.values[0] for case in without_products()} == OPERATORS.keys() - REST


class Written(TorchDispatchMode):
    """Sums the bytes of new tensors."""

    total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)}
        new = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.total += sum(leaf.nbytes for leaf in new if leaf.untyped_storage().data_ptr() not in given)
        return result


def written_cases(rows: int, dtype: Dtype) -> dict[str, Case]:
    elements = rows * 24
    product, *rest = pointwise(torch.mul, elements, operands=2, dtype=dtype)
    return {
        "linear": linear(rows, 24, 16, bias=True, dtype=dtype),
        "conv2d": conv2d(rows, (3, 4), 3, 1, 6, bias=True),
        "bmm": bmm(2, rows, 8, 3),
        "layer_norm": normed(rows, 24, dtype),
        "softmax": softmax(rows, 24),
        "gelu": pointwise(F.gelu, elements, dtype=dtype),
        "silu": pointwise(F.silu, elements, dtype=dtype),
        "elementwise": (product | {"operands": 2}, *rest),
    }


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=lambda dtype: dtype.name)
@pytest.mark.parametrize("rows", [1, 5, 32])
@pytest.mark.parametrize("name", written_cases(1, FP32))
def test_bytes_written(name: str, rows: int, dtype: Dtype) -> None:
    """The gradients that ATen's own backward operators return."""
    case = written_cases(rows, dtype)[name]
    written = Written()
    backward(case, "cpu", written)
    assert OPERATORS[name].backward_cost(**case[0]).bytes_written == written.total > 0
