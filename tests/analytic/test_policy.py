"""What counts as arithmetic of attention, and how experts are loaded."""

from __future__ import annotations

import sys
import types
from collections import Counter
from typing import TYPE_CHECKING

import attrs
import numpy as np
import pytest
import torch

from analytic.config import variant_config
from analytic.errors import InputError
from analytic.layers.base import Policy
from analytic.model import ATTENTION_FLOPS, ATTENTIONS, Work, deepseek_ocr, operations
from analytic.routing import Routing
from analytic.workload import Workload

if TYPE_CHECKING:
    from collections.abc import Iterable

TINY = variant_config("deepseek-ocr-v1-tiny")
MODEL = deepseek_ocr(TINY)
DECODER = TINY.decoder
PAGE = Workload("page", 640, 640, 7, 4, crop_mode=False, base_size=256, batch_size=2)
#: Names of the operators that stand for a decoder's attention.
ATTENDING = {"fused_attention", "eager_attention"}


def flops(work: Work, stage: str, names: Iterable[str] = ATTENDING) -> int:
    return sum(op.cost.tensor_flops for op in work.operations if op.stage == stage and op.name in names)


def work_of(**policy: str) -> Work:
    return operations(MODEL, PAGE, policy=Policy(**policy))


def visible_pairs() -> int:
    """Pairs of a prompt's positions of which the second may see the first, counted one by one."""
    return sum(first <= second for second in range(PAGE.seq_len) for first in range(PAGE.seq_len))


def products(pairs: int) -> int:
    """FLOPs of scores and values over so many pairs, in all heads and layers."""
    return 4 * pairs * DECODER.head_dim * DECODER.heads * DECODER.layers * PAGE.batch_size


@pytest.mark.parametrize("attention", ["sdpa", "flash_attention_2"])
def test_full_and_executed_attention(attention: str) -> None:
    full, executed = (work_of(attention=attention, attention_flops=counted) for counted in ("full", "executed"))
    assert flops(full, "prefill") == products(PAGE.seq_len**2)
    assert flops(executed, "prefill") == products(visible_pairs())
    # One new position sees all that there are.
    decode = products(sum(PAGE.seq_len + step for step in range(1, PAGE.max_new_tokens)))
    assert flops(full, "decode") == flops(executed, "decode") == decode


def test_scores_that_are_written_out_are_all_computed() -> None:
    for counted in ATTENTION_FLOPS:
        eager = work_of(attention="eager", attention_flops=counted)
        assert flops(eager, "prefill") == products(PAGE.seq_len**2)


def test_only_attention_of_the_decoder_depends_on_what_is_counted() -> None:
    for attention in ATTENTIONS:
        works = [work_of(attention=attention, attention_flops=counted) for counted in ATTENTION_FLOPS]
        others = [[op for op in work.operations if op.name not in ATTENDING] for work in works]
        assert others[0] == others[1] == others[2]
        moved = [[(op.cost.read, op.cost.written) for op in work.operations] for work in works]
        assert moved[0] == moved[1] == moved[2]


def test_a_counter_sees_what_it_knows() -> None:
    assert work_of(attention="sdpa", attention_flops="counter").operations == work_of(attention="sdpa").operations
    unseen = work_of(attention="flash_attention_2", attention_flops="counter")
    assert flops(unseen, "prefill") == flops(unseen, "decode") == 0
    assert flops(unseen, "vision", ["sdpa"]) > 0


@torch.library.custom_op("dsocr_trace_tests::flash_attn_func", mutates_args=())
def flash_attn_func(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, causal: bool) -> torch.Tensor:  # noqa: FBT001  the package's own signature
    """Stands for the package's kernel, to which torch's counter has no formula either."""
    raise AssertionError((query, key, value, causal))


@flash_attn_func.register_fake
def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, causal: bool) -> torch.Tensor:  # noqa: FBT001  the same
    del key, value, causal
    return torch.empty_like(query)


def test_the_counter_policy_is_what_torch_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Module by module, with a flash kernel of which only the shapes are known."""
    reference = pytest.importorskip("stage_runners.reference_flops", reason="the built-in model is not installed")
    from stage_runners.deepseek_ocr import DeepseekOCRForCausalLM  # noqa: PLC0415  with the module above

    package = types.ModuleType("flash_attn")
    package.flash_attn_func = flash_attn_func
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    with torch.device("meta"):
        model = DeepseekOCRForCausalLM(TINY, attention="flash_attention_2").to("meta").eval()
    lengths = [PAGE.seq_len + 1, PAGE.seq_len + 5]
    policy = Policy("float32", "flash_attention_2", "counter")
    work = operations(MODEL, PAGE, policy=policy, kv_lengths=lengths)
    prefill, decode = work.routing.prefill, work.routing.decode
    counted = reference.count_flops(model, DECODER, PAGE, prefill=prefill, decode=decode, kv_lengths=lengths)
    expected = Counter()
    for operation in work.operations:
        expected[operation.stage, operation.module_path] += operation.cost.tensor_flops
    assert +expected == +counted.flops
    full = operations(MODEL, PAGE, policy=attrs.evolve(policy, attention_flops="full"), kv_lengths=lengths)
    total = sum(operation.cost.tensor_flops for operation in full.operations)
    assert total - counted.flops.total() == flops(full, "prefill") + flops(full, "decode") > 0


@pytest.mark.parametrize("how", ["balanced", "worst"])
def test_planned_routing(how: str) -> None:
    work = operations(MODEL, PAGE, policy=Policy(), routing=how)
    assert work.routing.source == how
    counts = work.routing.prefill[1][0]
    tokens = PAGE.seq_len * PAGE.batch_size
    assert (counts.max() == tokens) == (how == "worst")
    assert np.ptp(counts) <= 1 or how == "worst"


def test_measured_routing_is_taken_as_it_is() -> None:
    sizes = DECODER.expert_sizes
    rows, tokens = PAGE.max_new_tokens - 1, PAGE.seq_len * PAGE.batch_size
    two = np.zeros((rows, sizes.experts), dtype=np.int64)
    two[:, -sizes.per_token :] = PAGE.batch_size
    measured = Routing(
        dict.fromkeys(sizes.layers, two[:1] // PAGE.batch_size * tokens), dict.fromkeys(sizes.layers, two), "measured"
    )
    work = operations(MODEL, PAGE, policy=Policy(), routing=measured)
    assert work.routing is measured
    path = "model.layers.1.mlp.experts"
    busy = {number for number in range(sizes.experts) if ("decode", f"{path}.{number}") in work.calls}
    assert busy == set(range(sizes.experts - sizes.per_token, sizes.experts))
    assert {work.calls["decode", f"{path}.{number}"] for number in busy} == {rows}


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (
            Policy(attention="flash"),
            "no attention 'flash'; choose one of sdpa, eager, flash_attention_2 with --attention",
        ),
        (Policy(attention_flops="half"), "no attention_flops 'half'; choose one of full, executed, counter with --set"),
        (Policy("int8"), "no dtype 'int8'; choose one of bf16, fp16, fp32 with --dtype"),
    ],
)
def test_unknown_policies(policy: Policy, message: str) -> None:
    with pytest.raises(InputError, match=message):
        operations(MODEL, PAGE, policy=policy)
